"""Final norm, head, and a step by the token of the largest logit: two launches, without logits.

``x [T, K]`` of at most 16 tokens, ``norm [K]``, ``weight [N, K]``, ``bias [N]`` or None, ``scale
[N]`` of an int8 weight or None (gemv.py). The chosen token is the ``argmax`` of the logits of
``norm_linear``: the first of the largest, where NaN is larger than any number. It is -1 if the
largest is NaN or infinite. Then the step's inputs become those of the next (advance.py).

A logit and its row become one integer with the same order, so the result does not depend on the
order of comparisons. Every program writes its largest to ``best [programs, 16]`` int64, and
``argmax_advance`` takes the largest of those. Least bytes: NK elements.
"""

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.advance import advance_arguments, advance_row
from lfm2_fast.kernels.gemv import MOST_TOKENS, launch, multiply
from lfm2_fast.kernels.gemv_rms import inverse_rms
from lfm2_fast.kernels.gemv_tiles import first_tiles, weight_places
from lfm2_fast.kernels.pdl import pdl_options, pdl_wait
from lfm2_fast.kernels.sample_cut import is_defined
from lfm2_fast.kernels.tiling import Tiling, choose_tiling

LAST_ROW = 2**31 - 1
BELOW_ALL = 1 - 2**63


@triton.jit(do_not_specialize=["tokens"])
def _head_argmax_kernel(
    x_ptr,
    words_ptr,
    bias_ptr,
    scale_ptr,
    norm_ptr,
    best_ptr,
    eps,
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
    BELOW_ALL: tl.constexpr,
    LAST_ROW: tl.constexpr,
    PDL: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N
    step = tl.num_programs(0) * BLOCK_N
    rows, words, columns = weight_places(count, K, BITS, PARTS, BLOCK_N, BLOCK_K, WARPS)
    tiles = first_tiles(
        words_ptr, scale_ptr, rows, words, columns, first, step, count, K, BITS, BLOCK_K, DEPTH
    )  # fmt: skip
    pdl_wait(PDL)
    scales = inverse_rms(x_ptr, tokens, stride_x_t, eps, K, BITS, BLOCK_K, WARPS)
    offs_t = tl.arange(0, 16)
    best = tl.full([16], BELOW_ALL, tl.int64)
    for row in range(first, count, step):
        logits, tiles = multiply(
            tiles, rows, words, columns, x_ptr, words_ptr, bias_ptr, scale_ptr, norm_ptr, scales,
            row, step, tokens, count, stride_x_t, K, BITS, PARTS, BLOCK_N, BLOCK_K, WARPS, DEPTH,
        )  # fmt: skip
        offs_n = (row + tl.arange(0, BLOCK_N))[None, :]
        ranks = _rank(logits).to(tl.int64) * (LAST_ROW + 1) + (LAST_ROW - offs_n)
        ranks = tl.where(offs_n < count, ranks, BELOW_ALL)
        best = tl.maximum(best, tl.max(ranks, axis=1))
    tl.store(best_ptr + tl.program_id(0) * 16 + offs_t, best, mask=offs_t < tokens)


@triton.jit
def _rank(x):
    """int32 ordered as the float32 ``x``: zeros are equal, and NaN is the largest."""
    x = tl.where(x == 0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, rank)


@triton.jit(do_not_specialize=["programs", "ends", "dummy_slot"])
def _argmax_advance_kernel(
    best_ptr,
    eos_ptr,
    tokens_ptr,
    slots_ptr,
    positions_ptr,
    lengths_ptr,
    finished_ptr,
    written_ptr,
    dummy_slot,
    programs,
    ends,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
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
    chosen = tl.where(is_defined(largest >> 31), row, -1)
    advance_row(
        token, chosen, eos_ptr, tokens_ptr, slots_ptr, positions_ptr, lengths_ptr, finished_ptr,
        written_ptr, dummy_slot, ends, BLOCK_E,
    )  # fmt: skip


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
    """Fill ``best``; ``x`` may have gaps between rows.

    ``pdl``, ``tiling``: as in norm_linear.py.
    """
    tiling = tiling or head_tiling(weight)
    assert best.shape == (tiling.programs, MOST_TOKENS)
    assert best.dtype == torch.int64 and best.is_contiguous()
    launch(
        _head_argmax_kernel,
        tiling,
        x,
        weight,
        bias,
        scale,
        pdl=pdl,
        norm_ptr=norm,
        best_ptr=best,
        eps=eps,
        BELOW_ALL=BELOW_ALL,
        LAST_ROW=LAST_ROW,
    )


def argmax_advance_triton(
    best: torch.Tensor,
    eos: torch.Tensor,
    dummy_slot: int | None,
    tokens: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    finished: torch.Tensor,
    written: torch.Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Do as ``advance_triton`` does, with the tokens that ``best`` has.

    ``pdl``: as in norm_linear.py.
    """
    assert best.shape[1] == MOST_TOKENS >= len(tokens)
    assert best.dtype == torch.int64 and best.is_contiguous()
    given = advance_arguments(eos, dummy_slot, tokens, slots, positions, lengths, finished, written)
    if len(tokens) == 0:
        return
    with torch.cuda.device_of(best):
        _argmax_advance_kernel[(len(tokens),)](
            best,
            **given,
            programs=len(best),
            MOST=MOST_TOKENS,
            BLOCK=triton.next_power_of_2(len(best)),
            BELOW_ALL=BELOW_ALL,
            LAST_ROW=LAST_ROW,
            num_warps=4,
            **pdl_options(pdl),
        )


def head_tiling(weight: torch.Tensor) -> Tiling:
    """Choose the tiling for a head. Its ``programs`` are the rows of ``best``."""
    return choose_tiling("head_argmax", weight)
