"""Texts and bytes of single tokens, and log-probabilities as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lfm2_fast.engine.request import LogProbs

# Replaces minus infinity, which JSON does not have.
LEAST = -9999.0


def byte_of_character() -> dict[str, int]:
    """Return the byte of each character of a byte-level vocabulary.

    Printable characters of Latin-1 are themselves, the others follow from 256 on.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    found = {chr(byte): byte for byte in plain}
    return found | {chr(256 + place): byte for place, byte in enumerate(others)}


class TokenTexts:
    """Text and bytes of each token of a tokenizer; an id beyond it has neither."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._added = {id: t.content for id, t in tokenizer.added_tokens_decoder.items()}
        self._bytes = byte_of_character()

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token, which may be parts of characters."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._backend.id_to_token(token)
        if piece is None:
            return b""
        found = [self._bytes.get(character) for character in piece]
        if None not in found:
            return bytes(byte for byte in found if byte is not None)
        return str(self._backend.decode([token], skip_special_tokens=False)).encode()

    def text(self, token: int) -> str:
        """Return a token's text, with a replacement character for incomplete characters."""
        return self.bytes_of(token).decode(errors="replace")

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        raw = self.bytes_of(token)
        text = raw.decode(errors="replace")
        return {"token": text, "logprob": max(value, LEAST), "bytes": list(raw)}

    def chat(self, found: Iterable[tuple[int, LogProbs]]) -> dict[str, Any]:
        """Return a chat choice's ``logprobs``."""
        content = []
        for token, given in found:
            entry = self._entry(token, given.token)
            entry["top_logprobs"] = [self._entry(*each) for each in given.best]
            content.append(entry)
        return {"content": content, "refusal": None}

    def completion(
        self, found: Iterable[tuple[int, LogProbs | None]], offset: int = 0
    ) -> dict[str, list[Any]]:
        """Return a completion choice's ``logprobs``; ``offset`` is where its text begins.

        The first token of a prompt has none, which is null.
        """
        columns: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token, given in found:
            text = self.text(token)
            columns["tokens"].append(text)
            columns["text_offset"].append(offset)
            offset += len(text)
            if given is None:
                columns["token_logprobs"].append(None)
                columns["top_logprobs"].append(None)
                continue
            columns["token_logprobs"].append(max(given.token, LEAST))
            # Of tokens with the same text, like halves of characters, the most likely one stays.
            best = {self.text(id): max(value, LEAST) for id, value in reversed(given.best)}
            best.setdefault(text, max(given.token, LEAST))
            columns["top_logprobs"].append(best)
        return columns

    def prompt(
        self, prompt: Iterable[int], found: Iterable[LogProbs | None]
    ) -> list[dict[str, Any] | None]:
        """Return ``prompt_logprobs`` in vLLM's form: by token id, with known ranks."""
        entries: list[dict[str, Any] | None] = []
        for token, given in zip(prompt, found, strict=True):
            if given is None:
                entries.append(None)
                continue
            best = {id: (value, rank) for rank, (id, value) in enumerate(given.best, 1)}
            own = {token: best.get(token, (given.token, None))}
            entries.append(
                {
                    str(id): {
                        "logprob": max(value, LEAST),
                        "rank": rank,
                        "decoded_token": self.text(id),
                    }
                    for id, (value, rank) in (own | best).items()
                }
            )
        return entries
