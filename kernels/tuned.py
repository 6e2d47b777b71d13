"""Plans measured on GPUs, by the name that torch gives a GPU; ``plan.py`` has the rule for others.

A GPU's entry maps ``(operation, N, K)`` to ``(BLOCK_N, warps, programs)``.
"""

Tuned = dict[tuple[str, int, int], tuple[int, int, int]]

TUNED: dict[str, Tuned] = {}
