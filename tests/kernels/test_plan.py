"""How the products of few tokens are shared out, on every GPU and in every published size."""

from __future__ import annotations

import pytest
import torch

from lfm2_fast.kernels import plan
from lfm2_fast.kernels.plan import Plan, choose_plan, default_plan

# Hidden size, feed-forward size and rows of qkv of the published sizes.
SIZES = [(1024, 4608, 2048), (1536, 6912, 2560), (2048, 8192, 3072), (2048, 10752, 3072)]
PROCESSORS = [56, 78, 108, 114, 132, 148, 160, 188]


@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("element_size", [1, 2, 4])
def test_one_resident_wave_that_all_share(processors, element_size) -> None:
    for hidden, inner, qkv in SIZES:
        row = 2 ** (hidden - 1).bit_length() * element_size
        for rows, row_bytes in (
            (hidden, 3 * row),
            (qkv, row),
            (inner, 2 * row),
            (hidden, 1024 * element_size),
            (65536, row),
        ):
            most = plan.INT8_TILE_BYTES if element_size == 1 else plan.TILE_BYTES
            chosen = default_plan(rows, row_bytes, processors, most)
            tile = chosen.block_n * row_bytes
            each = -(-chosen.programs // processors)
            tiles = -(-rows // chosen.block_n)
            rounds = -(-tiles // chosen.programs)
            assert chosen.block_n == 1 or tile <= most
            assert each * chosen.warps <= 16 and each * min(tile, plan.TILE_BYTES) <= 32768
            assert chosen.programs <= tiles
            assert rows / (processors * each * rounds * chosen.block_n) > 0.66, (rows, chosen)


def test_odd_sizes() -> None:
    assert default_plan(1, 2, 132) == Plan(1, 4, 1)
    assert default_plan(3, 40000, 132) == Plan(1, 8, 3)


def test_the_table_comes_first(monkeypatch) -> None:
    weight = torch.empty(300, 64)
    monkeypatch.setattr(plan, "chip", lambda device: ("a GPU", 132))
    rule = choose_plan("norm_linear", 300, weight, 64)
    assert rule == default_plan(300, 256, 132)
    monkeypatch.setattr(plan, "TUNED", {"a GPU": {("norm_linear", 300, 64): (8, 2, 38)}})
    assert choose_plan("norm_linear", 300, weight, 64) == Plan(8, 2, 38)
    assert choose_plan("head_argmax", 300, weight, 64) == rule
    by_bytes = default_plan(300, 64, 132, plan.INT8_TILE_BYTES)
    assert choose_plan("norm_linear", 300, weight.char(), 64) == by_bytes
