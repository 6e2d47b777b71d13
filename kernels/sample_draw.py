"""Drawing a token of what is left: the first up to which the mass is more than ``u`` of the whole.

``u`` is Philox of (seed, row, position). One launch sums the mass of every tile of the vocabulary,
the next finds the tile and looks into it. Where a row does not draw, its token is the first of the
best; where softmax is undefined, it is -1. Masses are float64 and end in the vocabulary's order.
"""

import triton
import triton.language as tl

from lfm2_fast.kernels.pdl import pdl_wait
from lfm2_fast.kernels.sample_cut import (
    LEAST,
    best_key,
    is_defined,
    mass_of,
    place_of,
    score_at,
)


@triton.jit
def _what_stays(row, best, cuts_ptr, skips_ptr, min_p_ptr, CUT: tl.constexpr):
    """The place of the least score that stays, and how many of its equals go."""
    cut, skip = best * 0 + LEAST, best * 0
    if CUT:
        cut, skip = tl.load(cuts_ptr + row), tl.load(skips_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    least = score_at(best) + tl.log(tl.where(min_p > 0, min_p, 1)).to(tl.float32)
    least = tl.where(min_p > 0, place_of(least), LEAST)
    return tl.maximum(cut, least), tl.where(least > cut, 0, skip)


@triton.jit
def _sample_masses_kernel(
    scores_ptr,
    keys_ptr,
    do_sample_ptr,
    min_p_ptr,
    cuts_ptr,
    skips_ptr,
    masses_ptr,
    equals_ptr,
    vocab,
    blocks,
    CUT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pdl_wait(PDL)
    key, _ = best_key(keys_ptr + row * blocks, blocks, BLOCK_B)
    best = (key >> 32).to(tl.int32)
    if (tl.load(do_sample_ptr + row) == 0) | (not is_defined(best)):
        return
    offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = offs_v < vocab
    score = tl.load(scores_ptr + row * vocab + offs_v, mask=mask, other=float("-inf"))
    cut, _ = _what_stays(row, best, cuts_ptr, skips_ptr, min_p_ptr, CUT)
    place = place_of(score)
    mass = tl.where(mask & (place > cut), mass_of(score, score_at(best)), 0.0)
    at = row * tl.num_programs(0) + tile
    tl.store(masses_ptr + at, tl.sum(mass, axis=0))
    tl.store(equals_ptr + at, tl.sum((mask & (place == cut)).to(tl.int32), axis=0))


@triton.jit
def _sample_draw_kernel(
    keys_ptr,
    scores_ptr,
    do_sample_ptr,
    min_p_ptr,
    cuts_ptr,
    skips_ptr,
    masses_ptr,
    equals_ptr,
    seeds_ptr,
    rows_ptr,
    positions_ptr,
    seen_ptr,
    tokens_ptr,
    vocab,
    blocks,
    tiles,
    stride_seen_s,
    DRAWS: tl.constexpr,
    CUT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pdl_wait(PDL)
    key, _ = best_key(keys_ptr + row * blocks, blocks, BLOCK_B)
    best = (key >> 32).to(tl.int32)
    token = tl.where(is_defined(best), 0x7FFFFFFF - (key & 0x7FFFFFFF), -1)
    position = tl.load(positions_ptr + row)
    if DRAWS:
        if is_defined(best) & (tl.load(do_sample_ptr + row) != 0):
            seed, number = tl.load(seeds_ptr + row), tl.load(rows_ptr + row)
            word = tl.philox(seed, position.to(tl.int32), number.to(tl.int32), 0, 0)[0]
            uniform = (word.to(tl.float64) + 0.5) * (1.0 / 4294967296)
            cut, skip = _what_stays(row, best, cuts_ptr, skips_ptr, min_p_ptr, CUT)
            token = _drawn(
                scores_ptr + row * vocab,
                masses_ptr + row * tiles,
                equals_ptr + row * tiles,
                uniform,
                score_at(best),
                cut,
                skip,
                vocab,
                tiles,
                BLOCK_T,
                BLOCK_V,
            )
    tl.store(tokens_ptr + row, token)
    tl.store(positions_ptr + row, position + 1)
    if seen_ptr is not None:
        # A row without a token is over, and its marks are not read again.
        tl.store(seen_ptr + row * stride_seen_s + tl.maximum(token, 0), 1)


@triton.jit
def _drawn(
    scores_ptr,
    masses_ptr,
    equals_ptr,
    uniform,
    best,
    cut,
    skip,
    vocab,
    tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The first token up to which the mass is more than ``uniform`` of the whole, int64."""
    offs_t, offs_v = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_V)
    equals = tl.load(equals_ptr + offs_t, mask=offs_t < tiles, other=0)
    above = tl.load(masses_ptr + offs_t, mask=offs_t < tiles, other=0)
    going = tl.minimum(tl.maximum(skip - (tl.cumsum(equals, axis=0) - equals), 0), equals)
    mass = above + (equals - going) * tl.where(equals > 0, mass_of(score_at(cut), best), 0.0)
    target = uniform * tl.sum(mass, axis=0)
    tile = _first_beyond(mass, mass * 0, target, offs_t)
    before = offs_t < tile
    base = tl.sum(tl.where(before, mass, 0.0), axis=0)
    earlier = tl.sum(tl.where(before, equals, 0), axis=0)

    offs_v += tile * BLOCK_V
    score = tl.load(scores_ptr + offs_v, mask=offs_v < vocab, other=float("-inf"))
    place = place_of(score)
    equal = (offs_v < vocab) & (place == cut)
    number = earlier + tl.cumsum(equal.to(tl.int32), axis=0)
    stays = (offs_v < vocab) & (place > cut) | (equal & (number > skip))
    mass = tl.where(stays, mass_of(score, best), 0.0)
    return _first_beyond(mass, base, target, offs_v).to(tl.int64)


@triton.jit
def _first_beyond(mass, base, target, numbers):
    """The first of ``numbers`` up to which base and mass are more than target; it has mass.

    A sum in another order may come out a rounding lower: then it is the last that has mass.
    """
    most = 0x7FFFFFFF
    beyond = (mass > 0) & (base + tl.cumsum(mass, axis=0) > target)
    first = tl.min(tl.where(beyond, numbers, most), axis=0)
    return tl.minimum(first, tl.max(tl.where(mass > 0, numbers, 0), axis=0))
