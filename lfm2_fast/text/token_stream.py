"""TokenStream: turns token ids into text, one by one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lfm2_fast.text.markers import MARKERS


@dataclass
class Timing:
    """Times of a request, of its first token and of its last token."""

    begun: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0

    def tick(self) -> None:
        """Note that a token came."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.tokens += 1

    def __str__(self) -> str:
        if not self.tokens:
            return "no tokens"
        words = f"first token after {self.first - self.begun:.2f} s"
        if self.tokens > 1 and self.last > self.first:
            rate = (self.tokens - 1) / (self.last - self.first)
            words += f", {self.tokens} tokens at {rate:.{0 if rate >= 100 else 1}f} tokens/s"
        return words


class TokenDecoder:
    """Turns token ids into text as soon as characters are complete. Special tokens are text too.

    It never raises: an id that the tokenizer does not know has no text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._begin()

    def _begin(self) -> None:
        from tokenizers.decoders import DecodeStream

        self._ids: list[int] = []
        self._returned = 0  # characters
        self._stream = DecodeStream(skip_special_tokens=False)

    def put(self, token: int) -> str:
        """Add a token, and return the text that it completes."""
        self._ids.append(token)
        try:
            text = self._stream.step(self._backend, token) or ""
        except Exception:
            # The library fails if a decoder changes its earlier text.
            return ""
        self._returned += len(text)
        return text

    def end(self) -> str:
        """Return the rest, an incomplete character, and start again."""
        if not self._ids:
            return ""
        text = self._backend.decode(self._ids, skip_special_tokens=False)[self._returned :]
        self._begin()
        return text


class TokenStream:
    """Sends the text of tokens to ``write`` as soon as characters are complete.

    Special tokens are dropped, except those in MARKERS. ``text`` is all the text, ``ids`` all the
    tokens.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.timing = Timing()
        self._write = write
        self._decoder = TokenDecoder(tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        self._dropped = {i for i, t in added if t.special and t.content not in MARKERS}

    def put(self, token: int) -> None:
        """Add a token."""
        self.timing.tick()
        self.ids.append(token)
        if token not in self._dropped:
            self._pass(self._decoder.put(token))

    def end(self) -> None:
        """Send the characters that are incomplete at the end of the text."""
        self._pass(self._decoder.end())

    def _pass(self, text: str) -> None:
        if text:
            self.text += text
            self._write(text)
