"""TokenStream: a streamer for ``generate`` that turns token ids into text as they come."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lfm2_fast.text.segments import MARKERS


class Stopped(Exception):
    """Ends a ``generate`` from within its streamer."""


@dataclass
class Timing:
    """When a call of ``generate`` began, and when its first and its last token came."""

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


class TokenStream:
    """A streamer for ``generate`` with one row: hands over text as soon as characters are whole.

    Special tokens are dropped, but for those in MARKERS. When ``stopped`` says so, ``generate``
    ends with Stopped, between two steps. ``text`` is all the text, ``ids`` all the tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        write: Callable[[str], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        from tokenizers.decoders import DecodeStream

        self.ids: list[int] = []
        self.text = ""
        self.timing = Timing()
        self._write = write
        self._stopped = stopped
        self._backend = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=False)
        added = tokenizer.added_tokens_decoder.items()
        self._dropped = {i for i, t in added if t.special and t.content not in MARKERS}
        self._in_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, which comes first, or one more token."""
        if self._in_prompt:
            self._in_prompt = False
            return
        self.timing.tick()
        token = int(value)
        self.ids.append(token)
        if token not in self._dropped:
            self._pass(self._decoder.step(self._backend, token) or "")
        if self._stopped():
            raise Stopped

    def end(self) -> None:
        """The text is over: hand over characters that remained incomplete."""
        shown = [token for token in self.ids if token not in self._dropped]
        whole = self._backend.decode(shown, skip_special_tokens=False)
        self._pass(whole[len(self.text) :])

    def _pass(self, text: str) -> None:
        if text:
            self.text += text
            self._write(text)
