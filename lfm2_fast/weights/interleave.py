"""Memory order of matrices in groups: eight rows side by side, so that a lane is a row.

A tensor ``[N, C]`` is cut into units of a few bytes. With interleaved rows, unit 0 of eight rows
comes first, then unit 1 of all eight, and so on; then the next eight rows. The last ``N % 8`` rows
are interleaved with each other. The shape stays ``[N, C]``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

LANES = 8
# Bytes that are moved at once: few enough to stay in the caches.
BLOCK = 1 << 20
# An integer type of each unit's size, used to move it.
UNITS = {2: torch.int16, 4: torch.int32}


def interleave(part: torch.Tensor, unit: int) -> None:
    """Interleave the rows of ``part [N, C]`` in place, in units of ``unit`` bytes."""
    for rows, lanes in _blocks(part, unit):
        tiles = rows.view(-1, lanes, rows.shape[1])
        rows.copy_(tiles.transpose(1, 2).contiguous().view(rows.shape))


def rows_of(part: torch.Tensor, unit: int) -> torch.Tensor:
    """Return a copy of interleaved ``part [N, C]``, row after row."""
    made = torch.empty_like(part)
    for (rows, lanes), (to, _) in zip(_blocks(part, unit), _blocks(made, unit), strict=True):
        to.copy_(rows.view(-1, rows.shape[1], lanes).transpose(1, 2).reshape(rows.shape))
    return made


def take_rows(part: torch.Tensor, unit: int, places: torch.Tensor) -> torch.Tensor:
    """Return the rows at ``places [n]`` of interleaved ``part [N, C]``."""
    units = part.view(UNITS[unit])
    count, width = units.shape
    first = places - places % LANES
    lanes = (count - first).clamp(max=LANES)
    steps = torch.arange(width, device=part.device)
    at = (first * width + places % LANES)[:, None] + steps * lanes[:, None]
    # index_select can be recorded as part of a step; an index in brackets cannot.
    return units.flatten().index_select(0, at.flatten()).view(at.shape).view(part.dtype)


def _blocks(part: torch.Tensor, unit: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield some rows ``[n, units]`` at a time, and how many of them are interleaved."""
    units = part.view(UNITS[unit])
    count, width = units.shape
    whole = count - count % LANES
    step = LANES * max(1, BLOCK // max(1, LANES * width * unit))
    for first in range(0, whole, step):
        yield units[first : min(first + step, whole)], LANES
    if whole < count:
        yield units[whole:], count - whole
