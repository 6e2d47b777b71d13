"""GrammarMask: the tokens that may come next in one reply, computed while the model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch


class GrammarError(RuntimeError):
    """Error of a grammar that became too complex in the middle of a reply."""


@dataclass(frozen=True)
class Phases:
    """Tokens at which a grammar begins and ends.

    ``closer`` ends the thinking in which a reply begins. ``openers`` maps tokens that open thinking
    to those that close it. The grammar begins at the first other token, or at ``start`` if given.
    ``end`` ends it. With ``again`` it may then begin again.
    """

    closer: int | None = None
    openers: Mapping[int, int] = field(default_factory=dict)
    start: int | None = None
    end: int | None = None
    again: bool = True


class GrammarMask:
    """Mask of one continuation; its state follows from the tokens that were written.

    ``prepare`` lets a thread of ``pool`` compute the allowed tokens, and ``allowed`` waits for it.
    """

    def __init__(
        self, matcher: Any, phases: Phases, pool: ThreadPoolExecutor, vocab_size: int
    ) -> None:
        self._matcher, self._phases, self._pool = matcher, phases, pool
        self._words = (vocab_size + 31) // 32
        self._begin()

    def _begin(self) -> None:
        self._matcher.reset()
        self._read = -1
        self._closer = self._phases.closer
        self._openers = self._phases.openers
        self._waits = self._phases.start is not None
        self._ended = False
        self._fed: list[int] = []
        self._mask: Future[torch.Tensor] | None = None

    def prepare(self, written: Sequence[int]) -> None:
        """Begin to compute the tokens that may follow ``written``, unless they are known."""
        if len(written) == self._read:
            return
        if len(written) < self._read:
            self._begin()
        for token in written[max(self._read, 0) :]:
            self._follow(token)
        self._read = len(written)
        self._mask = None
        if self._closer is None and not self._waits:
            fed, self._fed = self._fed, []
            self._mask = self._pool.submit(self._computed, fed)

    def allowed(self, written: Sequence[int]) -> torch.Tensor | None:
        """Return a bit for each token that may follow ``written``, None if all may.

        Raises GrammarError if the grammar fails.
        """
        self.prepare(written)
        if self._mask is not None:
            mask = self._mask.result()
            for opener in self._openers:
                mask[opener // 32] |= _bit(opener)
            return mask
        start = self._phases.start
        if start is None or self._phases.again or not self._ended:
            return None
        mask = torch.full((self._words,), -1, dtype=torch.int32)
        mask[start // 32] &= ~_bit(start)
        return mask

    def _follow(self, token: int) -> None:
        """Move to the phase after a token."""
        if self._closer is not None:
            if token == self._closer:
                self._closer = None
            return
        openers, self._openers = self._openers, {}
        if token in openers:
            self._closer = openers[token]
        elif self._waits:
            if token == self._phases.start and (self._phases.again or not self._ended):
                self._waits = False
                self._fed.append(token)
        elif token == self._phases.end:
            self._waits = self._ended = True
            self._fed.clear()
            self._matcher.reset()
        else:
            self._fed.append(token)

    def _computed(self, tokens: list[int]) -> torch.Tensor:
        matcher = self._matcher
        for token in tokens:
            # After the end of a reply only end tokens may follow.
            if not matcher.is_stopped():
                matcher.consume_token(token)
        mask = torch.empty(self._words, dtype=torch.int32)
        matcher.unsafe_compute_mask_ptr(mask.data_ptr(), 4 * self._words)
        if matcher.is_error():
            raise GrammarError(f"the grammar cannot continue: {matcher.get_error().strip()[:500]}")
        return mask


def _bit(token: int) -> int:
    """Return a token's bit of its word, as an int32."""
    bit = 1 << token % 32
    return bit - (1 << 32) if bit == 1 << 31 else bit
