"""Tiles of an int4 weight, for products of a few tokens: their order, and how they become numbers.

A weight is in the interleaved order of format ``INT4``: ``weight [N, K / 2]`` bytes and ``scale [N,
K / 32]`` float16. Eight rows are side by side: word ``j`` of each, then word ``j + 1`` of each.
Scales have the same order. A group of 32 numbers has one scale, and a word has 8 of them. Columns
``4 q`` to ``4 q + 3`` are in the lower halves of its bytes, those 16 further on in the upper ones.

A step of a warp is one group of every row. Of 32 rows a thread loads word ``q`` of four rows, which
are 16 bytes, and their scales. Of 16 or 8 rows it loads 8 or 4 bytes. A warp's load has whole lines
of 128 bytes in any case. The words become the tensor core's operand without an exchange, for rows
in another order. ``natural_rows`` undoes it in the sums.

Bits become numbers two at a time, as the last bits of 128 or 1024. A number is multiplied by its
scale, which is rounded to the tokens' dtype first, and the product is rounded.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _rows_of_thread(rows: int) -> int:
    """Rows of which a thread loads a word at once, of a tile of ``rows``."""
    return min(rows // 8, 4)


@triton.jit
def int4_places(
    count,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Rows, places of words and scales, and columns of a tile, as ``weight_places`` returns them.

    ``[rows / 8 / B, steps, WARPS, 8, 4 B]`` for B rows a thread. Of eight rows the first one's
    number stands for each, and columns are counted in words.
    """
    ROWS: tl.constexpr = BLOCK_N * triton.next_power_of_2(PARTS)
    B: tl.constexpr = _rows_of_thread(ROWS)
    n = tl.arange(0, 8)[None, None, None, :, None]
    last = tl.arange(0, 4 * B)[None, None, None, None, :]
    eight = tl.arange(0, ROWS // 8 // B)[:, None, None, None, None] * B
    if B == 1:
        # Of neighbours in memory the compiler would load several with one thread.
        lane = n % 4 * 2 + n // 4
    else:
        eight += n // (8 // B)
        lane = n % (8 // B) * B + last % B
    part, eight = eight // (BLOCK_N // 8), eight % (BLOCK_N // 8)
    group = tl.arange(0, BLOCK_K // (32 * WARPS))[None, :, None, None, None] * WARPS
    group += tl.arange(0, WARPS)[None, None, :, None, None]
    columns = group * 4 + last // B
    of_all = eight + part * (count // 8)
    rows = eight * 8
    if ROWS != PARTS * BLOCK_N:
        rows = tl.where(part < PARTS, rows, count)
    return rows, (of_all * K + columns * 8 + lane, of_all * (K // 4) + group * 8 + lane), columns


@triton.jit
def int4_tile(
    words_ptr,
    scale_ptr,
    rows,
    places,
    columns,
    first,
    count,
    k,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Words of the rows from ``first`` and the columns from ``k`` on, and a scale for each."""
    mask = rows < count - first
    if K % BLOCK_K != 0:
        mask = mask & (columns < K // 8 - k // 8)
    words_ptrs = words_ptr + (first // 8 * K + k) + places[0]
    # Each thread loads its own: in another layout they would go through shared memory.
    scale_ptrs = scale_ptr + (first // 8 * (K // 4) + k // 4)
    scale_ptrs += tl.broadcast_to(places[1], places[0].shape)
    mask = tl.broadcast_to(mask, places[0].shape)
    words = tl.load(words_ptrs, mask=mask, other=0, eviction_policy="evict_first")
    return words, tl.load(scale_ptrs, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def _pairs(words, tokens, NUMBER: tl.constexpr, DTYPE: tl.constexpr):
    """Return numbers NUMBER and NUMBER + 4 of each word, ``[..., 2]`` in DTYPE."""
    if DTYPE == tl.float32:
        low, high = (words >> (4 * NUMBER)) & 15, (words >> (4 * NUMBER + 16)) & 15
        return tl.join(low, high).to(tl.float32) - 8
    else:
        OFFSET: tl.constexpr = 1024 if DTYPE == tl.float16 else 128
        # The bits of OFFSET in both halves of a word. There always are tokens: the assembler would
        # take two instructions for two numbers that it knows, and takes one with a register.
        BITS: tl.constexpr = 0x64006400 if DTYPE == tl.float16 else 0x43004300
        both = ((words >> (4 * NUMBER)) & 0x000F000F) | tl.where(tokens > 0, BITS, 0)
        low = (both & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        high = (both >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        return tl.join(low, high) - (OFFSET + 8)


@triton.jit
def int4_operand(words, scales, tokens, DTYPE: tl.constexpr):
    """Return a tile's numbers, times their scales, as ``[WARPS, K of a warp, rows]``."""
    S: tl.constexpr = words.shape
    lower = tl.join(_pairs(words, tokens, 0, DTYPE), _pairs(words, tokens, 2, DTYPE))
    upper = tl.join(_pairs(words, tokens, 1, DTYPE), _pairs(words, tokens, 3, DTYPE))
    numbers = tl.join(lower, upper) * scales.to(DTYPE)[:, :, :, :, :, None, None, None]
    numbers = tl.reshape(numbers, [S[0], S[1], S[2], 8, 4, S[4] // 4, 2, 2, 2])
    numbers = tl.permute(numbers, [2, 0, 5, 3, 1, 8, 4, 7, 6])
    numbers = tl.reshape(numbers, [S[2], S[0] * S[4] * 2, S[1] * 32])
    return tl.permute(numbers, [0, 2, 1])


@triton.jit
def natural_rows(sums):
    """Return sums ``[16, rows]`` in the order of the rows, out of that of the operand."""
    ROWS: tl.constexpr = sums.shape[1]
    B: tl.constexpr = _rows_of_thread(ROWS)
    if B == 1:
        sums = tl.permute(tl.reshape(sums, [16, ROWS // 8, 2, 4]), [0, 1, 3, 2])
    else:
        sums = tl.reshape(sums, [16, ROWS // 8 // B, B, B, 8 // B])
        sums = tl.permute(sums, [0, 1, 3, 4, 2])
    return tl.reshape(sums, [16, ROWS])
