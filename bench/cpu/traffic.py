"""Traffic: requests of many different clients, the same ones for the same seed.

Prompts are pieces of a text: new conversations on a few shared beginnings, later turns, edits in
the middle, and new prompts. Some clients leave before the end, and some requests have a deadline
that passes.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lfm2_fast.engine.request import Request
from lfm2_fast.ops.sampling import SamplingParams

# Most tokens of a prompt, and of a later turn.
LONGEST, TURN = 600, 60
# Number of remembered conversations. The limit keeps their growth from looking like a leak.
REMEMBERED = 200
# The small checkpoint's end of a text and of a turn.
ENDS = (2, 7)


@dataclass(frozen=True)
class Ask:
    """Request, and the behaviour of its client.

    ``leaves_after`` counts the events after which the client goes away, None if it stays. An answer
    is ``plain`` if it is greedy, up to its own end.
    """

    request: Request
    leaves_after: int | None
    plain: bool


class Traffic:
    """Draws requests with ``next``. ``answered`` continues their conversations.

    ``ids`` is the text of the prompts. ``kinds`` counts the kinds of requests.
    """

    def __init__(self, seed: int, ids: Sequence[int]) -> None:
        self.pick = random.Random(seed)
        self.ids = ids
        self.kinds: Counter[str] = Counter()
        self._beginnings = [self._piece(size) for size in (20, 64, 90, 130, 200)]
        self._chats: deque[list[int]] = deque(maxlen=REMEMBERED)

    def next(self) -> Ask:
        """Return the next client's request."""
        prompt = self._prompt()
        most = 300 if self._comes(0.12, "long answer") else self._size(120)
        fields: dict[str, Any] = {"max_tokens": most, "eos": ENDS}
        fields["seed"] = self.pick.randrange(2**32)
        fields["n"] = self.pick.choice([1, 1, 1, 1, 1, 1, 1, 2, 2, 3])
        fields["priority"] = self.pick.choice([0, 0, 0, 0, -1, 1])
        self.kinds["several continuations"] += fields["n"] > 1
        if self._comes(0.5, "drawn"):
            fields["sampling"] = self._drawn()
        if self._comes(0.15, "stop"):
            fields["stop"] = _stop(self.pick.randrange(40))
        if self._comes(0.1, "log-probabilities"):
            fields["logprobs"] = self.pick.randrange(6)
        if self._comes(0.03, "prompt log-probabilities"):
            fields["prompt_logprobs"] = 1
        if self._comes(0.1, "min_tokens"):
            fields["min_tokens"] = self.pick.randint(1, most)
        if self._comes(0.1, "penalties"):
            fields |= {"presence_penalty": 0.5, "frequency_penalty": 0.25}
        if self._comes(0.05, "bias"):
            fields["logit_bias"] = {self.pick.choice(self.ids): -5.0}
        if self._comes(0.1, "another tenant"):
            fields["salt"] = b"tenant"
        if self._comes(0.06, "deadline"):
            fields["deadline"] = time.monotonic() + self.pick.uniform(0.005, 0.3)
        leaves = self._size(30) - 1 if self._comes(0.12, "client leaves") else None
        request = Request(prompt, **fields)
        plain = leaves is None and request.n == 1 and request.deadline is None
        plain = plain and not (request.sampling.do_sample or request.changes_logits)
        return Ask(request, leaves, plain)

    def answered(self, ask: Ask, tokens: Sequence[int]) -> None:
        """Note an answer; later turns go on from it."""
        text = [*ask.request.prompt, *tokens]
        if len(text) + TURN <= LONGEST:
            self._chats.append(text)

    def _prompt(self) -> list[int]:
        kind = self.pick.random()
        chat = self.pick.choice(self._chats) if self._chats else []
        if chat and kind < 0.45:
            self.kinds["later turn"] += 1
            return [*chat, *self._piece(self.pick.randint(3, TURN))]
        if chat and kind < 0.55:
            self.kinds["edit in the middle"] += 1
            cut = self.pick.randrange(len(chat))
            return [*chat[:cut], *self._piece(self.pick.randint(1, TURN))]
        if kind < 0.8:
            self.kinds["new conversation"] += 1
            return [*self.pick.choice(self._beginnings), *self._piece(self._size(150))]
        self.kinds["unknown prompt"] += 1
        return self._piece(self._size(LONGEST))

    def _drawn(self) -> SamplingParams:
        return SamplingParams(
            do_sample=True,
            temperature=self.pick.uniform(0.5, 1.3),
            top_k=self.pick.choice([0, 40]),
            top_p=self.pick.choice([1.0, 0.9]),
            min_p=self.pick.choice([0.0, 0.05]),
            repetition_penalty=self.pick.choice([1.0, 1.1]),
        )

    def _comes(self, share: float, kind: str) -> bool:
        found = self.pick.random() < share
        self.kinds[kind] += found
        return found

    def _size(self, most: int) -> int:
        """Draw a length from 1 to ``most``; all orders of magnitude have equal probability."""
        return round(math.exp(self.pick.uniform(0, math.log(most))))

    def _piece(self, count: int) -> list[int]:
        first = self.pick.randrange(len(self.ids) - count)
        return list(self.ids[first : first + count])


def _stop(rest: int) -> Callable[[Sequence[int]], bool]:
    """Return a condition on new tokens that some texts meet, at an unknown place."""
    return lambda new: len(new) > 3 and sum(new[-3:]) % 40 == rest
