"""How the products of few tokens are shared out, on every GPU and in every published size."""

from __future__ import annotations

import pytest
import torch

from lfm2_fast.kernels import tiling
from lfm2_fast.kernels.tiling import Tiling, choose_tiling, default_tiling

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
            most = tiling.INT8_TILE_BYTES if element_size == 1 else tiling.TILE_BYTES
            chosen = default_tiling(rows, row_bytes, processors, most)
            tile = chosen.block_n * row_bytes
            each = -(-chosen.programs // processors)
            tiles = -(-rows // chosen.block_n)
            rounds = -(-tiles // chosen.programs)
            assert chosen.block_n == 1 or tile <= most
            assert each * chosen.warps <= 16 and each * min(tile, tiling.TILE_BYTES) <= 32768
            assert chosen.programs <= tiles
            assert rows / (processors * each * rounds * chosen.block_n) > 0.66, (rows, chosen)


def test_odd_sizes() -> None:
    assert default_tiling(1, 2, 132) == Tiling(1, 4, 1)
    assert default_tiling(3, 40000, 132) == Tiling(1, 8, 3)


def test_the_table_comes_first(monkeypatch) -> None:
    weight = torch.empty(300, 64)
    monkeypatch.setattr(tiling, "chip", lambda device: ("a GPU", 132))
    rule = choose_tiling("norm_linear", 300, weight, 64)
    assert rule == default_tiling(300, 256, 132)
    monkeypatch.setattr(tiling, "TUNED", {"a GPU": {("norm_linear", 300, 64): (8, 2, 38)}})
    assert choose_tiling("norm_linear", 300, weight, 64) == Tiling(8, 2, 38)
    assert choose_tiling("head_argmax", 300, weight, 64) == rule
    by_bytes = default_tiling(300, 64, 132, tiling.INT8_TILE_BYTES)
    assert choose_tiling("norm_linear", 300, weight.char(), 64) == by_bytes
