"""The kernel that begins a decode step, against those of its two halves."""

from __future__ import annotations

import pytest
import torch

from lfm2_fast.kernels.embed import embed_triton
from lfm2_fast.kernels.embed_rope import embed_rope_triton
from lfm2_fast.kernels.rope import rope_triton
from lfm2_fast.weights.formats import INT8

pytestmark = pytest.mark.usefixtures("grid_order")


@pytest.mark.parametrize(("width", "half"), [(1, 32), (96, 1), (1500, 12)])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "int8"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_it_gives_the_bits_of_both(
    width, half, quantized, own, kernel_dtype, kernel_device, framed, intact, traced, same_bits
) -> None:
    """Frequencies of all tokens, or of each; nothing around the rows is touched."""
    torch.manual_seed(0)
    tokens = torch.tensor([36, 0, 5, 5, 17], device=kernel_device)
    positions = torch.tensor([0, 3, 100, 127_999, 7], device=kernel_device)
    weight, scale = torch.randn(37, width, dtype=kernel_dtype, device=kernel_device), None
    if quantized:
        weight, scale = INT8.quantize(weight.float())
    inv_freq = torch.rand(*[5] * own, half, device=kernel_device)
    blank = torch.full((5, width), float("nan"), dtype=kernel_dtype, device=kernel_device)
    ours, theirs = framed(blank), blank.clone()
    angles = torch.full((2, 2, 5, half), float("nan"), device=kernel_device)
    reads = [tokens, positions, weight, inv_freq, *[scale] * quantized]
    with traced(reads, [ours, angles[0]]):
        embed_rope_triton(tokens, weight, scale, ours, positions, inv_freq, *angles[0], by=1.3)
    embed_triton(tokens, weight, scale, theirs)
    rope_triton(positions, inv_freq, *angles[1], scale=1.3)
    assert same_bits(ours, theirs) and intact(ours) and same_bits(*angles)


def test_no_tokens(kernel_device) -> None:
    none = torch.empty(0, dtype=torch.int64, device=kernel_device)
    angles = torch.empty(2, 0, 32, device=kernel_device)
    weight, out = torch.ones(9, 32, device=kernel_device), none.new_empty(0, 32).float()
    frequencies = torch.ones(32, device=kernel_device)
    embed_rope_triton(none, weight, None, out, none, frequencies, *angles)
