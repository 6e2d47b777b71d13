"""Tiles of a weight, for products of a few tokens: places of their words, and loads.

A kernel holds the words of the tile that it multiplies, and DEPTH more tiles are loading. What
follows a row's last tile is the first of the program's next rows.
"""

import triton
import triton.language as tl

from lfm2_fast.kernels.gemv_int4 import int4_places, int4_tile


@triton.jit
def weight_places(
    count,
    K: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Rows, words and columns of a tile: where its words lie in PARTS weights ``[count, K]``.

    ``[rows / 8, steps, WARPS, 8, 16]``, or what broadcasts to that: a warp's load has 64 bytes of
    each of 8 rows. The rows are those of one part after another, and a power of two: a fourth part
    may be no part, and its rows are beyond any. In int4 as ``int4_places`` says.
    """
    if BITS == 4:
        return int4_places(count, K, PARTS, BLOCK_N, BLOCK_K, WARPS)
    else:
        EACH: tl.constexpr = 32 // BITS
        STEPS: tl.constexpr = BLOCK_K // (16 * EACH * WARPS)
        ROWS: tl.constexpr = BLOCK_N * triton.next_power_of_2(PARTS)
        n = tl.arange(0, ROWS // 8)[:, None, None, None, None] * 8
        n += tl.arange(0, 8)[None, None, None, :, None]
        columns = tl.arange(0, STEPS)[None, :, None, None, None] * (16 * WARPS)
        columns += tl.arange(0, WARPS)[None, None, :, None, None] * 16
        columns += tl.arange(0, 16)[None, None, None, None, :]
        rows = n % BLOCK_N
        words = (rows + n // BLOCK_N * count) * (K // EACH) + columns
        if ROWS != PARTS * BLOCK_N:
            rows = tl.where(n < PARTS * BLOCK_N, rows, count)
        return rows, words, columns


@triton.jit
def weight_tile(
    words_ptr,
    scale_ptr,
    rows,
    words,
    columns,
    first,
    count,
    k,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Words of the rows from ``first`` and the columns from ``k`` on, at ``weight_places``.

    In int4 with the scales of their groups, as ``int4_tile`` says.
    """
    if BITS == 4:
        return int4_tile(words_ptr, scale_ptr, rows, words, columns, first, count, k, K, BLOCK_K)
    else:
        EACH: tl.constexpr = 32 // BITS
        mask = rows < count - first
        if K % BLOCK_K != 0:
            mask = mask & (columns < K // EACH - k // EACH)
        words_ptr += first * (K // EACH) + k // EACH
        return tl.load(words_ptr + words, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def first_tiles(
    words_ptr,
    scale_ptr,
    rows,
    words,
    columns,
    first,
    step,
    count,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Return the first DEPTH tiles of a program whose rows begin at ``first``, ``step`` apart."""
    tiles = ()
    for ahead in tl.static_range(DEPTH):
        row, at = place(first, step, ahead * BLOCK_K, K, BLOCK_K)
        tile = weight_tile(
            words_ptr, scale_ptr, rows, words, columns, row, count, at, K, BITS, BLOCK_K
        )  # fmt: skip
        tiles += (tile,)
    return tiles


@triton.jit
def place(first, step, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Row and column of the tile that is ``k`` columns behind the first of the rows at ``first``.

    What follows a row's last tile is the first tile of rows ``step`` further on.
    """
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tile = k // BLOCK_K
    # A multiple of BLOCK_K, as the compiler must see for loads of 16 bytes.
    return first + tile // STEPS * step, tile % STEPS * BLOCK_K
