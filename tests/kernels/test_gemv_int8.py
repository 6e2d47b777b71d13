"""Parts of the products of few tokens and an int8 weight, in each dtype of the tokens."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.gemv_int8 import int8_numbers
from lfm2_fast.kernels.gemv_tokens import normed

# What is computed here is exact, and in float32, so the interpreter is right in bfloat16 too.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _numbers_kernel(words_ptr, tokens, out_ptr):
    words = tl.load(words_ptr + tl.arange(0, 64))
    numbers = int8_numbers(words, tokens, out_ptr.dtype.element_ty)
    tl.store(out_ptr + tl.arange(0, 256), tl.reshape(numbers, [256]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_int8_number_is_exact_in_every_byte(dtype, kernel_device) -> None:
    every = torch.arange(-128, 128, dtype=torch.int8, device=kernel_device)
    for first in range(4):
        numbers = every.roll(first)
        out = torch.empty(256, dtype=dtype, device=kernel_device)
        _numbers_kernel[(1,)](numbers.view(torch.int32), 1, out)
        assert torch.equal(out, numbers.to(dtype))


@triton.jit
def _normed_kernel(x_ptr, norm_ptr, scales_ptr, out_ptr, BITS: tl.constexpr):
    x = tl.reshape(tl.load(x_ptr + tl.arange(0, 256)), [2, 1, 2, 1, 8, 1, 8])
    norm = tl.reshape(tl.load(norm_ptr + tl.arange(0, 128)), [1, 1, 2, 1, 8, 1, 8])
    scales = tl.reshape(tl.load(scales_ptr + tl.arange(0, 16)), [2, 1, 1, 1, 8, 1, 1])
    tl.store(out_ptr + tl.arange(0, 256), tl.reshape(normed(x, norm, scales, BITS), [256]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 16])
def test_norms_of_short_numbers_are_exact(dtype, bits, kernel_device) -> None:
    """The order of columns stays the same, for any weight."""
    torch.manual_seed(0)
    x = torch.randint(-15, 16, (2, 2, 8, 8), device=kernel_device).to(dtype)
    norm = torch.randint(-15, 16, (1, 2, 8, 8), device=kernel_device).to(dtype)
    scales = 2.0 ** torch.randint(-3, 3, (2, 1, 8, 1), device=kernel_device)
    out = torch.empty_like(x)
    _normed_kernel[(1,)](x, norm, scales, out, bits)
    assert torch.equal(out, (x.float() * scales * norm.float()).to(dtype))
