"""RMSNorm and a projection of a few tokens in one launch: ``rms_norm(x) @ weight.T + bias``.

``x [T, K]`` of at most 16 tokens, ``norm [K]``, ``weight [N, K]``, ``bias [N]`` or None, ``scale
[N]`` of an int8 weight or None (gemv.py), ``out [T, N]``. Every program norms the tokens again:
they are few and in the cache, and a launch costs more. Least bytes: NK elements. FLOPs: 2TNK.
"""

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.gemv import launch, multiply
from lfm2_fast.kernels.gemv_low_rank import Change, change_arguments, low_of_tokens, with_change
from lfm2_fast.kernels.gemv_rms import inverse_rms
from lfm2_fast.kernels.gemv_tiles import first_tiles, weight_places
from lfm2_fast.kernels.pdl import pdl_wait
from lfm2_fast.kernels.tiling import Tiling, choose_tiling


@triton.jit(do_not_specialize=["tokens"])
def _norm_linear_kernel(
    x_ptr,
    words_ptr,
    bias_ptr,
    scale_ptr,
    norm_ptr,
    out_ptr,
    eps,
    tokens,
    count,
    stride_x_t,
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
    scales = inverse_rms(x_ptr, tokens, stride_x_t, eps, K, BITS, BLOCK_K, WARPS)
    offs_t = tl.arange(0, 16)[:, None]
    if change is not None:
        entry, low = low_of_tokens(change, tokens, RANK, SPLITS, STACKED)
    for row in range(first, count, step):
        out, tiles = multiply(
            tiles, rows, words, columns, x_ptr, words_ptr, bias_ptr, scale_ptr, norm_ptr, scales,
            row, step, tokens, count, stride_x_t, K, BITS, PARTS, BLOCK_N, BLOCK_K, WARPS, DEPTH,
        )  # fmt: skip
        if change is not None:
            out = with_change(out, change, entry, low, row, count, RANK, STACKED, PARTS, BLOCK_N)
        offs_n = row + tl.arange(0, BLOCK_N)[None, :]
        mask = (offs_t < tokens) & (offs_n < count)
        out_ptrs = out_ptr + offs_t * stride_out_t + offs_n
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


def norm_linear_triton(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    out: torch.Tensor,
    *,
    change: Change | None = None,
    pdl: bool = False,
    tiling: Tiling | None = None,
) -> None:
    """Fill ``out``; ``x`` and ``out`` may have gaps between rows.

    ``pdl`` lets the kernel start while the previous one ends. ``tiling`` replaces the usual one.
    """
    assert out.shape == (len(x), len(weight)) and out.stride(1) == 1 and out.dtype == x.dtype
    tiling = tiling or choose_tiling("norm_linear", weight)
    launch(
        _norm_linear_kernel,
        tiling,
        x,
        weight,
        bias,
        scale,
        pdl=pdl,
        **change_arguments(change),
        norm_ptr=norm,
        out_ptr=out,
        eps=eps,
        stride_out_t=out.stride(0),
    )
