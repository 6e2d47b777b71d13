"""Tilings measured on GPUs, by torch's name for a GPU; ``tiling.py`` has the rule for others.

A GPU's entry maps ``(operation, N, K)`` of a 16-bit weight to ``(BLOCK_N, BLOCK_K, warps,
programs)``. The table is written by ``bench/gpu/tune.py`` (``make tune-gpu``); what it lacks goes
by the rule.
"""

Tuned = dict[tuple[str, int, int], tuple[int, int, int, int]]

TUNED: dict[str, Tuned] = {}
