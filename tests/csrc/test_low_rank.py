"""Products that adapters add for a few tokens, in C++ beside the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lfm2_fast.ops.low_rank import low_rank_ref
from lfm2_fast.ops.native_library import why_not
from lfm2_fast.weights.adapter_stack import AdapterStack

pytestmark = pytest.mark.skipif(
    why_not(torch.device("cpu")) is not None, reason="the extension is not built"
)


def random_stack(entries: int, rank: int, parts: tuple[int, ...], columns: int) -> AdapterStack:
    like = torch.empty(0, dtype=torch.float64)
    stack = AdapterStack.empty(entries, rank, parts, columns, is_table=False, like=like)
    for each in (stack.down, stack.up, stack.gain, stack.shift):
        each[1:] = torch.randn(each[1:].shape, dtype=torch.float64) * 0.3
    # One of less than the largest rank.
    stack.down[-1, :, rank // 2 :] = stack.up[-1, rank // 2 :] = 0
    return stack


@pytest.mark.parametrize(
    ("tokens", "rank", "parts", "columns"),
    [(1, 8, (70, 3, 130), 96), (5, 16, (65,), 131), (32, 5, (40, 40), 16), (0, 8, (4,), 8)],
)
def test_low_rank(
    tokens: int,
    rank: int,
    parts: tuple[int, ...],
    columns: int,
    dtype: torch.dtype,
    threads: None,
    within_budget: Callable,
) -> None:
    torch.manual_seed(tokens + rank)
    stack = random_stack(4, rank, parts, columns).apply(lambda each: each.to(dtype))
    wide = stack.apply(lambda each: each.double())
    # Sliced tensors; tokens of every entry, and of none.
    x = torch.randn(tokens, columns + 3).to(dtype)[:, :columns]
    product = torch.randn(tokens, sum(parts) + 1).to(dtype)[:, :-1]
    entries, bias = torch.arange(tokens) % 4, torch.randn(sum(parts)).to(dtype)
    for own in (None, bias):
        out = torch.empty(tokens, sum(parts) + 1, dtype=dtype)[:, :-1].copy_(product)
        changes = stack.down, stack.up, stack.gain, stack.shift, stack.ends
        torch.ops.lfm2_fast.low_rank_native(x, entries, *changes, own, out)
        exact_bias = None if own is None else own.double()
        exact = low_rank_ref(x.double(), product.double(), entries, wide, exact_bias)
        within_budget(out, exact, low_rank_ref(x, product, entries, stack, own), by_row=True)
        assert torch.equal(out[entries == 0], product[entries == 0])
        for row in range(tokens):  # the bits of a row do not depend on the others
            alone = product[row : row + 1].clone()
            at = slice(row, row + 1)
            torch.ops.lfm2_fast.low_rank_native(x[at], entries[at], *changes, own, alone)
            assert torch.equal(alone, out[at])


def test_a_missing_entry_is_refused() -> None:
    stack = random_stack(2, 8, (4,), 8).apply(lambda each: each.float())
    changes = stack.down, stack.up, stack.gain, stack.shift, stack.ends
    x, out = torch.zeros(1, 8), torch.zeros(1, 4)
    for entry in (2, -1):
        with pytest.raises(RuntimeError, match="entries has"):
            torch.ops.lfm2_fast.low_rank_native(x, torch.tensor([entry]), *changes, None, out)
