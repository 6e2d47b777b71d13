"""GrammarMask: the tokens that may come next in one reply, computed while the model runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch


class GrammarError(RuntimeError):
    """A grammar gave up in the middle of a reply: it became too complex."""


@dataclass(frozen=True)
class Phases:
    """Tokens between which a grammar holds.

    ``closer`` ends the thinking in which a reply begins. ``openers`` are tokens with which it may
    open thinking, and those that end it. The grammar begins at the first token that is none of
    these, or at ``start`` if given. Then ``end`` ends it, and with ``again`` it may begin anew.
    """

    closer: int | None = None
    openers: Mapping[int, int] = field(default_factory=dict)
    start: int | None = None
    end: int | None = None
    again: bool = True


class GrammarMask:
    """The mask of one continuation; its state follows from the tokens that were written.

    ``prepare`` has a thread of ``pool`` compute what may follow, and ``apply`` waits for it.
    """

    def __init__(self, matcher: Any, phases: Phases, pool: ThreadPoolExecutor) -> None:
        self._matcher, self._phases, self._pool = matcher, phases, pool
        self._begin()

    def _begin(self) -> None:
        self._matcher.reset()
        self._read = -1
        self._closer = self._phases.closer
        self._openers = self._phases.openers
        self._waits = self._phases.start is not None
        self._ended = False
        self._fed: list[int] = []
        self._bias: Future[bytes] | None = None

    def prepare(self, written: Sequence[int]) -> None:
        """Begin to compute what may follow the new tokens ``written``, if it is not known."""
        if len(written) == self._read:
            return
        if len(written) < self._read:
            self._begin()
        for token in written[max(self._read, 0) :]:
            self._follow(token)
        self._read = len(written)
        self._bias = None
        if self._closer is None and not self._waits:
            fed, self._fed = self._fed, []
            self._bias = self._pool.submit(self._computed, fed)

    def apply(self, written: Sequence[int], logits: torch.Tensor) -> None:
        """Set ``logits [V]`` to -inf for the tokens that may not follow ``written``.

        Raises GrammarError where the grammar cannot say which may.
        """
        self.prepare(written)
        if self._bias is not None:
            told = bytearray(self._bias.result())
            for opener in self._openers:
                told[opener] = 1
            allowed = torch.frombuffer(told, dtype=torch.uint8).to(logits.device)
            logits.masked_fill_(allowed == 0, -math.inf)
        elif self._ended and not self._phases.again and self._phases.start is not None:
            logits[self._phases.start] = -math.inf

    def _follow(self, token: int) -> None:
        """Go on to the phase behind a token."""
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

    def _computed(self, tokens: list[int]) -> bytes:
        matcher = self._matcher
        for token in tokens:
            # Behind the end of a reply there are ends alone.
            if not matcher.is_stopped():
                matcher.consume_token(token)
        bias: bytes = matcher.compute_logit_bias()
        if matcher.is_error():
            raise GrammarError(f"the grammar cannot go on: {matcher.get_error().strip()[:500]}")
        return bias
