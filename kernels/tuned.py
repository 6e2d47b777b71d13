"""Tilings measured on GPUs, by torch's name for a GPU; ``tiling.py`` has the rule for others.

A GPU's entry maps ``(operation, N, K)`` of a 16-bit weight to ``(BLOCK_N, BLOCK_K, warps,
programs, depth)``. ``bench/gpu/tune.py`` (``make tune-gpu``) writes the table. The rule covers the
rest.
"""

Tuned = dict[tuple[str, int, int], tuple[int, int, int, int, int]]

TUNED: dict[str, Tuned] = {}
