"""Low-rank changes of rows with different adapters, against their meaning."""

from __future__ import annotations

import pytest
import torch

from lfm2_fast.kernels.low_rank import low_rank_triton, low_shape
from lfm2_fast.ops.low_rank import low_rank_ref
from lfm2_fast.ops.reference import rms_norm_ref
from lfm2_fast.weights.adapter_stack import AdapterStack

# Entries of tokens: of every adapter and of none, in one tile of 16 and in two.
ENTRIES = [0, 2, 1, 0, 3, 3, 1]


def stack_of(parts: tuple[int, ...], columns: int, rank: int, like: torch.Tensor) -> AdapterStack:
    """Four entries, the first of zeros; the second has a smaller rank, the last no product."""
    stack = AdapterStack.empty(4, rank, parts, columns, is_table=False, like=like)
    for part in (stack.down, stack.up, stack.gain, stack.shift):
        part[1:] = torch.randn(part[1:].shape).to(like)
    stack.down /= columns**0.5
    stack.down[2, :, 1:] = 0
    stack.up[3] = 0
    return stack


@pytest.mark.parametrize(
    ("parts", "columns", "rank", "tokens"), [((40, 8, 80), 40, 8, 7), ((24,), 600, 24, 18)]
)
def test_against_the_meaning(
    parts, columns, rank, tokens, kernel_device, kernel_dtype, within_budget, same_bits
) -> None:
    """Tokens without an adapter do not change, and other tokens change no bit."""
    torch.manual_seed(0)
    like = torch.empty(0, dtype=kernel_dtype, device=kernel_device)
    stack = stack_of(parts, columns, rank, like)
    entries = torch.tensor((ENTRIES * 3)[:tokens], device=kernel_device)
    x, product = (torch.randn(tokens, n).to(like) for n in (columns, sum(parts)))
    bias = torch.randn(sum(parts)).to(like) if len(parts) > 1 else None

    def changed(rows: slice) -> torch.Tensor:
        own, out = entries[rows].contiguous(), product[rows].clone()
        shape = low_shape(len(own), columns, rank * len(parts))
        low = torch.full(shape, float("nan"), device=kernel_device)
        numbers = stack.down, stack.up, stack.gain, stack.shift
        low_rank_triton(x[rows], own, *numbers, parts, bias, out, low)
        return out

    wide = stack.apply(lambda part: part.double())
    exact_bias = None if bias is None else bias.double()
    exact = low_rank_ref(x.double(), product.double(), entries, wide, exact_bias)
    found = changed(slice(tokens))
    within_budget(found, exact, low_rank_ref(x, product, entries, stack, bias))
    assert same_bits(found[entries == 0], product[entries == 0])
    assert same_bits(changed(slice(5, 6)), found[5:6])


@pytest.mark.parametrize(("columns", "tokens"), [(40, 7), (600, 18)])
def test_norm_before_and_sum_after(
    columns, tokens, kernel_device, kernel_dtype, within_budget, same_bits
) -> None:
    """The tokens are normed, and all are added to the residual, those without an adapter too."""
    torch.manual_seed(0)
    like, parts = torch.empty(0, dtype=kernel_dtype, device=kernel_device), (24,)
    stack = stack_of(parts, columns, 8, like)
    entries = torch.tensor((ENTRIES * 3)[:tokens], device=kernel_device)
    # Rows apart, and of different sizes.
    x = (torch.randn(tokens, columns + 3) * torch.logspace(-2, 1, tokens)[:, None]).to(like)[:, 3:]
    product, residual = (torch.randn(tokens, n).to(like) for n in (24, 31))
    residual, norm = residual[:, :24], torch.randn(columns).to(like)
    numbers = stack.down, stack.up, stack.gain, stack.shift

    def changed(rows: slice) -> torch.Tensor:
        own, out = entries[rows].contiguous(), product[rows].clone()
        low = torch.full(low_shape(len(own), columns, 8), float("nan"), device=kernel_device)
        given = {"norm": norm, "eps": 1e-5, "residual": residual[rows]}
        low_rank_triton(x[rows], own, *numbers, parts, None, out, low, **given)
        return out

    def meant(x, product, residual, norm, stack) -> torch.Tensor:
        normed = rms_norm_ref(x, norm, 1e-5)
        return residual + low_rank_ref(normed, product, entries, stack, None)

    wide = stack.apply(lambda part: part.double())
    exact = meant(*(each.double() for each in (x, product, residual, norm)), wide)
    found = changed(slice(tokens))
    within_budget(found, exact, meant(x, product, residual, norm, stack))
    others = entries == 0
    assert same_bits(found[others], (residual + product)[others])
    assert same_bits(changed(slice(5, 6)), found[5:6])
