"""The final norm, the head and the largest logit's token, in two launches and without the logits.

``x [T, K]`` of at most 16 tokens, ``norm [K]``, ``weight [N, K]``, ``bias [N]`` or None, ``scale
[N]`` of an int8 weight or None (gemv.py), ``tokens [T]`` int64: what ``argmax`` gives of the logits
as ``norm_linear`` rounds them: the first of the largest, NaN being larger than any number. It is -1
where the largest is NaN or infinite.

A logit and its row are one integer, whose order is theirs, so the largest is the same whoever
compares first. ``best [programs, 16]`` int64 takes that of every program, and ``last_argmax`` the
largest of those. Least bytes: NK elements.
"""

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.gemv import (
    MOST_TOKENS,
    check_tokens,
    dots,
    inverse_rms,
    normed,
    options,
    rows_of,
)
from lfm2_fast.kernels.pdl import pdl_options, pdl_wait
from lfm2_fast.kernels.sample_cut import is_defined
from lfm2_fast.kernels.tiling import Tiling, choose_tiling

LAST_ROW = 2**31 - 1
BELOW_ALL = 1 - 2**63


@triton.jit(do_not_specialize=["tokens"])
def _head_argmax_kernel(
    x_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    best_ptr,
    eps,
    tokens,
    count,
    stride_x_t,
    K: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BELOW_ALL: tl.constexpr,
    LAST_ROW: tl.constexpr,
    PDL: tl.constexpr,
):
    offs_t, offs_k = tl.arange(0, MOST), tl.arange(0, BLOCK_K)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.num_programs(0) * BLOCK_N
    tile = rows_of(weight_ptr, rows, count, offs_k, K)
    norm = tl.load(norm_ptr + offs_k, mask=offs_k < K, other=0)
    pdl_wait(PDL)
    scales = inverse_rms(x_ptr, tokens, stride_x_t, eps, offs_k, K, MOST)
    best = tl.full([MOST], BELOW_ALL, tl.int64)
    for _ in range(tl.program_id(0) * BLOCK_N, count, step):
        following = rows_of(weight_ptr, rows + step, count, offs_k, K)
        wide = tile.to(tl.float32)
        for token in range(tokens):
            x = normed(x_ptr, norm, scales, token, stride_x_t, offs_k, K, MOST)
            logits = dots(wide, x, bias_ptr, scale_ptr, rows, count, x_ptr.dtype.element_ty)
            ranks = _rank(logits).to(tl.int64) * (LAST_ROW + 1) + (LAST_ROW - rows)
            ranks = tl.where(rows < count, ranks, BELOW_ALL)
            best = tl.where(offs_t == token, tl.maximum(best, tl.max(ranks, axis=0)), best)
        tile = following
        rows += step
    tl.store(best_ptr + tl.program_id(0) * MOST + offs_t, best, mask=offs_t < tokens)


@triton.jit
def _rank(x):
    """int32 ordered as the float32 ``x``: zeros are equal, and NaN is the largest."""
    x = tl.where(x == 0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, rank)


@triton.jit(do_not_specialize=["programs"])
def _last_argmax_kernel(
    best_ptr,
    tokens_ptr,
    programs,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
    BELOW_ALL: tl.constexpr,
    LAST_ROW: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    pdl_wait(PDL)
    best = tl.load(best_ptr + offs * MOST + token, mask=offs < programs, other=BELOW_ALL)
    largest = tl.max(best, axis=0)
    row = LAST_ROW - (largest & LAST_ROW)
    tl.store(tokens_ptr + token, tl.where(is_defined(largest >> 31), row, -1))


def head_argmax_triton(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    best: torch.Tensor,
    *,
    pdl: bool = False,
    tiling: Tiling | None = None,
) -> None:
    """Fill ``best``; rows of ``x`` may stand apart.

    ``pdl``, ``tiling``: as in norm_linear.py.
    """
    tokens, count = len(x), weight.shape[0]
    check_tokens(x, norm, weight, bias, scale, tokens, count)
    tiling = tiling or head_tiling(weight)
    assert best.shape == (tiling.programs, MOST_TOKENS)
    assert best.dtype == torch.int64 and best.is_contiguous()
    if tokens == 0:
        return
    block_k = triton.next_power_of_2(x.shape[1])
    with torch.cuda.device_of(x):
        _head_argmax_kernel[(tiling.programs,)](
            x,
            norm,
            weight,
            bias,
            scale,
            best,
            eps,
            tokens,
            count,
            x.stride(0),
            BELOW_ALL=BELOW_ALL,
            LAST_ROW=LAST_ROW,
            **options(x, tiling, block_k, pdl),
        )


def last_argmax_triton(best: torch.Tensor, tokens: torch.Tensor, *, pdl: bool = False) -> None:
    """Fill ``tokens`` from ``best``."""
    assert best.shape[1] == MOST_TOKENS >= len(tokens)
    assert tokens.dtype == best.dtype == torch.int64
    assert tokens.is_contiguous() and best.is_contiguous()
    if len(tokens) == 0:
        return
    with torch.cuda.device_of(best):
        _last_argmax_kernel[(len(tokens),)](
            best,
            tokens,
            len(best),
            MOST=MOST_TOKENS,
            BLOCK=triton.next_power_of_2(len(best)),
            BELOW_ALL=BELOW_ALL,
            LAST_ROW=LAST_ROW,
            num_warps=4,
            **pdl_options(pdl),
        )


def head_tiling(weight: torch.Tensor) -> Tiling:
    """The tiling for a head, whose ``programs`` are the rows of ``best``."""
    block_k = triton.next_power_of_2(weight.shape[1])
    return choose_tiling("head_argmax", weight.shape[0], weight, block_k)
