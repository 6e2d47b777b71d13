"""Checkpoint's tokenizer as GGUF has it: tokens, their kinds, merges and chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm2_fast.config_values import FETCH_AGAIN, CheckpointError, read_json

# The pattern by which LFM2 splits a text into words, which GGUF calls "lfm2".
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Kinds of tokens.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
ELSEWHERE = "write the file with llama.cpp's convert_hf_to_gguf.py"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, the kind of each, and merges; the template, or several with names, or None."""

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    add_bos: bool = True
    chat_template: str | list[dict[str, str]] | None = None

    @classmethod
    def from_folder(cls, folder: Path, size: int) -> Vocabulary:
        """Read the tokenizer of a checkpoint; ids up to ``size`` that it lacks become unused.

        Raises CheckpointError if there is none, or if it splits texts by other rules than LFM2's.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json, which a GGUF file needs")
        raw = read_json(path)
        try:
            return cls._of(raw, folder, path, size)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{path} is not a tokenizer of LFM2: {error!r}") from error

    @classmethod
    def _of(cls, raw: dict[str, Any], folder: Path, path: Path, size: int) -> Vocabulary:
        model, added = raw["model"], raw["added_tokens"]
        splits = raw["pre_tokenizer"]["pretokenizers"]
        patterns = [each["pattern"]["Regex"] for each in splits if each["type"] == "Split"]
        if model["type"] != "BPE" or patterns != [PATTERN] or raw["normalizer"] is not None:
            raise CheckpointError(
                f"{path} splits texts by other rules than LFM2's, which lfm2_fast cannot name in a "
                f"GGUF file; {ELSEWHERE}"
            )
        tokens, kinds = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
        kind_of = {each["content"]: CONTROL if each["special"] else USER_DEFINED for each in added}
        for text, i in [
            *model["vocab"].items(),
            *((each["content"], each["id"]) for each in added),
        ]:
            if not 0 <= i < size:
                raise CheckpointError(
                    f"{path}: token {text!r} has id {i}, and vocab_size is {size}"
                )
            tokens[i], kinds[i] = text, kind_of.get(text, NORMAL)
        return cls(
            tokens,
            kinds,
            # Two spellings of a pair; words of a byte-level tokenizer have no spaces in them.
            [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
            add_bos=_adds_a_token(path),
            chat_template=_chat_template(folder),
        )

    def write(self, writer: Any) -> None:
        """Add all to a ``gguf.GGUFWriter``."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("lfm2")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_merges(self.merges)
        writer.add_add_bos_token(self.add_bos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def _adds_a_token(path: Path) -> bool:
    """Return True if the tokenizer adds one token before each text, False if it adds none.

    Raises CheckpointError if it adds more.
    """
    from tokenizers import Tokenizer

    try:
        added = Tokenizer.from_file(str(path)).encode("").ids
    except Exception as error:  # the library has no class of its own for them
        raise CheckpointError(f"{path} cannot be loaded: {error}; {FETCH_AGAIN}") from error
    if len(added) > 1:
        raise CheckpointError(f"{path} adds {len(added)} tokens to each text; {ELSEWHERE}")
    return bool(added)


def _chat_template(folder: Path) -> str | list[dict[str, str]] | None:
    """Return the chat template of a checkpoint, from either place where one may be."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    found = read_json(config).get("chat_template") if config.is_file() else None
    if found is not None and not isinstance(found, str | list):
        raise CheckpointError(f"{config}: chat_template is not a text: {json.dumps(found)[:80]}")
    return found
