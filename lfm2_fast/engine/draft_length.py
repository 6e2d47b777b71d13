"""Length of drafts: as long as what is likely accepted outweighs what it costs to check.

Chances may mislead, so a budget bounds what refused drafts cost: a share of the decoding time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from math import inf

# A draft must promise this many times the tokens a second of a step without.
LEAST_GAIN = 1.05
# Share of a step that another token of it costs, as long as none was measured.
TOKEN_COST = 0.1
# A step that takes more than this many times its usual time was delayed by something else.
MOST_DELAY = 2.0
# Latest times of a size whose median counts. The median of fewer counts only if other sizes let
# expect no less: one slow step must not end all drafts. With more, a change of the processor's
# speed would be noticed too late.
TIMES = 3
# Most steps without a draft before a kind of draft is tried again.
LONGEST_REST = 512
# Chance below which another model's drafts hardly ever pay, so that their length is not computed.
HOPELESS = 0.15
# Plain steps that refused drafts may lose: at first, for each step, and at once after long gains.
FIRST_LOSS, LOSS_A_STEP, MOST_LOSS = 2.0, 0.01, 4.0
# Verified steps in a row, after which a plain step is timed: a processor's speed changes.
IN_A_ROW = 16


@dataclass(frozen=True)
class Source:
    """Lookups or another model, and how their drafts are planned.

    After a rest, first of ``rest`` steps, a draft is planned by the chance ``hope``. The outcomes
    of the latest ``remembered`` tokens count; older ones fade.
    """

    hope: float
    remembered: float
    rest: int


# Texts change between what repeats and what does not.
LOOKUP = Source(hope=0.5, remembered=8.0, rest=16)
# Another model costs more and is right more often, and how often changes little along a text.
ANOTHER_MODEL = Source(hope=0.8, remembered=32.0, rest=64)


class Budget:
    """Plain steps that drafts may still lose, ``left``, beside decoding without drafts.

    Each step allows for a little more loss. A verified step uses up what it took beyond the plain
    steps that its tokens would have taken, and gives back what it saved. So in N steps drafts lose
    ``FIRST_LOSS + N * LOSS_A_STEP`` at most, if none is launched that may lose more than is left.
    What a step takes is measured, so the loss is larger while a size's time is only estimated.
    """

    def __init__(self) -> None:
        self.left, self._in_a_row = FIRST_LOSS, 0

    @property
    def asks_for_plain(self) -> bool:
        """Return True if the next step should have no drafts, so that it is timed."""
        return self._in_a_row >= IN_A_ROW

    def count_step(self, *, verified: bool) -> None:
        """Note that a step is launched, with drafts or without."""
        self.left = min(self.left + LOSS_A_STEP, MOST_LOSS)
        self._in_a_row = self._in_a_row + 1 if verified else 0

    def note(self, took: float, saved: float) -> None:
        """Note that a verified step took as long as ``took`` plain ones, in place of ``saved``."""
        # The lower bound is for a step that something else delayed: drafts pause after it.
        self.left = max(min(self.left + saved - took, MOST_LOSS), -MOST_LOSS)


class StepCosts:
    """Seconds that steps take by their tokens: medians of the latest.

    The first ``warm`` of each size are not counted: they are captured or recorded then.
    """

    def __init__(self, warm: int) -> None:
        self._warm = warm
        self._times: dict[int, deque[float]] = {}
        self._seen: dict[int, int] = {}

    def add(self, tokens: int, seconds: float) -> float:
        """Note what a step of ``tokens`` took. Return that, without what else delayed it."""
        usual = self.of(tokens)
        seen = self._seen[tokens] = self._seen.get(tokens, 0) + 1
        if seen <= self._warm:
            return usual
        # Without known times, estimates have another unit.
        told = min(seconds, MOST_DELAY * usual) if self._times else usual
        self._times.setdefault(tokens, deque(maxlen=TIMES)).append(seconds)
        return told

    def knows(self, rows: int) -> bool:
        """Return True if steps of ``rows`` or fewer were timed, so that more can be compared."""
        return any(tokens <= rows for tokens in self._times)

    def of(self, tokens: int) -> float:
        """Return the seconds of a step of ``tokens``, or an estimate by other steps.

        A size that was timed a few times takes no longer than the others let expect. So it is timed
        again, and a step that something else delayed is forgotten.
        """
        own = self._times.get(tokens, ())
        if len(own) >= TIMES:
            return median(own)
        others = self._by_others(tokens)
        return min(median(own), others) if own else others

    def _by_others(self, tokens: int) -> float:
        """Return an estimate of ``tokens`` by steps of other sizes, or by its own alone."""
        known = sorted(set(self._times) - {tokens})
        if not known:
            return self._median(tokens) if self._times else 1.0 + TOKEN_COST * tokens
        below = [each for each in known if each <= tokens]
        above = [each for each in known if each >= tokens]
        if not below:
            return self._median(above[0])
        low = below[-1]
        if not above:
            more = TOKEN_COST * self._median(low)
            if len(below) > 1:
                rise = self._median(low) - self._median(below[-2])
                more = max(rise / (low - below[-2]), 0.0)
            return self._median(low) + more * (tokens - low)
        high = above[0]
        share = (tokens - low) / (high - low)
        return self._median(low) * (1 - share) + self._median(high) * share

    def _median(self, tokens: int) -> float:
        return median(self._times[tokens])


def median(values: Collection[float]) -> float:
    """Return the middle value, of two the larger; Python's module for it imports much."""
    return sorted(values)[len(values) // 2]


@dataclass
class _Rate:
    """Outcomes of one kind of drafts, and how long they have not been tried."""

    accepted: float = 0.5
    tried: float = 1.0
    skipped: int = 0
    longer: int = 1  # times the first rest

    def rest(self, source: Source) -> int:
        return min(source.rest * self.longer, LONGEST_REST)


@dataclass
class Acceptance:
    """Chance that a drafted token is accepted, by the kind of draft; ``of_all`` is where it begins.

    A kind that does not pay is tried again after a rest, which doubles each time.
    """

    of_all: Acceptance | None = None
    _rates: dict[Hashable, _Rate] = field(default_factory=dict)

    def _rate(self, kind: Hashable) -> _Rate:
        if kind not in self._rates:
            if self.of_all is None:
                self._rates[kind] = _Rate()
            else:
                of_all = self.of_all._rate(kind)
                share = self.of_all.measured(kind)
                self._rates[kind] = _Rate(share, skipped=of_all.skipped, longer=of_all.longer)
        return self._rates[kind]

    def measured(self, kind: Hashable) -> float:
        """Return the share of accepted tokens among those that were tried."""
        rate = self._rate(kind)
        return rate.accepted / rate.tried

    def chance(self, kind: Hashable, source: Source = LOOKUP) -> float:
        """Return the chance that a draft is planned by, at least the hope after its rest."""
        rate = self._rate(kind)
        rested = rate.skipped >= rate.rest(source)
        return max(self.measured(kind), source.hope if rested else 0.0)

    def rests(self, kind: Hashable, source: Source) -> bool:
        """Return True if drafts are hopeless until the end of their rest."""
        rate = self._rate(kind)
        return rate.accepted < HOPELESS * rate.tried and rate.skipped < rate.rest(source)

    def skip(self, kind: Hashable, steps: int = 1) -> None:
        """Note that a draft was there and was not tried, for a number of steps."""
        self._rate(kind).skipped += steps
        if self.of_all is not None:
            self.of_all.skip(kind, steps)

    def note(self, kind: Hashable, accepted: int, refused: int, source: Source = LOOKUP) -> None:
        """Note how many tokens of a draft were accepted, and whether one was refused."""
        rate = self._rate(kind)
        rest = rate.rest(source)
        rested, rate.skipped = rate.skipped >= rest, 0
        if accepted and not rested:
            rate.longer = 1
        elif rested and rest < LONGEST_REST:
            rate.longer *= 2
        kept = min(source.remembered / rate.tried, 1.0)
        rate.accepted, rate.tried = rate.accepted * kept + accepted, rate.tried * kept
        rate.tried += accepted + refused
        if self.of_all is not None:
            self.of_all.note(kind, accepted, refused, source)


def draft_lengths(
    costs: StepCosts,
    rows: int,
    chances: Sequence[float],
    most: Sequence[int],
    room: int,
    drafting: float = 0.0,
    at_all: float = 0.0,
    loss: float = inf,
) -> list[int]:
    """Return how many tokens to draft for each row that may: the most new tokens a second.

    The step has ``rows`` in all, and room for ``room`` drafted tokens. A row's first drafted token
    is accepted by its chance, each further one by its chance again; ``most`` bounds its draft. The
    tokens of a step are a power of two, so that few sizes are captured. ``drafting`` are the
    seconds of one more token of all drafts, ``at_all`` those of any draft. Without any token
    accepted, the step takes at most ``loss`` seconds more than a plain one.
    """
    counts, best = [0] * len(chances), [0] * len(chances)
    values, expected = list(chances), float(rows)
    plain = costs.of(rows)
    most_rate = LEAST_GAIN * rows / plain
    for total in range(1, room + 1):
        open_rows = [i for i, count in enumerate(counts) if count < most[i]]
        if not open_rows:
            break
        row = max(open_rows, key=lambda i: values[i])
        expected += values[row]
        values[row] *= chances[row]
        counts[row] += 1
        tokens = rows + total
        if tokens & (tokens - 1):
            continue
        seconds = costs.of(tokens) + at_all + drafting * max(counts)
        if seconds - plain <= loss and expected / seconds > most_rate:
            most_rate, best = expected / seconds, list(counts)
    return best
