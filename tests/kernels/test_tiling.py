"""Tilings of products of few tokens, on every GPU and in every published size."""

from __future__ import annotations

import pytest
import torch

from lfm2_fast.kernels import tiling
from lfm2_fast.kernels.tiling import Tiling, choose_tiling, default_tiling

# Hidden size, feed-forward size and rows of qkv of the published sizes.
SIZES = [(1024, 4608, 2048), (1536, 6912, 2560), (2048, 8192, 3072), (2048, 10752, 3072)]
PROCESSORS = [56, 78, 108, 114, 132, 148, 160, 188]


def shapes(hidden: int, inner: int, qkv: int) -> list[tuple[int, int, int, bool]]:
    """Outputs, columns and parts of a layer's matrices, and whether the tokens are normed."""
    return [
        (hidden, hidden, 3, True),
        (qkv, hidden, 1, True),
        (inner, hidden, 2, True),
        (hidden, hidden, 1, False),
        (hidden, inner, 1, False),
    ]


@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_one_resident_wave_that_all_share(processors, bits) -> None:
    for hidden, inner, qkv in SIZES:
        for rows, columns, parts, normed in (*shapes(hidden, inner, qkv), (65536, hidden, 1, True)):
            chosen = default_tiling(rows, columns, parts, bits, processors, normed=normed)
            tile = chosen.block_n * parts * chosen.block_k * bits // 8
            each = -(-chosen.programs // processors)
            tiles = -(-rows // chosen.block_n)
            rounds = -(-tiles // chosen.programs)
            assert tile <= 128 * 32 * chosen.warps
            assert each * chosen.warps <= 16 and each * tile * chosen.depth <= 32768
            assert chosen.programs <= tiles
            busy = rows / (processors * each * rounds * chosen.block_n)
            padded = -(-columns // chosen.block_k) * chosen.block_k / columns
            assert busy > 0.5 and padded <= 4 / 3, (rows, columns, chosen)


# Bytes that should be in flight on each processor. In int4 issuing takes longer than loading.
WANTED = {16: 23000, 8: 23000, 4: 7900}


@pytest.mark.parametrize("bits", WANTED)
def test_enough_bytes_are_in_flight_on_hopper(bits) -> None:
    """At least WANTED, or the whole weight. The 700M's rows divide badly: three quarters of it."""
    for hidden, inner, qkv in SIZES:
        wanted = WANTED[bits] * (0.75 if hidden == 1536 else 1)
        for rows, columns, parts, normed in shapes(hidden, inner, qkv):
            chosen = default_tiling(rows, columns, parts, bits, 132, normed=normed)
            tile = chosen.block_n * parts * chosen.block_k * bits // 8
            least = min(wanted, 0.9 * rows * columns * parts * bits / 8 / 132)
            assert chosen.programs * tile * chosen.depth / 132 > least, (rows, columns, chosen)


def test_odd_sizes() -> None:
    assert default_tiling(1, 1, 1, 16, 132, normed=True) == Tiling(8, 128, 4, 1)
    assert default_tiling(3, 20000, 3, 16, 132, normed=True).programs == 2


def test_the_table_comes_first(monkeypatch) -> None:
    weight = torch.empty(300, 64, dtype=torch.float16)
    monkeypatch.setattr(tiling, "chip", lambda device: ("a GPU", 132))
    rule = choose_tiling("norm_linear", weight)
    assert rule == default_tiling(300, 64, 1, 16, 132, normed=True)
    monkeypatch.setattr(tiling, "TUNED", {"a GPU": {("norm_linear", 300, 64): (8, 64, 2, 38, 1)}})
    assert choose_tiling("norm_linear", weight) == Tiling(8, 64, 2, 38)
    assert choose_tiling("head_argmax", weight) == rule
    for bits, other in ((8, weight.char()), (32, weight.float())):
        by_rule = default_tiling(300, 64, 1, bits, 132, normed=True)
        assert choose_tiling("norm_linear", other) == by_rule
