"""Tokenizers of checkpoints: from a folder, the hub or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lfm2_fast.config import Config
from lfm2_fast.config_values import CheckpointError
from lfm2_fast.weights import hub
from lfm2_fast.weights.adapter import is_adapter
from lfm2_fast.weights.gguf_config import raw_config
from lfm2_fast.weights.gguf_file import read_gguf

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def load_tokenizer(name: str, **options: Any) -> Any:
    """Return the checkpoint's tokenizer; ``options`` are those of the hub.

    An adapter without a tokenizer uses its base's. Raises CheckpointError if there is no tokenizer,
    or if the folder is not a checkpoint.
    """
    folder = hub.find_checkpoint(name, weights=False, also=TOKENIZER_FILES, **options)
    if folder.is_file():
        return _from_gguf(folder)
    if is_adapter(folder) and not (folder / TOKENIZER_FILES[0]).is_file():
        folder = hub.find_base(folder, weights=False, also=TOKENIZER_FILES, **options)
    if not is_adapter(folder):
        Config.from_file(folder / "config.json")
    if not (folder / TOKENIZER_FILES[0]).is_file():
        raise CheckpointError(
            f"{folder} has no {TOKENIZER_FILES[0]}; if it is on the hub, connect once to download "
            "it, else save the tokenizer into the checkpoint's folder"
        )
    return _loaded(folder, folder)


def _from_gguf(path: Path) -> Any:
    """Return the tokenizer of a GGUF file, with its chat template, as transformers builds it."""
    # Transformers' reader does not check the file; this package has checked it before.
    file = read_gguf(path)
    Config.from_dict(raw_config(file), str(path))
    if not file.metadata.get("tokenizer.ggml.tokens"):
        raise CheckpointError(f"{path} holds no tokenizer; use a file that llama.cpp converted")
    return _loaded(path, path.parent, gguf_file=path.name)


def _loaded(path: Path, folder: Path, **options: Any) -> Any:
    """Return the tokenizer of ``folder``. Raises CheckpointError, which names ``path``."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"the tokenizer in {path} cannot be loaded ({reason})") from error
