"""Eight rows side by side: where each unit lies, and the way back."""

from __future__ import annotations

import pytest
import torch

from lfm2_fast.weights import interleave as module
from lfm2_fast.weights.interleave import interleave, rows_of, take_rows


@pytest.mark.parametrize("unit", [2, 4])
@pytest.mark.parametrize("rows", [0, 1, 8, 27, 64])
@pytest.mark.parametrize("width", [16, 24, 32])
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_units_are_where_lanes_read_them(monkeypatch, unit, rows, width, block) -> None:
    """Eight rows of eight units too: their transpose has the same shape."""
    monkeypatch.setattr(module, "BLOCK", block)
    plain = torch.randint(256, (rows, width), dtype=torch.uint8)
    mixed = plain.clone()
    interleave(mixed, unit)
    raw, at = mixed.flatten().tolist(), 0
    for first in range(0, rows, 8):
        lanes = range(first, min(first + 8, rows))
        for k in range(width // unit):
            for row in lanes:
                assert raw[at : at + unit] == plain[row, k * unit : (k + 1) * unit].tolist()
                at += unit
    assert torch.equal(rows_of(mixed, unit), plain)
    if rows:
        places = torch.tensor([rows - 1, 0, rows // 2, rows - 1])
        assert torch.equal(take_rows(mixed, unit, places), plain[places])
