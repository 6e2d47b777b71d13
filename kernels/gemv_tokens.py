"""Tokens of a product of few tokens: their columns in the order of a weight's words, and norms."""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def token_columns(STEPS: tl.constexpr, BITS: tl.constexpr, WARPS: tl.constexpr, EACH: tl.constexpr):
    """Columns ``[1, steps, parts, WARPS, 1, 4, EACH]`` of what a weight's words stand for.

    In int4 a step of a warp is a group, and the parts are its halves.
    """
    MANY: tl.constexpr = 8 if BITS == 4 else 128 // BITS
    APART: tl.constexpr = 16 if BITS == 4 else EACH
    NEXT: tl.constexpr = EACH if BITS == 4 else MANY
    column = tl.arange(0, STEPS)[None, :, None, None, None, None, None] * (4 * MANY * WARPS)
    column += tl.arange(0, MANY // EACH)[None, None, :, None, None, None, None] * APART
    column += tl.arange(0, WARPS)[None, None, None, :, None, None, None] * (4 * MANY)
    column += tl.arange(0, 4)[None, None, None, None, None, :, None] * NEXT
    return column + tl.arange(0, EACH)[None, None, None, None, None, None, :]


@triton.constexpr_function
def at_once(dtype: Any, bits: int) -> int:
    """Numbers of a token that a thread loads at once: 16 bytes, or a quarter of half a group."""
    return 4 if bits == 4 else 128 // dtype.primitive_bitwidth


@triton.jit
def normed(x, norm, scales, BITS: tl.constexpr):
    """Return tokens ``[2, steps, parts, WARPS, 8, 4, EACH]``, scaled and then weighted.

    ``norm`` has the weights of the columns, and ``scales`` are ``inverse_rms``. Both products are
    rounded. Beside an int8 weight a register holds two columns that are two apart, so even and odd
    ones are computed apart.
    """
    if BITS == 8:
        even_x, odd_x = tl.split(_in_twos(x))
        even, odd = tl.split(_in_twos(norm))
        x_pairs = tl.join(_weighted(even_x, even, scales), _weighted(odd_x, odd, scales))
        return tl.reshape(x_pairs, x.shape)
    else:
        return _weighted(x, norm, scales)


@triton.jit
def _in_twos(x):
    S: tl.constexpr = x.shape
    return tl.reshape(x, [S[0], S[1], S[2], S[3], S[4], S[5], S[6] // 2, 2])


@triton.jit
def _weighted(x, norm, scales):
    DTYPE: tl.constexpr = x.dtype
    unit = (_widened(x) * scales).to(DTYPE)
    return (unit.to(tl.float32) * norm.to(tl.float32)).to(DTYPE)


@triton.jit
def _widened(x):
    """Return ``x`` in float32."""
    if x.dtype == tl.bfloat16:
        # By its bits: the compiler would take a second instruction for every other number.
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)
