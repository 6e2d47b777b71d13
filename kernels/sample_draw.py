"""Draw of a token: the first one with the largest sum of score and Gumbel noise.

One launch finds the best sum of every tile of the vocabulary. The next finds the best of all, and
updates the state for the next step. A row that does not draw gets the first of its best tokens. If
softmax is undefined, the token is -1.
"""

import triton
import triton.language as tl

from lfm2_fast.kernels.gumbel import LEAST_NOISE, MOST_NOISE, gumbel
from lfm2_fast.kernels.pdl import pdl_wait
from lfm2_fast.kernels.sample_cut import NO_KEY, best_key, is_defined, place_of, score_at


@triton.jit
def _sample_draw_kernel(
    scores_ptr,
    keys_ptr,
    do_sample_ptr,
    min_p_ptr,
    cuts_ptr,
    firsts_ptr,
    seeds_ptr,
    rows_ptr,
    positions_ptr,
    sums_ptr,
    vocab,
    blocks,
    CUT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pdl_wait(PDL)
    key = best_key(keys_ptr + row * blocks, blocks, BLOCK_B)[0]
    best = (key >> 32).to(tl.int32)
    if (tl.load(do_sample_ptr + row) == 0) | (not is_defined(best)):
        return
    # A score further below the best cannot have the largest sum with any noise.
    cut = place_of(score_at(best) - (MOST_NOISE - LEAST_NOISE))
    first = cut * 0
    min_p = tl.load(min_p_ptr + row)
    if min_p > 0:
        cut = tl.maximum(cut, place_of(score_at(best) + tl.log(min_p).to(tl.float32)))
    if CUT:
        given = tl.load(cuts_ptr + row)
        first = tl.where(given >= cut, tl.load(firsts_ptr + row), 0)
        cut = tl.maximum(cut, given)
    offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = offs_v < vocab
    score = tl.load(scores_ptr + row * vocab + offs_v, mask=mask, other=float("-inf"))
    place = place_of(score)
    stays = mask & ((place > cut) | ((place == cut) & (offs_v >= first)))
    at = sums_ptr + row * tl.num_programs(0) + tile
    if tl.max(stays.to(tl.int32), axis=0) == 0:
        tl.store(at, NO_KEY)
        return
    seed, number = tl.load(seeds_ptr + row), tl.load(rows_ptr + row)
    position = tl.load(positions_ptr + row)
    noise = gumbel(seed, number, position, tile * BLOCK_V, BLOCK_V)
    # Of equal sums the first token has the greatest key.
    sums = place_of(score - score_at(best) + noise).to(tl.int64) << 32
    sums = tl.where(stays, sums | (0x7FFFFFFF - offs_v), NO_KEY)
    tl.store(at, tl.max(sums, axis=0))


@triton.jit
def _sample_last_kernel(
    keys_ptr,
    sums_ptr,
    do_sample_ptr,
    positions_ptr,
    seen_ptr,
    tokens_ptr,
    blocks,
    tiles,
    stride_seen_s,
    DRAWS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pdl_wait(PDL)
    key = best_key(keys_ptr + row * blocks, blocks, BLOCK_B)[0]
    defined = is_defined((key >> 32).to(tl.int32))
    if DRAWS:
        if defined & (tl.load(do_sample_ptr + row) != 0):
            key = best_key(sums_ptr + row * tiles, tiles, BLOCK_T)[0]
    token = tl.where(defined, 0x7FFFFFFF - (key & 0x7FFFFFFF), -1)
    tl.store(tokens_ptr + row, token)
    tl.store(positions_ptr + row, tl.load(positions_ptr + row) + 1)
    if seen_ptr is not None:
        # A row without a token has ended, and its marks are not read again.
        tl.store(seen_ptr + row * stride_seen_s + tl.maximum(token, 0), 1)
