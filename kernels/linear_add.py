"""A projection of a few tokens added to the residual stream: ``residual + (x @ weight.T + bias)``.

``x [T, K]`` of at most 16 tokens, ``weight [N, K]``, ``bias [N]`` or None, ``scale [N]`` of an int8
weight or None (gemv.py), ``residual, out [T, N]``; ``out`` may be ``residual``. The projection is
rounded to the dtype, then the sum.

A program takes its rows through K, BLOCK_K at a time, and K is split over its threads alone: the
N of a model gives every processor its share of rows, so splits of K over programs would bring no
more bytes under way, only partial sums to add up. Least bytes: NK elements. FLOPs: 2TNK.
"""

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.gemv import check_tokens, options, rows_of
from lfm2_fast.kernels.pdl import pdl_wait
from lfm2_fast.kernels.tiling import REGISTERS, Tiling, choose_tiling


@triton.jit(do_not_specialize=["tokens"])
def _linear_add_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    residual_ptr,
    out_ptr,
    tokens,
    count,
    stride_x_t,
    stride_residual_t,
    stride_out_t,
    K: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    offs_t, offs_k = tl.arange(0, MOST), tl.arange(0, BLOCK_K)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.num_programs(0) * BLOCK_N
    tile = rows_of(weight_ptr, rows, count, offs_k, K)
    pdl_wait(PDL)
    for _ in range(tl.program_id(0) * BLOCK_N, count, step):
        acc = tl.zeros([MOST, BLOCK_N], tl.float32)
        for first in range(0, K, BLOCK_K):
            # What follows this row's last tile is the next row's first.
            is_last = first + BLOCK_K >= K
            following = rows_of(
                weight_ptr,
                rows + tl.where(is_last, step, 0),
                count,
                offs_k + tl.where(is_last, 0, first + BLOCK_K),
                K,
            )
            wide = tile.to(tl.float32)
            for token in range(tokens):
                x_ptrs = x_ptr + token * stride_x_t + first + offs_k
                x = tl.load(x_ptrs, mask=first + offs_k < K, other=0).to(tl.float32)
                partial = tl.sum(wide * x[None, :], axis=1)
                acc += tl.where((offs_t == token)[:, None], partial[None, :], 0)
            tile = following
        mask = (offs_t < tokens)[:, None] & (rows < count)[None, :]
        if scale_ptr is not None:
            acc *= tl.load(scale_ptr + rows, mask=rows < count, other=0)[None, :]
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + rows, mask=rows < count, other=0)
            acc += bias.to(tl.float32)[None, :]
        at = offs_t[:, None] * stride_residual_t + rows[None, :]
        residual = tl.load(residual_ptr + at, mask=mask, other=0)
        out = residual.to(tl.float32) + acc.to(residual.dtype).to(tl.float32)
        at = offs_t[:, None] * stride_out_t + rows[None, :]
        tl.store(out_ptr + at, out.to(residual.dtype), mask=mask)
        rows += step


def linear_add_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    residual: torch.Tensor,
    out: torch.Tensor,
    *,
    pdl: bool = False,
    tiling: Tiling | None = None,
) -> None:
    """Fill ``out``; rows of all but the weight may stand apart.

    ``pdl``, ``tiling``: as in norm_linear.py.
    """
    tokens, count = out.shape
    check_tokens(x, None, weight, bias, scale, tokens, count)
    assert residual.shape == out.shape and residual.stride(1) == out.stride(1) == 1
    assert residual.dtype == out.dtype == x.dtype
    if tokens == 0:
        return
    block_k = min(triton.next_power_of_2(x.shape[1]), 1024)
    tiling = tiling or choose_tiling("linear_add", count, weight, block_k)
    with torch.cuda.device_of(x):
        _linear_add_kernel[(tiling.programs,)](
            x,
            weight,
            bias,
            scale,
            residual,
            out,
            tokens,
            count,
            x.stride(0),
            residual.stride(0),
            out.stride(0),
            # Of int8 the compiler would take 64 registers, and spill.
            maxnreg=None if scale is None else REGISTERS,
            **options(x, tiling, block_k, pdl),
        )
