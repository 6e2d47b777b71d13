"""The checkpoint's tokenizer."""

from __future__ import annotations

from typing import Any

from lfm2_fast.config import CheckpointError, Config
from lfm2_fast.weights import hub

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def load_tokenizer(name: str, **options: Any) -> Any:
    """Return the checkpoint's tokenizer; ``options`` are those of the hub.

    Raises CheckpointError when there is none that can be loaded. Of a folder that is no checkpoint
    it says that instead.
    """
    from transformers import AutoTokenizer

    folder = hub.find_checkpoint(name, weights=False, also=TOKENIZER_FILES, **options)
    Config.from_file(folder / "config.json")
    if not (folder / TOKENIZER_FILES[0]).is_file():
        raise CheckpointError(
            f"{folder} has no {TOKENIZER_FILES[0]}; if it is on the hub, connect once to download "
            "it, else save the tokenizer into the checkpoint's folder"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded ({reason})") from error
