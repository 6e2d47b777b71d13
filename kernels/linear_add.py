"""Projection of a few tokens added to the residual stream: ``residual + (x @ weight.T + bias)``.

``x [T, K]`` of at most 16 tokens, ``weight [N, K]``, ``bias [N]`` or None, ``scale [N]`` of an int8
weight or None (gemv.py), ``residual, out [T, N]``; ``out`` may be ``residual``, and without a
residual it is the projection. The projection is rounded to the dtype, then the sum. Least bytes: NK
elements. FLOPs: 2TNK.
"""

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.gemv import launch, multiply
from lfm2_fast.kernels.gemv_low_rank import Change, change_arguments, low_of_tokens, with_change
from lfm2_fast.kernels.gemv_tiles import first_tiles, weight_places
from lfm2_fast.kernels.pdl import pdl_wait
from lfm2_fast.kernels.tiling import Tiling, choose_tiling


@triton.jit(do_not_specialize=["tokens"])
def _linear_add_kernel(
    x_ptr,
    words_ptr,
    bias_ptr,
    scale_ptr,
    residual_ptr,
    out_ptr,
    tokens,
    count,
    stride_x_t,
    stride_residual_t,
    stride_out_t,
    change,
    K: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    STACKED: tl.constexpr,
    PDL: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N
    step = tl.num_programs(0) * BLOCK_N
    rows, words, columns = weight_places(count, K, BITS, PARTS, BLOCK_N, BLOCK_K, WARPS)
    tiles = first_tiles(
        words_ptr, scale_ptr, rows, words, columns, first, step, count, K, BITS, BLOCK_K, DEPTH
    )  # fmt: skip
    pdl_wait(PDL)
    offs_t = tl.arange(0, 16)[:, None]
    if change is not None:
        entry, low = low_of_tokens(change, tokens, RANK, SPLITS, STACKED)
    for row in range(first, count, step):
        out, tiles = multiply(
            tiles, rows, words, columns, x_ptr, words_ptr, bias_ptr, scale_ptr, None, None,
            row, step, tokens, count, stride_x_t, K, BITS, PARTS, BLOCK_N, BLOCK_K, WARPS, DEPTH,
        )  # fmt: skip
        if change is not None:
            out = with_change(out, change, entry, low, row, count, RANK, STACKED, PARTS, BLOCK_N)
        offs_n = row + tl.arange(0, BLOCK_N)[None, :]
        mask = (offs_t < tokens) & (offs_n < count)
        if residual_ptr is not None:
            residual_ptrs = residual_ptr + offs_t * stride_residual_t + offs_n
            out += tl.load(residual_ptrs, mask=mask, other=0).to(tl.float32)
        out_ptrs = out_ptr + offs_t * stride_out_t + offs_n
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


def linear_add_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    *,
    change: Change | None = None,
    pdl: bool = False,
    tiling: Tiling | None = None,
) -> None:
    """Fill ``out``; all tensors but the weight may have gaps between rows.

    ``pdl``, ``tiling``: as in norm_linear.py.
    """
    for each in (out, out if residual is None else residual):
        assert each.shape == (len(x), len(weight)) and each.stride(1) == 1
        assert each.dtype == x.dtype
    launch(
        _linear_add_kernel,
        tiling or choose_tiling("linear_add", weight),
        x,
        weight,
        bias,
        scale,
        pdl=pdl,
        **change_arguments(change),
        residual_ptr=residual,
        out_ptr=out,
        stride_residual_t=0 if residual is None else residual.stride(0),
        stride_out_t=out.stride(0),
    )
