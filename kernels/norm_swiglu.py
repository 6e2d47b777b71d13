"""RMSNorm, gate and up projections and ``silu(gate) * up`` of a few tokens, in one launch.

``x [T, K]`` of at most 16 tokens, ``norm [K]``, ``weight [2F, K]`` with the gate's rows first,
``bias [2F]`` or None, ``scale [2F]`` of an int8 weight or None (gemv.py), ``out [T, F]``. A program
has the gate and up rows of the same outputs. It rounds where the reference rounds. Least bytes: 2FK
elements. FLOPs: 4TFK.
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
def _norm_swiglu_kernel(
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
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
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
        both, tiles = multiply(
            tiles, rows, words, columns, x_ptr, words_ptr, bias_ptr, scale_ptr, norm_ptr, scales,
            row, step, tokens, count, stride_x_t, K, BITS, PARTS, BLOCK_N, BLOCK_K, WARPS, DEPTH,
        )  # fmt: skip
        if change is not None:
            both = with_change(both, change, entry, low, row, count, RANK, STACKED, PARTS, BLOCK_N)
        gate, up = tl.split(tl.permute(tl.reshape(both, [16, 2, BLOCK_N]), [0, 2, 1]))
        silu = (gate / (1 + tl.exp(-gate))).to(DTYPE).to(tl.float32)
        offs_n = row + tl.arange(0, BLOCK_N)[None, :]
        mask = (offs_t < tokens) & (offs_n < count)
        tl.store(out_ptr + offs_t * stride_out_t + offs_n, (silu * up).to(DTYPE), mask=mask)


def norm_swiglu_triton(
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

    ``pdl``, ``tiling``: as in norm_linear.py.
    """
    assert out.shape == (len(x), len(weight) // 2) and out.stride(1) == 1 and out.dtype == x.dtype
    launch(
        _norm_swiglu_kernel,
        tiling or choose_tiling("norm_swiglu", weight, parts=2),
        x,
        weight,
        bias,
        scale,
        parts=2,
        pdl=pdl,
        **change_arguments(change),
        norm_ptr=norm,
        out_ptr=out,
        eps=eps,
        stride_out_t=out.stride(0),
    )
