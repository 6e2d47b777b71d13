"""Top-k/top-p cut: the smallest kept score, and the first kept token with this score.

The rank of a score among all floats is an integer with the same order. So bisection over integers
finds a score in at most 32 steps, without sorting. The best scores of the blocks of 128 are a lower
bound of the k-th best score. So a small k needs few scores. All scores lower than the best plus
``log((1 - p) / V)`` have together less than 1 - p of the mass. They are dropped without another
look. While more scores are left than one pass holds, a halving drops those that it decided, so a
search of many scores takes few passes.
"""

import triton
import triton.language as tl

from lfm2_fast.kernels.pdl import pdl_wait

BLOCK = tl.constexpr(128)
LEAST = tl.constexpr(-(2**31))
NAN = tl.constexpr(2**31 - 1)
# Below all keys.
NO_KEY = tl.constexpr(-(2**63))
# The ranks of infinity and of its negative.
INFINITY = tl.constexpr(0x7F800000)
NOTHING = tl.constexpr(-0x7F800001)
LOG2_E = tl.constexpr(1.4426950408889634)
# To this, float64 adds numbers as whole ones.
SHIFT = tl.constexpr(1.5 * 2**52)


@triton.jit
def place_of(score):
    """Rank of a float32 among all floats, int32: -0 is 0, and NaN is above all."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(score != score, NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def score_at(place):
    """Float32 of this rank."""
    return (place ^ ((place >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def mass_of(score, best):
    """``exp(score - best)`` in float64 of a float32 ``score``, at most ``best``; 1 of equal ones.

    The relative error is at most ``1e-15 (1 + best - score)``. The mass of a score more than 700
    below the best is that of 700: it changes no sum of masses. The library's function takes 83
    instructions.
    """
    x = score.to(tl.float64) - best.to(tl.float64)
    # Not the larger of the score and `best - 700`, which float32 may round to `best`.
    x = tl.where(x < -700, -700.0, x)
    # The whole part of x / ln 2 is in the last bits of the sum.
    shifted = x * LOG2_E + SHIFT
    part = x * LOG2_E - (shifted - SHIFT)
    # (2^part - 1) / part for |part| <= 1/2, within 6e-16.
    power = part * 7.070977866508138e-09 + 1.0205905413765595e-07
    power = part * power + 1.3215451633221434e-06
    power = part * power + 1.5252672924850737e-05
    power = part * power + 0.00015403530424776529
    power = part * power + 0.0013333558200794592
    power = part * power + 0.009618129107618665
    power = part * power + 0.05550410866465167
    power = part * power + 0.24022650695910075
    power = part * power + 0.6931471805599462
    made = (part * power + 1).to(tl.int64, bitcast=True)
    return (made + (shifted.to(tl.int64, bitcast=True) << 52)).to(tl.float64, bitcast=True)


@triton.jit
def is_defined(best):
    """Return True if the best rank shows that softmax is defined: no NaN, no infinity, not only
    -inf.
    """
    return (best > NOTHING) & (best < INFINITY)


@triton.jit
def best_key(keys_ptr, blocks, BLOCK_B: tl.constexpr):
    """Largest of a row's keys (the upper half of a key is a rank), and all the ranks."""
    offs_b = tl.arange(0, BLOCK_B)
    keys = tl.load(keys_ptr + offs_b, mask=offs_b < blocks, other=NO_KEY)
    return tl.max(keys, axis=0), (keys >> 32).to(tl.int32)


@triton.jit
def _sample_cut_kernel(
    scores_ptr,
    keys_ptr,
    do_sample_ptr,
    top_k_ptr,
    top_p_ptr,
    cuts_ptr,
    firsts_ptr,
    picked_ptr,
    few_ptr,
    few_masses_ptr,
    vocab,
    blocks,
    log_vocab,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pdl_wait(PDL)
    scores_ptr += row * vocab
    few_ptr += row * vocab
    few_masses_ptr += row * vocab
    picked_ptr += row * blocks
    key, places = best_key(keys_ptr + row * blocks, blocks, BLOCK_B)
    best = (key >> 32).to(tl.int32)
    k = tl.load(top_k_ptr + row)
    p = tl.load(top_p_ptr + row)
    has_k = (k > 0) & (k < vocab)
    has_p = p < 1
    tl.store(cuts_ptr + row, LEAST)
    tl.store(firsts_ptr + row, 0)
    if (tl.load(do_sample_ptr + row) == 0) | (not is_defined(best)) | (not (has_k | has_p)):
        return

    worthless, bound = _bounds(places, best, k, p, has_k, has_p, blocks, log_vocab, BLOCK_B)
    few, rest = _collected(
        scores_ptr, places, bound, has_k, best, picked_ptr, few_ptr, few_masses_ptr, vocab,
        blocks, BLOCK_B, BLOCK_C,
    )  # fmt: skip
    cut = bound * 0 + LEAST
    if has_k:
        cut = _kth_collected(few_ptr, few, bound, best, k, BLOCK_C * BLOCK)
    skip = cut * 0
    if has_p:
        cut, skip, few = _nucleus(
            few_ptr, few_masses_ptr, few, rest, cut, worthless, best, p, BLOCK_C * BLOCK
        )
    first_token = cut * 0
    if skip > 0:
        first_token = _token_behind(few_ptr, few, cut, skip, BLOCK_C * BLOCK)
    tl.store(cuts_ptr + row, cut)
    tl.store(firsts_ptr + row, first_token)


@triton.jit
def _bounds(places, best, k, p, has_k, has_p, blocks, log_vocab, BLOCK_B: tl.constexpr):
    """Return the rank below which top-p drops all, and a lower bound of the smallest kept rank."""
    # One more unit is a margin for rounding.
    worth = score_at(best).to(tl.float64) + tl.log(tl.where(has_p, 1 - p, 1)) - log_vocab - 1
    worthless = tl.where(has_p, place_of(worth.to(tl.float32)), LEAST)
    bound = worthless
    if has_k:
        least = tl.min(tl.where(tl.arange(0, BLOCK_B) < blocks, places, NAN), axis=0)
        bound = tl.where(k <= blocks, _kth_best(places, least, best, k), LEAST)
    return worthless, bound


@triton.jit
def _collected(
    scores_ptr,
    places,
    bound,
    has_k,
    best,
    picked_ptr,
    few_ptr,
    few_masses_ptr,
    vocab,
    blocks,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Collect the blocks with a score of at least the bound, then ranks and masses of these scores.

    They keep their order. Return how many scores there are, and without a k the mass below the
    bound.
    """
    offs_b = tl.arange(0, BLOCK_B)
    holds = (offs_b < blocks) & ((places >= bound) | (not has_k))
    tl.store(picked_ptr + tl.cumsum(holds.to(tl.int32), axis=0) - 1, offs_b, mask=holds)
    picked = tl.sum(holds.to(tl.int32), axis=0)
    tl.debug_barrier()
    few = picked * 0
    rest = tl.sum(tl.zeros([BLOCK_C], tl.float64), axis=0)
    for first in range(0, picked, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        block = tl.load(picked_ptr + offs_c, mask=offs_c < picked, other=blocks)
        offs_v = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        offs_v = tl.reshape(offs_v, [BLOCK_C * BLOCK])
        score = tl.load(scores_ptr + offs_v, mask=offs_v < vocab, other=float("-inf"))
        place, mass = place_of(score), mass_of(score, score_at(best))
        stays = (offs_v < vocab) & (place >= bound)
        at = few + tl.cumsum(stays.to(tl.int32), axis=0) - 1
        tl.store(few_ptr + at, (place.to(tl.int64) << 32) | offs_v, mask=stays)
        tl.store(few_masses_ptr + at, mass, mask=stays)
        few += tl.sum(stays.to(tl.int32), axis=0)
        rest += tl.sum(tl.where(stays | has_k, 0.0, mass), axis=0)
    tl.debug_barrier()
    return few, rest


@triton.jit
def _kth_collected(few_ptr, few, bound, best, k, BLOCK_N: tl.constexpr):
    """Return the k-th largest of ``few`` ranks, which are between ``bound`` and ``best``."""
    low, high = bound.to(tl.int64), best.to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        enough = _how_many(few_ptr, few, middle, NAN, BLOCK_N) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low.to(tl.int32)


@triton.jit
def _nucleus(few_ptr, few_masses_ptr, few, rest, cut, worthless, best, p, BLOCK_N: tl.constexpr):
    """Return the smallest rank kept for ``p``, how many tokens of it are dropped, and ``few``.

    ``rest`` is the mass below ``few`` ranks, and nothing below ``cut`` was kept. Ranks that the
    search has decided may be dropped from ``few``.
    """
    limit = (1 - p).to(tl.float32)
    share = 1 / (rest + _mass(few_ptr, few_masses_ptr, few, cut, NAN, BLOCK_N))
    # All scores below `low` are dropped. Not all below `high + 1` are.
    low, high = tl.maximum(cut, worthless).to(tl.int64), best.to(tl.int64)
    is_first = True
    while low < high:
        if (few > BLOCK_N) & (not is_first):
            few, dropped = _narrowed(few_ptr, few_masses_ptr, few, cut, low, high, BLOCK_N)
            rest += dropped
        is_first = False
        middle = low + (high - low + 1) // 2
        under = rest + _mass(few_ptr, few_masses_ptr, few, cut, middle, BLOCK_N)
        goes = (under * share).to(tl.float32) <= limit
        low = tl.where(goes, middle, low)
        high = tl.where(goes, high, middle - 1)
    # Of the tokens that equal the smallest kept score, the first are dropped too; one always stays.
    under = rest + _mass(few_ptr, few_masses_ptr, few, cut, low, BLOCK_N)
    cut = low.to(tl.int32)
    each = mass_of(score_at(cut), score_at(best))
    skip = cut * 0
    most = tl.maximum(_how_many(few_ptr, few, low, low + 1, BLOCK_N) - 1, 0)
    while skip < most:
        some = skip + (most - skip + 1) // 2
        goes = ((under + some * each) * share).to(tl.float32) <= limit
        skip = tl.where(goes, some, skip)
        most = tl.where(goes, most, some - 1)
    return cut, skip, few


@triton.jit
def _narrowed(few_ptr, masses_ptr, count, cut, low, high, BLOCK_N: tl.constexpr):
    """Keep the ranks from ``low`` to ``high`` in their order, and the masses.

    Return their number, and the mass of those dropped from ``cut`` to below ``low``.
    """
    kept = count * 0
    dropped = tl.sum(tl.zeros([BLOCK_N], tl.float64), axis=0)
    for first in range(0, count, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        is_one = offs_n < count
        key = tl.load(few_ptr + offs_n, mask=is_one, other=NO_KEY)
        mass = tl.load(masses_ptr + offs_n, mask=is_one, other=0)
        place = key >> 32
        stays = is_one & (place >= low) & (place <= high)
        at = kept + tl.cumsum(stays.to(tl.int32), axis=0) - 1
        # All of these are read before any is overwritten; later ones are not reached.
        tl.debug_barrier()
        tl.store(few_ptr + at, key, mask=stays)
        tl.store(masses_ptr + at, mass, mask=stays)
        kept += tl.sum(stays.to(tl.int32), axis=0)
        dropped += tl.sum(tl.where((place >= cut) & (place < low), mass, 0.0), axis=0)
    tl.debug_barrier()
    return kept, dropped


@triton.jit
def _token_behind(few_ptr, count, place, skip, BLOCK_N: tl.constexpr):
    """Token after the first ``skip`` of the tokens with rank ``place``."""
    found, token = skip * 0, skip * 0
    for first in range(0, count, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        key = tl.load(few_ptr + offs_n, mask=offs_n < count, other=NO_KEY)
        equal = (offs_n < count) & ((key >> 32) == place)
        number = found + tl.cumsum(equal.to(tl.int32), axis=0)
        behind = tl.where(equal & (number <= skip), (key & 0x7FFFFFFF).to(tl.int32) + 1, 0)
        token = tl.maximum(token, tl.max(behind, axis=0))
        found += tl.sum(equal.to(tl.int32), axis=0)
    return token


@triton.jit
def _kth_best(places, least, best, k):
    """Return the k-th largest of ``places``, which are between ``least`` and ``best``."""
    low, high = least.to(tl.int64), best.to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        enough = tl.sum((places >= middle).to(tl.int32), axis=0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low.to(tl.int32)


@triton.jit
def _how_many(few_ptr, count, low, high, BLOCK_N: tl.constexpr):
    """Return how many of ``count`` places are from ``low`` to below ``high``."""
    total = count * 0
    for first in range(0, count, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        place = tl.load(few_ptr + offs_n, mask=offs_n < count, other=NO_KEY) >> 32
        within = (place >= low) & (place < high)
        total += tl.sum(within.to(tl.int32), axis=0)
    return total


@triton.jit
def _mass(few_ptr, masses_ptr, count, low, high, BLOCK_N: tl.constexpr):
    """Mass of the scores with a rank from ``low`` to below ``high``."""
    total = tl.sum(tl.zeros([BLOCK_N], tl.float64), axis=0)
    for first in range(0, count, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        place = tl.load(few_ptr + offs_n, mask=offs_n < count, other=NO_KEY) >> 32
        mass = tl.load(masses_ptr + offs_n, mask=offs_n < count, other=0)
        total += tl.sum(tl.where((place >= low) & (place < high), mass, 0.0), axis=0)
    return total
