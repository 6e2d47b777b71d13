"""Length of drafts: as long as they pay, and never so that a text loses more than 3 percent."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import inf

import pytest

from lfm2_fast.engine.draft_length import (
    ANOTHER_MODEL,
    LOOKUP,
    Acceptance,
    Budget,
    Source,
    StepCosts,
    draft_lengths,
)

# Steps of several tokens in plain steps, by their tokens: after a few tokens, and after thousands.
CHEAP, DEAR = {1: 1.0, 2: 1.12, 4: 1.27, 8: 1.54}, {1: 1.0, 2: 1.2, 4: 1.5, 8: 2.0}
TOKENS = 1000
# How many of some drafted tokens are right, at a place of a text; and the kind of draft there.
Right = Callable[[int, int], int]
Kind = Callable[[int], int]


def speed(
    right: Right,
    kind: Kind = lambda at: 1,
    *,
    costs: dict[int, float] = CHEAP,
    row: int = TOKENS,
    slow: int = 0,
    period: int = 0,
    bounded: bool = True,
    source: Source = LOOKUP,
    drafting: float = 0.0,
) -> float:
    """Speed of an engine's texts, each of ``row`` tokens, beside that without drafts.

    A drafted token costs ``drafting`` of a plain step. The first two steps of a size take a step
    more, in which they are recorded. Measured times are up to a tenth wrong. Those of the first
    ``slow`` steps are far too long: the processor was busy.
    """
    known, of_all, budget, draw = StepCosts(warm=2), Acceptance(), Budget(), random.Random(1)
    acceptance, at, lost, seen = Acceptance(of_all), 0, 0.0, dict.fromkeys(costs, 0)
    while at < TOKENS:
        if at % row == 0:
            acceptance = Acceptance(of_all)
        plain, chance = known.of(1), acceptance.chance(kind(at), source)
        loss = budget.left * plain if bounded else inf
        may = known.knows(1) and sum(seen.values()) >= slow
        most = 7 if may and not (bounded and budget.asks_for_plain) else 0
        cost = drafting * plain
        count = draft_lengths(known, 1, [chance], [most], 7, cost, loss=loss)[0]
        steps = sum(seen.values())
        is_slow = steps < slow or (period and steps // period % 2)
        speed = draw.uniform(0.9, 1.1) * (1.3 if is_slow else 1.0)
        seen[1 + count] += 1
        took = costs[1 + count] + (1 if count and seen[1 + count] <= 2 else 0)
        told, accepted = known.add(1 + count, took * speed) + count * cost, 0
        took += count * drafting
        if count:
            accepted = min(right(at, count), count)
            acceptance.note(kind(at), accepted, int(accepted < count), source)
            budget.note(told / plain, 1 + accepted)
        else:
            acceptance.skip(kind(at))
        budget.count_step(verified=count > 0)
        # A row ends at its limit, in the middle of a draft too.
        written = min(1 + accepted, row - at % row)
        at, lost = at + written, lost + took - written
    return TOKENS / (TOKENS + lost)


PATTERNS: dict[str, tuple[Right, Kind]] = {
    "never": (lambda at, n: 0, lambda at: 1),
    "never, of any kind": (lambda at, n: 0, lambda at: at % 6),
    "short ones alone": (lambda at, n: 1 if n == 1 else 0, lambda at: at % 3),
    "bait": (lambda at, n: int(at % 16 < 2), lambda at: 1),
    "one of nine": (lambda at, n: int(at % 9 == 0), lambda at: 1),
    "first half": (lambda at, n: 7 if at < TOKENS // 2 else 0, lambda at: 1),
}


@pytest.mark.parametrize("costs", [CHEAP, DEAR], ids=["cheap", "dear"])
@pytest.mark.parametrize("row", [25, TOKENS])
@pytest.mark.parametrize("name", PATTERNS)
def test_no_text_loses_more_than_3_percent(name: str, row: int, costs: dict[int, float]) -> None:
    right, kind = PATTERNS[name]
    for slow, period in ((0, 0), (8, 0), (0, 60)):
        assert speed(right, kind, costs=costs, row=row, slow=slow, period=period) > 0.97


def test_a_text_would_lose_more_without_budget_and_plain_steps() -> None:
    """Drafts seem to cost nothing beside the plain steps that a busy processor took at first."""
    right, kind = PATTERNS["never, of any kind"]
    found = [speed(right, kind, slow=8, bounded=bounded) for bounded in (True, False)]
    assert found[0] > 0.97 and found[1] < 0.9


def test_a_text_that_repeats_itself_keeps_its_gain() -> None:
    """Four of five tokens are copied, in runs. Longer matches are of other kinds."""

    def kind(at: int) -> int:
        return min(at % 40, 16).bit_length() if at % 40 < 32 else at * 7 % 3

    for costs, least in ((CHEAP, 2.4), (DEAR, 1.9)):
        found, unbounded = (
            speed(lambda at, n: max(32 - at % 40, 0), kind, costs=costs, bounded=bounded)
            for bounded in (True, False)
        )
        assert found > least and found > 0.95 * unbounded


@pytest.mark.parametrize("seed", range(8))
def test_an_assistant_that_is_mostly_right_gains_from_the_beginning(seed: int) -> None:
    """Four of five drafted tokens are right, and each costs a tenth of a step."""
    draw = random.Random(seed)
    agrees = [draw.random() < 0.8 for _ in range(2 * TOKENS)]

    def right(at: int, count: int) -> int:
        return next(n for n in range(count + 1) if n == count or not agrees[at + n])

    assert speed(right, costs=CHEAP, source=ANOTHER_MODEL, drafting=0.1) > 1.5


def test_drafts_are_as_long_as_they_pay() -> None:
    costs = StepCosts(warm=0)
    for tokens, seconds in 3 * ((1, 1.0), (2, 1.15), (8, 2.0), (16, 4.0)):
        costs.add(tokens, seconds)
    lengths = [draft_lengths(costs, 1, [chance], [15], 15)[0] for chance in (0.05, 0.3, 0.7, 0.95)]
    assert lengths == [0, 1, 3, 7]
    # What is slower with more tokens, as plain PyTorch is, is never worth it.
    dear = StepCosts(warm=0)
    for tokens, seconds in 3 * ((1, 1.0), (2, 2.0)):
        dear.add(tokens, seconds)
    assert draft_lengths(dear, 1, [0.99], [7], 15) == [0]
    # Two rows share what is left of the step's tokens; the likelier gets more.
    assert draft_lengths(costs, 2, [0.9, 0.6], [7, 7], 6) == [5, 1]
    # An assistant that costs half a step drafts nothing that is worth it.
    assert draft_lengths(costs, 1, [0.6], [7], 7, drafting=0.6) == [0]


def test_a_kind_that_loses_is_left_and_tried_again() -> None:
    acceptance, costs, tried = Acceptance(), StepCosts(warm=0), []
    costs.add(1, 1.0)
    costs.add(2, 1.15)
    for step in range(2000):
        if draft_lengths(costs, 1, [acceptance.chance(3)], [7], 7)[0]:
            acceptance.note(3, 0, 1)
            tried.append(step)
        else:
            acceptance.skip(3)
    # The worst case: its drafts cost 15 percent of a step each.
    assert len(tried) * 0.15 / 2000 < 0.03 and len([at for at in tried if at > 500]) >= 2
    while not acceptance.chance(3) >= 0.5:
        acceptance.skip(3)
    acceptance.note(3, 7, 0)
    assert draft_lengths(costs, 1, [acceptance.chance(3)], [7], 7)[0] > 0


def test_a_step_that_is_recorded_uses_up_no_budget() -> None:
    """Later steps of its size take less, so the estimate decides."""
    costs = StepCosts(warm=1)
    costs.add(1, 5.0)
    costs.add(1, 1.0)
    estimate = costs.of(2)
    assert costs.add(2, 9.0) == estimate < 1.5
    assert [costs.add(2, 1.3) for _ in range(3)] == [1.3] * 3 and costs.of(2) == 1.3


def test_one_slow_step_does_not_end_all_drafts() -> None:
    """A size is timed a few times before its times are believed."""
    costs = StepCosts(warm=0)
    for tokens, seconds in ((1, 1.0), (1, 1.0), (1, 1.0), (2, 1.1), (4, 3.0)):
        costs.add(tokens, seconds)
    assert draft_lengths(costs, 1, [0.9], [3], 3) == [3]
    for _ in range(2):
        costs.add(4, 3.0)
    assert costs.of(4) == 3.0 and draft_lengths(costs, 1, [0.9], [3], 3) == [1]


def test_another_model_that_is_never_right_rests_longer() -> None:
    def trials(source: Source) -> int:
        acceptance, tried = Acceptance(), 0
        for _ in range(512):
            if acceptance.chance(0, source) >= 0.5:
                acceptance.note(0, 0, 1, source)
                tried += 1
            else:
                acceptance.skip(0)
        return tried

    assert trials(LOOKUP) == 6 and trials(ANOTHER_MODEL) == 4


def test_hopeless_drafts_rest_and_come_back() -> None:
    acceptance = Acceptance()
    acceptance.note(0, 0, 1, ANOTHER_MODEL)
    assert not acceptance.rests(0, ANOTHER_MODEL)  # one refusal says little
    for _ in range(3):
        acceptance.note(0, 0, 1, ANOTHER_MODEL)
    rested = 0
    while acceptance.rests(0, ANOTHER_MODEL):
        acceptance.skip(0)
        rested += 1
    assert rested == 64 and acceptance.chance(0, ANOTHER_MODEL) == ANOTHER_MODEL.hope


def test_short_texts_try_again_what_an_earlier_one_refused() -> None:
    """The rest goes on from text to text: most answers are shorter than it."""
    of_all, tried = Acceptance(), []
    for step in range(200):
        if step % 25 == 0:
            own = Acceptance(of_all)
        if own.chance(0, ANOTHER_MODEL) >= 0.5:
            own.note(0, 0, 1, ANOTHER_MODEL)
            tried.append(step)
        else:
            own.skip(0)
    assert tried == [0, 65, 194]


def test_refusals_in_a_row_change_little_what_is_known_of_another_model() -> None:
    def measured(source: Source) -> float:
        acceptance = Acceptance()
        for _ in range(20):
            acceptance.note(0, 4, 1, source)
        for _ in range(3):
            acceptance.note(0, 0, 1, source)
        return acceptance.measured(0)

    assert measured(ANOTHER_MODEL) > 0.7 and measured(LOOKUP) < 0.6
