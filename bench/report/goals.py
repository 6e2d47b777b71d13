"""Targets on a CPU, as ratios between two engines' figures of one run; verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.report.markdown import markdown, number
from bench.report.results import Figure
from bench.report.stats import ratio

OURS, INT8, INT4 = "lfm2_fast", "lfm2_fast int8", "lfm2_fast int4"
Q4_K_M = "lfm2_fast Q4_K_M"
THEIRS = "transformers"


@dataclass(frozen=True)
class Goal:
    """``ours`` over ``peer`` in the figure ``name``; less is better where the unit says so.

    Without a peer, the figure itself is what counts.
    """

    what: str
    name: str
    ours: str
    peer: str | None
    must: float
    aim: float


GOALS = (
    Goal("decode against Hugging Face bf16", "decode", OURS, THEIRS, 2.2, 2.6),
    Goal("decode against llama.cpp BF16", "decode", OURS, "llama.cpp BF16", 0.95, 1.05),
    Goal("prefill 512 against Hugging Face bf16", "prefill 512", OURS, THEIRS, 1.0, 1.2),
    Goal("decode at batch 8 against Hugging Face", "decode, batch 8", OURS, THEIRS, 1.5, 2.0),
    Goal("decode after 8k against llama.cpp", "decode after 8k", OURS, "llama.cpp BF16", 1.0, 1.2),
    Goal("seconds that import adds to torch's", "import", OURS, None, 1.0, 0.1),
    Goal("decode int8 against llama.cpp Q8_0", "decode", INT8, "llama.cpp Q8_0", 1.15, 1.4),
    Goal("decode int8 against our bf16", "decode", INT8, OURS, 1.5, 1.9),
    Goal("prefill 512 int8 against llama.cpp Q8_0", "prefill 512", INT8, "llama.cpp Q8_0", 2.5, 4),
    Goal("memory after load, int8 against bf16", "memory after load", INT8, OURS, 0.6, 0.52),
    Goal("decode int4 against llama.cpp Q4_0", "decode", INT4, "llama.cpp Q4_0", 1.1, 1.25),
    Goal("prefill 512 int4 against llama.cpp Q4_0", "prefill 512", INT4, "llama.cpp Q4_0", 2, 2.5),
    Goal("decode after 8k int4 against Q4_0", "decode after 8k", INT4, "llama.cpp Q4_0", 1.3, 1.8),
    Goal(
        "decode at batch 8, int4 against Q4_0", "decode, batch 8", INT4, "llama.cpp Q4_0", 1.3, 1.8
    ),
    Goal("decode a Q4_K_M file against llama.cpp", "decode", Q4_K_M, "llama.cpp Q4_K_M", 1.0, 1.15),
    Goal("memory after load, int4 against bf16", "memory after load", INT4, OURS, 0.36, 0.33),
)

# Goals that hold at 1.2B's shape, and of int8 before the formats in groups came and after.
INT4_AT_1_2B = Goal("decode int4 against Q4_0, 1.2B", "decode", INT4, "llama.cpp Q4_0", 1.03, 1.08)
INT8_AS_BEFORE = Goal(
    "decode int8 against an older commit", "decode", f"after, {INT8}", f"before, {INT8}", 0.99, 1.0
)


@dataclass(frozen=True)
class Verdict:
    """Goal with its measured value."""

    what: str
    must: float
    aim: float
    value: float
    low: float
    high: float
    reached: str


def judged(
    what: str,
    must: float,
    aim: float,
    measured: tuple[float, float, float],
    *,
    more_is_better: bool,
) -> Verdict:
    """Return the verdict on a value and its range."""
    reached = "no"
    for name, mark in (("must", must), ("aim", aim)):
        if measured[0] >= mark if more_is_better else measured[0] <= mark:
            reached = name
    return Verdict(what, must, aim, *measured, reached)


def verdicts(figures: Sequence[Figure], goals: Sequence[Goal] = GOALS) -> list[Verdict]:
    """Return verdicts on these figures. Goals of engines that did not run are left out."""
    known = {(figure.engine, figure.name): figure for figure in figures}
    found = []
    for goal in goals:
        mine = known.get((goal.ours, goal.name))
        peer = known.get((goal.peer, goal.name)) if goal.peer else None
        if mine is None or (goal.peer and peer is None):
            continue
        if peer is None:
            value = mine.median, min(mine.samples), max(mine.samples)
        else:
            paired = len(mine.samples) == len(peer.samples)
            value = ratio(mine.samples, peer.samples, paired=paired)
        more = mine.more_is_better
        found.append(judged(goal.what, goal.must, goal.aim, value, more_is_better=more))
    return found


def goal_table(found: Sequence[Verdict], what: str = "ratio of medians") -> str:
    """Table of targets and results."""
    rows = [
        [
            v.what,
            f"{number(v.value)} [{number(v.low)}, {number(v.high)}]",
            f"{v.must:,g}",
            f"{v.aim:,g}",
            v.reached,
        ]
        for v in found
    ]
    return markdown([what, "measured", "must", "aim", "reached"], rows)
