"""RMSNorm, gate and up projections and ``silu(gate) * up`` of a few tokens, in one launch.

``x [T, K]`` of at most 16 tokens, ``norm [K]``, ``weight [2F, K]`` with the gate's rows first,
``bias [2F]`` or None, ``scale [2F]`` of an int8 weight or None (gemv.py), ``out [T, F]``. A program
has the gate's and up's rows of the same outputs. Rounded where the reference rounds. Least bytes:
2FK elements. FLOPs: 4TFK.
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
def _norm_swiglu_kernel(
    x_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    out_ptr,
    eps,
    tokens,
    size,
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
    up_ptr = weight_ptr + tl.cast(size, tl.int64) * K
    up_bias_ptr, up_scale_ptr = bias_ptr, scale_ptr
    if bias_ptr is not None:
        up_bias_ptr += size
    if scale_ptr is not None:
        up_scale_ptr += size
    gate_tile = rows_of(weight_ptr, rows, size, offs_k, K)
    up_tile = rows_of(up_ptr, rows, size, offs_k, K)
    norm = tl.load(norm_ptr + offs_k, mask=offs_k < K, other=0)
    pdl_wait(PDL)
    scales = inverse_rms(x_ptr, tokens, stride_x_t, eps, offs_k, K, MOST)
    for _ in range(tl.program_id(0) * BLOCK_N, size, step):
        following_gate = rows_of(weight_ptr, rows + step, size, offs_k, K)
        following_up = rows_of(up_ptr, rows + step, size, offs_k, K)
        wide_gate, wide_up = gate_tile.to(tl.float32), up_tile.to(tl.float32)
        for token in range(tokens):
            x = normed(x_ptr, norm, scales, token, stride_x_t, offs_k, K, MOST)
            gate = dots(wide_gate, x, bias_ptr, scale_ptr, rows, size, DTYPE)
            up = dots(wide_up, x, up_bias_ptr, up_scale_ptr, rows, size, DTYPE)
            silu = (gate / (1 + tl.exp(-gate))).to(DTYPE).to(tl.float32)
            out = (silu * up).to(DTYPE)
            tl.store(out_ptr + token * stride_out_t + rows, out, mask=rows < size)
        gate_tile, up_tile = following_gate, following_up
        rows += step


def norm_swiglu_triton(
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

    ``pdl``, ``tiling``: as in norm_linear.py.
    """
    tokens, size = out.shape
    check_tokens(x, norm, weight, bias, scale, tokens, 2 * size)
    assert out.stride(1) == 1 and out.dtype == x.dtype
    if tokens == 0:
        return
    block_k = triton.next_power_of_2(x.shape[1])
    tiling = tiling or choose_tiling("norm_swiglu", size, weight, block_k, together=2)
    with torch.cuda.device_of(x):
        _norm_swiglu_kernel[(tiling.programs,)](
            x,
            norm,
            weight,
            bias,
            scale,
            out,
            eps,
            tokens,
            size,
            x.stride(0),
            out.stride(0),
            maxnreg=REGISTERS,
            **options(x, tiling, block_k, pdl),
        )
