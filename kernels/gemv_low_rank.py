"""Low-rank changes of adapters, added inside of the kernels of few tokens.

A launch before has made ``low [splits, T, P R]`` of T tokens, P parts of the rows and R ranks
(low_rank.py). A kernel adds ``gain * (product - bias) + up.T @ low + shift`` of each token's entry
to its rows of the product, right after the multiplication. So the change costs no second launch.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Ranks of all parts together that one tile has.
MOST_RANKS = 64


class Change(NamedTuple):
    """Numbers of a projection's change, by the names of low_rank.py; at most three parts."""

    entries: torch.Tensor
    low: torch.Tensor
    up: torch.Tensor
    gain: torch.Tensor
    shift: torch.Tensor
    bias: torch.Tensor | None
    parts: tuple[int, ...]


def change_arguments(change: Change | None) -> dict[str, Any]:
    """Return the arguments of a kernel that adds ``change``, or that adds none."""
    if change is None:
        return {"change": None, "RANK": 0, "SPLITS": 0, "STACKED": 0}
    entries, low, up, gain, shift, bias, parts = change
    rank, rows = up.shape[1:]
    assert gain.shape == shift.shape == (len(up), rows) and sum(parts) == rows
    assert 0 < rank * len(parts) <= MOST_RANKS and len(parts) <= 3
    assert low.shape[1:] == (len(entries), rank * len(parts)) and low.dtype == torch.float32
    assert bias is None or bias.shape == (rows,)
    assert all(each.is_contiguous() for each in (entries, low, up, gain, shift))
    ends = parts[0], sum(parts[:2])
    return {
        "change": (entries, low, up, gain, shift, bias, *ends),
        "RANK": rank,
        "SPLITS": len(low),
        "STACKED": len(parts),
    }


@triton.jit
def low_of_tokens(change, tokens, RANK: tl.constexpr, SPLITS: tl.constexpr, STACKED: tl.constexpr):
    """Entries ``[16]`` of the tokens, and ``down @ x`` ``[16, ranks of all parts]``."""
    RANKS: tl.constexpr = STACKED * RANK
    BLOCK_R: tl.constexpr = max(16, triton.next_power_of_2(RANKS))
    token, rank = tl.arange(0, 16), tl.arange(0, BLOCK_R)[None, :]
    entry = tl.load(change[0] + token, mask=token < tokens, other=0)
    low = tl.zeros([16, BLOCK_R], tl.float32)
    mask = (token < tokens)[:, None] & (rank < RANKS)
    for split in tl.static_range(SPLITS):
        at = (split * tokens + token)[:, None] * RANKS + rank
        low += tl.load(change[1] + at, mask=mask, other=0)
    return entry, low.to(change[2].dtype.element_ty)


@triton.jit
def with_change(
    product,
    change,
    entry,
    low,
    first,
    count,
    RANK: tl.constexpr,
    STACKED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return ``product [16, rows]`` of ``multiply`` with the tokens' changes, rounded as it is."""
    DTYPE: tl.constexpr = change[2].dtype.element_ty
    ROWS: tl.constexpr = product.shape[1]
    n, rank = tl.arange(0, ROWS), tl.arange(0, low.shape[1])[:, None]
    row = n // BLOCK_N * count + first + n % BLOCK_N
    is_row = (first + n % BLOCK_N < count) & (n < PARTS * BLOCK_N)
    part = (row >= change[6]).to(tl.int32) * (STACKED > 1)
    part += (row >= change[7]).to(tl.int32) * (STACKED > 2)
    # Rows of a part take that part's ranks alone.
    mask = (rank // RANK == part[None, :]) & (rank < STACKED * RANK) & is_row[None, :]
    width = count * PARTS
    delta = tl.zeros([16, ROWS], tl.float32)
    of_all = tl.max(entry, axis=0)
    while of_all > 0:
        up_ptrs = change[2] + (of_all * RANK + rank % RANK) * width + row[None, :]
        made = tl.dot(low, tl.load(up_ptrs, mask=mask, other=0), input_precision="ieee")
        delta = tl.where((entry == of_all)[:, None], made, delta)
        of_all = tl.max(tl.where(entry < of_all, entry, 0), axis=0)
    has = (entry > 0)[:, None] & is_row[None, :]
    at = entry[:, None] * width + row[None, :]
    gain = tl.load(change[3] + at, mask=has, other=0).to(tl.float32)
    delta += tl.load(change[4] + at, mask=has, other=0).to(tl.float32)
    plain = product
    if change[5] is not None:
        plain -= tl.load(change[5] + row, mask=is_row, other=0).to(tl.float32)[None, :]
    changed = (product + (gain * plain + delta)).to(DTYPE).to(tl.float32)
    return tl.where(has, changed, product)
