"""RMSNorm and a projection of a few tokens in one launch: ``rms_norm(x) @ weight.T + bias``.

``x [T, K]`` of at most 16 tokens, ``norm [K]``, ``weight [N, K]``, ``bias [N]`` or None, ``scale
[N]`` of an int8 weight or None (gemv.py), ``out [T, N]``. Every program norms the tokens anew: they
are few and in the cache, and a launch costs more. Least bytes: NK elements. FLOPs: 2TNK.
"""

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.gemv import (
    check_tokens,
    dots,
    inverse_rms,
    normed,
    options,
    rows_of,
)
from lfm2_fast.kernels.pdl import pdl_wait
from lfm2_fast.kernels.tiling import REGISTERS, Tiling, choose_tiling


@triton.jit(do_not_specialize=["tokens"])
def _norm_linear_kernel(
    x_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    out_ptr,
    eps,
    tokens,
    count,
    stride_x_t,
    stride_out_t,
    K: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    offs_k = tl.arange(0, BLOCK_K)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.num_programs(0) * BLOCK_N
    tile = rows_of(weight_ptr, rows, count, offs_k, K)
    norm = tl.load(norm_ptr + offs_k, mask=offs_k < K, other=0)
    pdl_wait(PDL)
    scales = inverse_rms(x_ptr, tokens, stride_x_t, eps, offs_k, K, MOST)
    for _ in range(tl.program_id(0) * BLOCK_N, count, step):
        following = rows_of(weight_ptr, rows + step, count, offs_k, K)
        wide = tile.to(tl.float32)
        for token in range(tokens):
            x = normed(x_ptr, norm, scales, token, stride_x_t, offs_k, K, MOST)
            out = dots(wide, x, bias_ptr, scale_ptr, rows, count, DTYPE)
            tl.store(out_ptr + token * stride_out_t + rows, out.to(DTYPE), mask=rows < count)
        tile = following
        rows += step


def norm_linear_triton(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    out: torch.Tensor,
    *,
    pdl: bool = False,
    tiling: Tiling | None = None,
) -> None:
    """Fill ``out``; rows of ``x`` and ``out`` may stand apart.

    ``pdl`` lets the launch start while the one before it ends, ``tiling`` replaces the usual one.
    """
    tokens, count = out.shape
    check_tokens(x, norm, weight, bias, scale, tokens, count)
    assert out.stride(1) == 1 and out.dtype == x.dtype
    if tokens == 0:
        return
    block_k = triton.next_power_of_2(x.shape[1])
    tiling = tiling or choose_tiling("norm_linear", count, weight, block_k)
    with torch.cuda.device_of(x):
        _norm_linear_kernel[(tiling.programs,)](
            x,
            norm,
            weight,
            bias,
            scale,
            out,
            eps,
            tokens,
            count,
            x.stride(0),
            out.stride(0),
            maxnreg=REGISTERS,
            **options(x, tiling, block_k, pdl),
        )
