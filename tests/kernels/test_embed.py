"""The kernel that takes the tokens' rows of the embedding, against the reference."""

from __future__ import annotations

import pytest
import torch

from lfm2_fast.kernels.embed import embed_triton
from lfm2_fast.weights.formats import INT8

pytestmark = pytest.mark.usefixtures("grid_order")


@pytest.mark.parametrize("width", [1, 96, 1500])
@pytest.mark.parametrize("tokens", [[36], [0, 36, 5, 5, 17], list(range(36, 0, -1))], ids=len)
def test_rows_are_moved(
    tokens, width, kernel_dtype, kernel_device, framed, intact, traced, same_bits
) -> None:
    """A token may stand more than once; nothing around the weight and the rows is touched."""
    at = torch.tensor(tokens, device=kernel_device)
    weight = torch.randn(37, width, dtype=kernel_dtype, device=kernel_device)
    out = framed(torch.full_like(weight[at], float("nan")))
    with traced([at, weight], [out]):
        embed_triton(at, weight, None, out)
    assert same_bits(out, weight[at]) and intact(out)


@pytest.mark.parametrize("width", [1, 96, 1500])
def test_int8_rows_are_scaled(
    width, kernel_dtype, kernel_device, framed, intact, traced, same_bits
) -> None:
    """Products are bit-identical: two numbers multiplied in float32, rounded once."""
    at = torch.tensor([36, 0, 5, 5, 17], device=kernel_device)
    weight, scale = INT8.quantize(torch.randn(37, width, device=kernel_device))
    out = framed(torch.full((5, width), float("nan"), dtype=kernel_dtype, device=kernel_device))
    with traced([at, weight, scale], [out]):
        embed_triton(at, weight, scale, out)
    assert same_bits(out, INT8.dequantize((weight[at], scale[at]), kernel_dtype)) and intact(out)


def test_a_matrix_is_widened(
    kernel_dtype, kernel_device, framed, intact, traced, same_bits
) -> None:
    """All its rows, in their order: what products of more than a few tokens read."""
    weight, scale = INT8.quantize(torch.randn(37, 96, device=kernel_device))
    out = framed(torch.full((37, 96), float("nan"), dtype=kernel_dtype, device=kernel_device))
    with traced([weight, scale], [out]):
        embed_triton(None, weight, scale, out)
    assert same_bits(out, INT8.dequantize((weight, scale), kernel_dtype)) and intact(out)


def test_no_tokens(kernel_device) -> None:
    none = torch.empty(0, dtype=torch.int64, device=kernel_device)
    embed_triton(none, torch.ones(9, 32, device=kernel_device), None, none.new_empty(0, 32).float())
