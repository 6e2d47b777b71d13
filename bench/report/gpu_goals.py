"""Targets for a GPU, judged from the result files of bench.gpu.decode and bench.gpu.peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.report.goals import OURS, Verdict, judged
from bench.report.results import Figure
from bench.report.stats import ratio
from bench.shapes import SIZES

COMPILED = "transformers compiled"
Range = tuple[float, float, float]


@dataclass(frozen=True)
class GpuGoal:
    """``find`` gives the value and its range from both files, or None where it was not measured."""

    what: str
    must: float
    aim: float
    find: Callable[[dict[str, Any], list[Figure]], Range | None]
    more_is_better: bool = True


def share(size: str, context: int) -> Callable[[dict[str, Any], list[Figure]], Range | None]:
    """Percent of the copy's bandwidth at which a step's bytes are read; from p90 to p10."""

    def find(gpu: dict[str, Any], peers: list[Figure]) -> Range | None:
        row = cell(gpu, "decode", size, f"context {context}")
        if row is None:
            return None
        least = row["nbytes"] / gpu["copy_gb_s"] / 1e3  # microseconds
        us = row["us"]
        return tuple(100 * least / us[q] for q in ("p50", "p90", "p10"))

    return find


def against_compiled(size: str) -> Callable[[dict[str, Any], list[Figure]], Range | None]:
    """Factor over the speed of Hugging Face with its static cache, compiled."""

    def find(gpu: dict[str, Any], peers: list[Figure]) -> Range | None:
        known = {f.engine: f for f in peers if f.name == f"decode {size}"}
        if OURS not in known or COMPILED not in known:
            return None
        return ratio(known[COMPILED].samples, known[OURS].samples, paired=True)

    return find


def slower(what: str, size: str) -> Callable[[dict[str, Any], list[Figure]], Range | None]:
    """Percent that the first of a comparison's two is slower than the second."""

    def find(gpu: dict[str, Any], peers: list[Figure]) -> Range | None:
        row = cell(gpu, what, size)
        if row is None:
            return None
        return tuple(100 * (x - 1) for x in (row["ratio"], *row["interval"]))

    return find


def prefill(size: str) -> Callable[[dict[str, Any], list[Figure]], Range | None]:
    """Rate of a long prompt, in percent of a large product's rate."""

    def find(gpu: dict[str, Any], peers: list[Figure]) -> Range | None:
        row = cell(gpu, "prefill", size)
        if row is None:
            return None
        least = row["flops"] / gpu["matmul_tflops"] / 1e6  # microseconds
        return tuple(100 * least / row["us"][q] for q in ("p50", "p90", "p10"))

    return find


def first_token(gpu: dict[str, Any], peers: list[Figure]) -> Range | None:
    row = cell(gpu, "first token", "1.2B", "128 tokens")
    if row is None:
        return None
    us = row["us"]
    return tuple(row["over_floor"] * us[q] / us["p50"] for q in ("p50", "p10", "p90"))


def batch(gpu: dict[str, Any], peers: list[Figure]) -> Range | None:
    row = cell(gpu, "batch", "1.2B", "64")
    return None if row is None else tuple(64e6 / row["us"][q] for q in ("p50", "p90", "p10"))


def int8(gpu: dict[str, Any], peers: list[Figure]) -> Range | None:
    row = cell(gpu, "int8", "2.6B")
    return None if row is None else (row["ratio"], *row["interval"])


def cell(gpu: dict[str, Any], *names: str) -> dict[str, Any] | None:
    """Measurement under these names; None where it was not."""
    found: Any = gpu
    for name in names:
        found = found.get(name, {}) if isinstance(found, dict) else {}
    return found if isinstance(found, dict) and found else None


LEAST_SHARES = {"2.6B": (78, 90), "1.2B": (72, 88), "700M": (62, 82), "350M": (48, 75)}
TIMES = {"350M": (2.5, 4), "1.2B": (2, 3), "2.6B": (1.7, 2.3)}
GOALS = (
    *(GpuGoal(f"{s}, % of the copy", *goals, share(s, 128)) for s, goals in LEAST_SHARES.items()),
    *(
        GpuGoal(f"{s}, times Hugging Face compiled", *goals, against_compiled(s))
        for s, goals in TIMES.items()
    ),
    *(
        GpuGoal(f"{s}, % slower when sampling", 3, 1, slower("sampled", s), more_is_better=False)
        for s in SIZES
    ),
    *(GpuGoal(f"{s}, % of the copy at 32k", 65, 85, share(s, 32768)) for s in SIZES),
    *(GpuGoal(f"{s}, % of a matmul in prefill 8k", 50, 70, prefill(s)) for s in SIZES),
    GpuGoal("1.2B, first token of 128, over its floor", 3, 1.5, first_token, more_is_better=False),
    GpuGoal("1.2B, tokens/s at batch 64", 20000, 35000, batch),
    GpuGoal("2.6B, int8's time over bf16's", 0.65, 0.55, int8, more_is_better=False),
)


def verdicts(gpu: dict[str, Any], peers: list[Figure]) -> list[Verdict]:
    """Verdicts from a file of each kind, either of which may be empty."""
    found = []
    for goal in GOALS:
        measured = goal.find(gpu, peers)
        if measured is not None:
            more = goal.more_is_better
            found.append(judged(goal.what, goal.must, goal.aim, measured, more_is_better=more))
    return found
