"""Norms of a few tokens: what each is divided by, from the columns that a thread will multiply.

The sums of squares of 16-bit tokens are on the diagonal of ``x @ x.T``, by tensor cores: each
product of two 16-bit numbers is exact in float32. The two halves of a token's columns are two rows,
so that the sixteen rows are eight tokens. This takes 160 instructions for eight tokens of 2,048
columns, where sums of squares take 380.
"""

import triton
import triton.language as tl

from lfm2_fast.kernels.gemv_tokens import at_once, token_columns
from lfm2_fast.kernels.tiling import least_columns


@triton.jit
def inverse_rms(
    x_ptr,
    tokens,
    stride_x_t,
    eps,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
):
    """``1 / sqrt(mean(x^2) + eps)`` of each token, float32, ``[2, 1, 1, 1, 8, 1, 1]``.

    Eight tokens at a time. ``x [tokens, K]``, and ``BITS`` are the weight's.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    EACH: tl.constexpr = at_once(DTYPE, BITS)
    half = tl.arange(0, 2)[:, None, None, None, None, None, None]
    token = tl.arange(0, 8)[None, None, None, None, :, None, None]
    SUMS: tl.constexpr = DTYPE == tl.float32
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K if SUMS else 1
    EVERY: tl.constexpr = STEPS * BLOCK_K // (least_columns(BITS) * WARPS)
    column = token_columns(triton.next_power_of_2(EVERY), BITS, WARPS, EACH)
    scales = tl.zeros([2, 1, 1, 1, 8, 1, 1], tl.float32)
    for first in range(0, tokens, 8):
        x_ptrs = x_ptr + tl.minimum(first + token, tokens - 1) * stride_x_t + column
        if SUMS:
            squares = _squares_by_sums(x_ptrs, column, K)
        else:
            squares = _squares_by_products(x_ptrs, column, K, BLOCK_K, WARPS)
        scales = tl.where(half * 8 == first, tl.rsqrt(squares / K + eps), scales)
    return scales


@triton.jit
def _squares_by_products(
    x_ptrs, column, K: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr
):
    """Sums of the squares of eight 16-bit tokens ``[1, 1, 1, 1, 8, 1, 1]``."""
    # Two chains of products, each half as long.
    even = tl.zeros([WARPS, 16, 16], tl.float32)
    odd = tl.zeros([WARPS, 16, 16], tl.float32)
    for k in tl.static_range(0, K, BLOCK_K):
        if K - k >= BLOCK_K:
            x = tl.load(x_ptrs + k)
        else:
            x = tl.load(x_ptrs + k, mask=column < K - k, other=0)
        operand = _halves_operand(x)
        if k // BLOCK_K % 2 == 0:
            even = tl.dot(operand, tl.permute(operand, [0, 2, 1]), even)
        else:
            odd = tl.dot(operand, tl.permute(operand, [0, 2, 1]), odd)
    row = tl.arange(0, 16)
    is_own = row[None, :, None] == row[None, None, :]
    squares = tl.sum(tl.where(is_own, even + odd, 0.0), axis=2)
    squares = tl.sum(tl.sum(tl.reshape(squares, [WARPS, 2, 8]), axis=1), axis=0)
    return tl.reshape(squares, [1, 1, 1, 1, 8, 1, 1])


@triton.jit
def _halves_operand(x):
    """Return tokens ``[1, steps, parts, WARPS, 8, 4, EACH]`` as ``[WARPS, 16, half their K]``.

    The order of K is that in which a thread has loaded what tensor cores need from it, for both
    operands.
    """
    S: tl.constexpr = x.shape
    x = tl.reshape(x, [S[1], S[2], S[3], 8, 4, S[6] // 4, 2, 2])
    x = tl.permute(x, [2, 6, 3, 0, 1, 5, 4, 7])
    return tl.reshape(x, [S[3], 16, S[1] * S[2] * 2 * S[6]])


@triton.jit
def _squares_by_sums(x_ptrs, column, K: tl.constexpr):
    """Sums of the squares of eight tokens ``[1, 1, 1, 1, 8, 1, 1]``, one number after another."""
    x = tl.load(x_ptrs, mask=column < K, other=0).to(tl.float32)
    squares = tl.sum(tl.sum(x * x, axis=6, keep_dims=True), axis=1, keep_dims=True)
    squares = tl.sum(tl.sum(squares, axis=2, keep_dims=True), axis=5, keep_dims=True)
    return tl.sum(squares, axis=3, keep_dims=True)
