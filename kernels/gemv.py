"""Products of a few tokens and a weight: the shared parts of these kernels.

Tokens are padded to 16, which is the height of a tensor core's tile, and multiply eight or more
rows of the weight ``[N, K]`` at once. One token takes the instructions that sixteen take. A row's
place among the 16 and the other rows do not change its sums, so neither do they change its bits.

A thread loads 16 bytes of one row of the weight at a time, and they become its part of the tensor
core's operand without an exchange between threads. For this the order of K is changed, in the same
way for tokens and weight. Each warp has a share of every BLOCK_K columns, and the warps' sums are
added at the end of a row. `test_aot.py` counts the instructions: the compiler would turn another
order into shuffles. While a tile is in use, the next one is loading (``gemv_tiles.py``).

A weight of the tokens' dtype has no ``scale``. An int8 weight has ``scale [N]`` float32. The sum of
a row is multiplied by it in float32, so the integers are used directly (``gemv_int8.py``). An int4
weight is in the interleaved order of its format, eight rows side by side, with a float16 scale for
each 32 numbers of a row (``gemv_int4.py``). A kernel gets any of them as 32-bit words. Several
matrices of one shape, stacked, are multiplied together (``PARTS``).

The first tiles, like the taps, are loaded above ``pdl_wait`` (pdl.py), while the previous
kernel still runs. That is the gain of an early launch.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.gemv_int4 import int4_operand, natural_rows
from lfm2_fast.kernels.gemv_int8 import int8_numbers
from lfm2_fast.kernels.gemv_tiles import place, weight_tile
from lfm2_fast.kernels.gemv_tokens import at_once, normed, token_columns
from lfm2_fast.kernels.pdl import pdl_options
from lfm2_fast.kernels.tiling import Tiling, bits_of, least_columns, registers

# The rows of a tensor core's tile.
MOST_TOKENS = 16


@triton.jit
def _numbers(words, tokens, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Return the numbers of words ``[..., 16]`` as DTYPE, ``[..., 4, numbers in 16 bytes]``."""
    SHAPE: tl.constexpr = words.shape
    if BITS == 32:
        numbers = words.to(tl.float32, bitcast=True)
    elif BITS == 16:
        low = (words & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        numbers = tl.join(low, (words >> 16).to(tl.int16).to(DTYPE, bitcast=True))
    else:
        numbers = int8_numbers(words, tokens, DTYPE)
    return tl.reshape(numbers, [SHAPE[0], SHAPE[1], SHAPE[2], SHAPE[3], 4, 128 // BITS])


@triton.jit
def _weight_operand(tile, tokens, BITS: tl.constexpr, EACH: tl.constexpr, DTYPE: tl.constexpr):
    """Return a tile's numbers as ``[WARPS, K of a warp, rows]``."""
    if BITS == 4:
        return int4_operand(tile[0], tile[1], tokens, DTYPE)
    else:
        return _wider_operand(tile, tokens, BITS, EACH, DTYPE)


@triton.jit
def _wider_operand(words, tokens, BITS: tl.constexpr, EACH: tl.constexpr, DTYPE: tl.constexpr):
    S: tl.constexpr = words.shape
    # Of numbers narrower than the tokens' a thread's 16 bytes are several of EACH.
    shape: tl.constexpr = [S[0], S[1], S[2], 8, 4, 128 // BITS // EACH, EACH]
    numbers = tl.reshape(_numbers(words, tokens, BITS, DTYPE), shape)
    numbers = tl.permute(numbers, [0, 1, 5, 2, 3, 4, 6])
    return tl.permute(_operand(numbers, BITS), [0, 2, 1])


@triton.jit
def _operand(tile, BITS: tl.constexpr):
    """Return ``[rows / 8, steps, parts, WARPS, 8, 4, EACH]`` as ``[WARPS, rows, K of a warp]``.

    The order of K gives each of a row's four threads the numbers that the tensor core needs from
    it. With 16-bit numbers these are two adjacent words of one load.
    """
    S: tl.constexpr = tile.shape
    if BITS == 4:
        # Two numbers of a half group that int4's words have side by side are two columns apart.
        tile = tl.reshape(tile, [S[0], S[1], 2, S[3], 8, 4, 2, 2])
        tile = tl.permute(tile, [3, 0, 4, 1, 2, 5, 7, 6])
    elif S[6] == 8:
        tile = tl.reshape(tile, [S[0], S[1], S[2], S[3], 8, 4, 2, 2, 2])
        if BITS == 8:
            # As in int4, numbers that are side by side in a register are two columns apart.
            tile = tl.permute(tile, [3, 0, 4, 1, 2, 8, 5, 6, 7])
        else:
            tile = tl.permute(tile, [3, 0, 4, 1, 2, 7, 5, 6, 8])
    else:
        tile = tl.permute(tile, [3, 0, 4, 1, 2, 5, 6])
    return tl.reshape(tile, [S[3], S[0] * 8, S[1] * S[2] * 4 * S[6]])


@triton.jit
def _sum_of_warps(acc):
    """Return ``acc [WARPS, 16, rows]`` added over the warps, ``[16, rows]``.

    Halves of the warps are added at once. Numbers of a split are in one thread, so the compiler
    moves them there and back through shared memory. A sum over an axis would also use shuffles.
    """
    S: tl.constexpr = acc.shape
    if S[0] == 1:
        return tl.reshape(acc, [S[1], S[2]])
    else:
        halves = tl.reshape(acc, [2, S[0] // 2, S[1], S[2]])
        left, right = tl.split(tl.permute(halves, [1, 2, 3, 0]))
        return _sum_of_warps(left + right)


@triton.jit
def multiply(
    tiles,
    rows,
    words,
    columns,
    x_ptr,
    words_ptr,
    bias_ptr,
    scale_ptr,
    norm_ptr,
    scales,
    first,
    step,
    tokens,
    count,
    stride_x_t,
    K: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Return the tokens' projections to the tiles' rows, and the tiles ``step`` rows further on.

    ``[16, rows]`` in float32, rounded once as a number of the tokens' dtype is. ``tiles`` are
    DEPTH, the first of the rows from ``first`` on and what follows it. Where there is a norm, the
    tokens are normed, rounded where the reference rounds: scaled, then weighted. What stands in the
    rows beyond the tokens has no effect.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    EACH: tl.constexpr = at_once(DTYPE, BITS)
    STEPS: tl.constexpr = BLOCK_K // (least_columns(BITS) * WARPS)
    ROWS: tl.constexpr = BLOCK_N * triton.next_power_of_2(PARTS)
    token = tl.arange(0, 2)[:, None, None, None, None, None, None] * 8
    token += tl.arange(0, 8)[None, None, None, None, :, None, None]
    column = token_columns(STEPS, BITS, WARPS, EACH)
    # Rows beyond the tokens repeat the last: to read it again costs less than to mask it.
    x_ptrs = x_ptr + (tl.minimum(token, tokens - 1) * stride_x_t + column)
    # Of every thread's own columns: in another layout the norm would go through shared memory.
    mine = tl.broadcast_to(column, [1, STEPS, column.shape[2], WARPS, 8, 4, EACH])
    acc = tl.zeros([WARPS, 16, ROWS], tl.float32)
    for k in range(0, K, BLOCK_K):
        if DEPTH == 1:
            is_last = k + BLOCK_K >= K
            row, at = first + tl.where(is_last, step, 0), tl.where(is_last, 0, k + BLOCK_K)
        else:
            row, at = place(first, step, k + DEPTH * BLOCK_K, K, BLOCK_K)
        following = weight_tile(
            words_ptr, scale_ptr, rows, words, columns, row, count, at, K, BITS, BLOCK_K
        )  # fmt: skip
        if K % BLOCK_K == 0:
            x = tl.load(x_ptrs + k)
        else:
            x = tl.load(x_ptrs + k, mask=column < K - k, other=0)
        if norm_ptr is not None:
            norm = tl.load(norm_ptr + k + mine, mask=mine < K - k, other=0)
            x = normed(x, norm, scales, BITS)
        weight = _weight_operand(tiles[0], tokens, BITS, EACH, DTYPE)
        acc = tl.dot(_operand(x, BITS), weight, acc, input_precision="ieee")
        tiles = tiles[1:] + (following,)
    out = _sum_of_warps(acc)
    if BITS == 4:
        out = natural_rows(out)
    n = tl.arange(0, ROWS)
    row = n // BLOCK_N * count + first + n % BLOCK_N
    mask = (first + n % BLOCK_N < count) & (n < PARTS * BLOCK_N)
    if scale_ptr is not None and BITS != 4:
        out *= tl.load(scale_ptr + row, mask=mask, other=0)[None, :]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + row, mask=mask, other=0).to(tl.float32)[None, :]
    return out.to(DTYPE).to(tl.float32), tiles


def is_readable(weight: torch.Tensor, parts: int = 1) -> bool:
    """Return True if these kernels read a weight of ``parts`` stacked matrices.

    Each row must begin with a 32-bit word, and in int4 each part must have whole groups of eight
    rows. 31 bits must number the words: offsets of more cost registers.
    """
    if weight.nbytes >= 2**33:
        return False
    if weight.dtype == torch.uint8:
        return len(weight) % (8 * parts) == 0 and weight.shape[1] % 16 == 0
    return weight.shape[1] * weight.element_size() % 4 == 0


def launch(
    kernel: Any,
    tiling: Tiling,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    *,
    parts: int = 1,
    pdl: bool = False,
    **arguments: Any,
) -> None:
    """Launch a kernel of tokens ``x [T, K]`` and a weight of ``parts`` stacked matrices.

    ``arguments`` are the kernel's own. Rows of ``x`` may stand apart; the weight is dense. Nothing
    is launched for no tokens.
    """
    tokens, columns = x.shape
    assert tokens <= MOST_TOKENS and x.stride(1) == 1 and x.dtype != torch.float64
    bits = bits_of(weight)
    assert weight.shape[1] * 8 == columns * bits // weight.element_size()
    assert len(weight) % parts == 0 and weight.is_contiguous() and is_readable(weight, parts)
    assert bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous())
    assert bias is None or bias.dtype == x.dtype
    if scale is None:
        assert weight.dtype == x.dtype
    elif bits == 4:
        assert scale.shape == (len(weight), columns // 32) and scale.dtype == torch.float16
    else:
        assert scale.shape == weight.shape[:1] and scale.dtype == torch.float32
        assert weight.dtype == torch.int8
    assert scale is None or scale.is_contiguous()
    norm = arguments.get("norm_ptr")
    assert norm is None or (norm.shape == x.shape[1:] and norm.is_contiguous())
    assert norm is None or norm.dtype == x.dtype
    if tokens == 0:
        return
    rows = tiling.block_n * triton.next_power_of_2(parts)
    least = least_columns(bits) * tiling.warps
    assert tiling.block_k % least == 0, f"block_k must be a multiple of {least}, got {tiling}"
    assert rows % 8 == 0 and (bits > 4 or tiling.block_n % 8 == 0), f"too few rows in {tiling}"
    block_k = tiling.block_k
    if x.dtype == torch.float32:
        # These pass through shared memory, of which some GPUs have 99 kB for a program.
        fitting = 16384 // (16 + rows)
        block_k = max(least, min(block_k, 1 << (fitting.bit_length() - 1)))
    with torch.cuda.device_of(x):
        kernel[(tiling.programs,)](
            x_ptr=x,
            words_ptr=weight.view(torch.int32),
            bias_ptr=bias,
            scale_ptr=scale,
            tokens=tokens,
            count=len(weight) // parts,
            stride_x_t=x.stride(0),
            K=columns,
            BITS=bits,
            PARTS=parts,
            BLOCK_N=tiling.block_n,
            BLOCK_K=block_k,
            WARPS=tiling.warps,
            DEPTH=tiling.depth,
            num_warps=tiling.warps,
            # The loop over K is staged by hand, through registers.
            num_stages=1,
            maxnreg=registers(
                bits,
                parts,
                tiling,
                normed=norm is not None,
                changed=arguments.get("change") is not None,
            ),
            **arguments,
            **pdl_options(pdl),
        )
