"""Ratios of medians, with their bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS = 4000


def ratio(a: Sequence[float], b: Sequence[float], *, paired: bool) -> tuple[float, float, float]:
    """``median(a) / median(b)`` and its 95 percent bootstrap interval.

    ``paired`` samples come from the same turns and are drawn together. So a turn in which both were
    slow does not widen the interval. (Efron and Tibshirani, 1993)
    """
    first, second = np.asarray(a), np.asarray(b)
    generator = np.random.default_rng(0)
    mine = generator.integers(len(first), size=(DRAWS, len(first)))
    if paired and len(first) != len(second):
        raise ValueError("paired samples must have the same number")
    theirs = mine if paired else generator.integers(len(second), size=(DRAWS, len(second)))
    ratios = np.median(first[mine], axis=1) / np.median(second[theirs], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(np.median(first) / np.median(second)), float(low), float(high)
