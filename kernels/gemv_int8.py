"""Numbers of an int8 weight, for products of a few tokens: integers become floats two at a time.

A word has four numbers. The first and the third go into the two halves of a register, and the
second and the fourth into those of another. So the two numbers of a pair of the tensor core's
operand are two columns apart, and tokens have the same order (gemv.py). Bits become numbers without
a conversion. In bfloat16 the lower seven bits become the last bits of 128. Then 128 is subtracted,
or 256 from a negative number. In float16 the number plus 128 is the end of 1024. Every step is
exact. This takes 7 instructions for a word. With conversions it takes 8, and those are slower.
"""

import triton
import triton.language as tl


@triton.jit
def int8_numbers(words, tokens, DTYPE: tl.constexpr):
    """Return the four numbers of each word as DTYPE, ``[..., 2, 2]``."""
    if DTYPE == tl.float32:
        even = tl.join(words << 24 >> 24, words << 8 >> 24)
        return tl.join(even, tl.join(words << 16 >> 24, words >> 24)).to(tl.float32)
    else:
        return tl.join(_pairs(words, tokens, DTYPE), _pairs(words >> 8, tokens, DTYPE))


@triton.jit
def _pairs(words, tokens, DTYPE: tl.constexpr):
    """Return the numbers in the first and third byte of each word, ``[..., 2]`` in DTYPE."""
    # The bits of 1024 or 128 in both halves of a word. There always are tokens: the assembler would
    # take two instructions with a number that it knows, and takes one with a register.
    BITS: tl.constexpr = 0x64006400 if DTYPE == tl.float16 else 0x43004300
    bits = tl.where(tokens > 0, BITS, 0)
    if DTYPE == tl.float16:
        return _halves((words ^ 0x00800080) & 0x00FF00FF | bits, DTYPE) - 1152
    else:
        # With the sign's bit 128 becomes 256.
        lower, sign = words & 0x007F007F | bits, words & 0x00800080 | bits
        return (_halves(lower, DTYPE).to(tl.float32) - _halves(sign, DTYPE).to(tl.float32)).to(
            DTYPE
        )


@triton.jit
def _halves(words, DTYPE: tl.constexpr):
    """Return the two halves of each word as numbers of 16 bits, ``[..., 2]``."""
    low = (words & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.join(low, (words >> 16).to(tl.int16).to(DTYPE, bitcast=True))
