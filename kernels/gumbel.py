"""Gumbel noise of a row's tokens, a function of seed, row, position and token.

It is ``-ln(-ln(1 - u))`` of ``u = (word + 1/2) / 2^32``. Token t has word t % 4 of Philox-4x32-10
with the seed as key and counter (position, row, t // 4, 0). In float32 it is within 1.2e-6, and
lies between LEAST_NOISE and MOST_NOISE.
"""

import triton
import triton.language as tl

LEAST_NOISE = tl.constexpr(-3.131)
MOST_NOISE = tl.constexpr(22.875)


@triton.jit
def gumbel(seed, row, position, first, BLOCK_V: tl.constexpr):
    """Noise of BLOCK_V tokens from ``first``, a multiple of 4, on: float32."""
    counter = first // 4 + tl.arange(0, BLOCK_V // 4)
    zero = counter * 0
    a, b, c, d = tl.philox(
        seed, zero + position.to(tl.int32), zero + row.to(tl.int32), counter, zero
    )
    # Joining the last axes puts a and b next to each other, then c and d.
    word = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK_V])

    # A small u must keep all its digits: the rounding error of 1 - u is added again. For a large u,
    # 1 - u is made from the inverted word.
    upper = word > 0x7FFFFFFF
    part = (tl.where(upper, word ^ 0xFFFFFFFF, word).to(tl.float32) + 0.5) * (1.0 / 4294967296)
    rest = tl.where(upper, part, 1 - part)
    lost = tl.where(upper, 0.0, (rest - 1) + part)
    return -tl.log(lost - tl.log(rest))
