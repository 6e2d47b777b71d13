"""Low-rank changes of adapters, added to a product: tokens of several adapters in two launches.

T tokens, A entries, P parts of the rows, R ranks. ``x [T, K]``, ``entries [T]`` int64 from 0 to A -
1 (not checked); entry 0 changes nothing. ``down [A, P, R, K]``, ``up [A, R, N]``, ``gain, shift [A,
N]``, ``bias [N]`` or None. ``product [T, N]`` becomes ``product + gain * (product - bias) + up.T @
(down @ x) + shift`` of each token's entry, each part's rows by that part's ``down``. If there is a
``norm [K]``, x is normed first. If there is a ``residual [T, N]``, the product becomes the sum of
both, each rounded.

Sixteen tokens are a tile. The tile is multiplied by the matrices of every entry that it contains,
one after another. A token keeps the product of its own entry, so its bits depend on no other token.
The first launch writes ``low [splits, T, P R]`` float32, partial sums over parts of K. The second
adds them up. Entries are read on the device. The result is rounded once. Least bytes: the matrices
of the entries that occur.
"""

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.pdl import pdl_options, pdl_wait

TOKENS = 16
COLUMNS = 256
ROWS = 64


@triton.jit(do_not_specialize=["tokens"])
def _low_rank_down_kernel(
    x_ptr,
    norm_ptr,
    entries_ptr,
    down_ptr,
    low_ptr,
    eps,
    tokens,
    stride_x_t,
    K: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl_wait(PDL)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    is_token = token < tokens
    entry = tl.load(entries_ptr + token, mask=is_token, other=0)
    x_ptr += token.to(tl.int64)[:, None] * stride_x_t
    x = tl.load(x_ptr + k[None, :], mask=is_token[:, None] & (k < K)[None, :], other=0)
    if norm_ptr is not None:
        # Every program sums the squares of all columns again: a launch would cost more.
        squares = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
        for first in tl.static_range(0, K, BLOCK_K):
            column = first + tl.arange(0, BLOCK_K)[None, :]
            some = tl.load(x_ptr + column, mask=is_token[:, None] & (column < K), other=0)
            squares += some.to(tl.float32) * some.to(tl.float32)
        # Rounded as for the projection itself: scaled, then weighted.
        scale = tl.rsqrt(tl.sum(squares, axis=1) / K + eps)
        unit = (x.to(tl.float32) * scale[:, None]).to(x.dtype)
        norm = tl.load(norm_ptr + k, mask=k < K, other=0).to(tl.float32)
        x = (unit.to(tl.float32) * norm[None, :]).to(x.dtype)
    low = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    mask = (k < K)[:, None] & (rank < RANKS)[None, :]
    current = tl.max(entry, axis=0)
    while current > 0:
        down_ptrs = down_ptr + (current * RANKS + rank)[None, :] * K + k[:, None]
        down = tl.load(down_ptrs, mask=mask, other=0)
        made = tl.dot(x, down, input_precision="ieee")
        low = tl.where((entry == current)[:, None], made, low)
        current = tl.max(tl.where(entry < current, entry, 0), axis=0)
    row = tl.program_id(2).to(tl.int64) * tokens + token
    mask = is_token[:, None] & (rank < RANKS)[None, :]
    tl.store(low_ptr + row[:, None] * RANKS + rank[None, :], low, mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _low_rank_up_kernel(
    low_ptr,
    entries_ptr,
    up_ptr,
    gain_ptr,
    shift_ptr,
    bias_ptr,
    residual_ptr,
    product_ptr,
    tokens,
    first_end,
    second_end,
    stride_residual_t,
    N: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl_wait(PDL)
    part = tl.program_id(2)
    begin = tl.where(part == 0, 0, tl.where(part == 1, first_end, second_end))
    end = tl.where(part == PARTS - 1, N, tl.where(part == 0, first_end, second_end))
    n = begin + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (n < end)[None, :]
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    rank = tl.arange(0, BLOCK_R)
    is_token, is_rank = (token < tokens)[:, None], rank < RANK
    entry = tl.load(entries_ptr + token, mask=token < tokens, other=0)
    low = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    low_ptrs = low_ptr + (token.to(tl.int64) * PARTS + part)[:, None] * RANK + rank[None, :]
    for split in range(SPLITS):
        at = tokens.to(tl.int64) * split * (PARTS * RANK)
        low += tl.load(low_ptrs + at, mask=is_token & is_rank[None, :], other=0)
    low = low.to(up_ptr.dtype.element_ty)
    delta = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    current = tl.max(entry, axis=0)
    while current > 0:
        up_ptrs = up_ptr + (current * RANK + rank)[:, None] * N + n[None, :]
        up = tl.load(up_ptrs, mask=is_rank[:, None] & mask_n, other=0)
        made = tl.dot(low, up, input_precision="ieee")
        delta = tl.where((entry == current)[:, None], made, delta)
        current = tl.max(tl.where(entry < current, entry, 0), axis=0)
    mask = is_token & mask_n & (entry > 0)[:, None]
    at = entry[:, None] * N + n[None, :]
    gain = tl.load(gain_ptr + at, mask=mask, other=0).to(tl.float32)
    delta += tl.load(shift_ptr + at, mask=mask, other=0).to(tl.float32)
    product_ptrs = product_ptr + token.to(tl.int64)[:, None] * N + n[None, :]
    if residual_ptr is not None:
        # Tokens without an adapter are added too.
        mask = is_token & mask_n
    product = tl.load(product_ptrs, mask=mask, other=0).to(tl.float32)
    plain = product
    if bias_ptr is not None:
        plain -= tl.load(bias_ptr + n, mask=n < end, other=0).to(tl.float32)[None, :]
    out = tl.where((entry > 0)[:, None], product + (gain * plain + delta), product)
    out = out.to(product_ptr.dtype.element_ty)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + token.to(tl.int64)[:, None] * stride_residual_t + n[None, :]
        residual = tl.load(residual_ptrs, mask=mask, other=0).to(tl.float32)
        out = (residual + out.to(tl.float32)).to(product_ptr.dtype.element_ty)
    tl.store(product_ptrs, out, mask=mask)


def low_rank_triton(
    x: torch.Tensor,
    entries: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    gain: torch.Tensor,
    shift: torch.Tensor,
    parts: tuple[int, ...],
    bias: torch.Tensor | None,
    product: torch.Tensor,
    low: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Add to ``product``; ``parts`` has the rows of each part, at most three; ``low`` is scratch.

    Rows of ``x`` and ``residual`` may stand apart. ``pdl``: as in norm_linear.py.
    """
    tokens, columns = x.shape
    count, rows = down.shape[0], product.shape[1]
    rank, ranks = down.shape[2], len(parts) * down.shape[2]
    assert down.shape == (count, len(parts), rank, columns) and up.shape == (count, rank, rows)
    assert gain.shape == shift.shape == (count, rows) and sum(parts) == rows and len(parts) <= 3
    assert entries.shape == (tokens,) and entries.dtype == torch.int64
    assert product.shape == (tokens, rows) and x.stride(1) == 1
    assert low.shape == low_shape(tokens, columns, ranks) and low.dtype == torch.float32
    assert bias is None or bias.shape == (rows,)
    assert norm is None or (norm.shape == (columns,) and norm.is_contiguous())
    assert residual is None or (residual.shape == product.shape and residual.stride(1) == 1)
    for dense in (entries, down, up, gain, shift, product, low):
        assert dense.is_contiguous()
    for part in (down, up, gain, shift, product, bias, norm, residual):
        assert part is None or part.dtype == x.dtype
    if tokens == 0:
        return
    tiles, ends = triton.cdiv(tokens, TOKENS), [parts[0], sum(parts[:2])]
    if rank:
        low_rank_down_triton(x, entries, down, low, norm=norm, eps=eps, pdl=pdl)
    with torch.cuda.device_of(x):
        _low_rank_up_kernel[(tiles, triton.cdiv(max(parts), ROWS), len(parts))](
            low,
            entries,
            up,
            gain,
            shift,
            bias,
            residual,
            product,
            tokens,
            *ends,
            0 if residual is None else residual.stride(0),
            N=rows,
            RANK=rank,
            PARTS=len(parts),
            SPLITS=len(low),
            BLOCK_T=TOKENS,
            BLOCK_R=max(triton.next_power_of_2(rank), 16),
            BLOCK_N=ROWS,
            num_warps=4,
            **pdl_options(pdl),
        )


def low_rank_down_triton(
    x: torch.Tensor,
    entries: torch.Tensor,
    down: torch.Tensor,
    low: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    pdl: bool = False,
) -> None:
    """Fill ``low`` with the first products alone, of at least one token and one rank."""
    tokens, columns = x.shape
    ranks = down.shape[1] * down.shape[2]
    assert down.shape[3] == columns and x.stride(1) == 1 and entries.shape == (tokens,)
    assert low.shape == low_shape(tokens, columns, ranks) and low.dtype == torch.float32
    block_k = min(max(triton.next_power_of_2(columns), 16), COLUMNS)
    tiles = triton.cdiv(tokens, TOKENS)
    with torch.cuda.device_of(x):
        _low_rank_down_kernel[(tiles, triton.cdiv(ranks, 16), len(low))](
            x,
            norm,
            entries,
            down,
            low,
            eps,
            tokens,
            x.stride(0),
            K=columns,
            RANKS=ranks,
            BLOCK_T=TOKENS,
            BLOCK_R=16,
            BLOCK_K=block_k,
            num_warps=4,
            **pdl_options(pdl),
        )


def low_shape(tokens: int, columns: int, ranks: int) -> tuple[int, int, int]:
    """Return the shape of the scratch for ``ranks`` of all parts together."""
    return triton.cdiv(columns, COLUMNS), tokens, ranks
