"""Rows of the embedding for the tokens; int8 rows are widened and scaled.

T tokens, V rows, K columns. ``tokens [T]`` int64, from 0 to V - 1 (not checked), or None for all
rows in order, which widens a matrix. ``weight [V, K]``. ``scale [V]`` float32 of an int8 weight, or
None. ``out [T, K]``. One product in float32, rounded once. Least bytes: 2TK elements.
"""

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.pdl import pdl_options, pdl_wait


@triton.jit
def _embed_kernel(
    tokens_ptr,
    weight_ptr,
    scale_ptr,
    out_ptr,
    stride_out_t,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = offs_k < K
    # The weight does not change, but the previous step writes the row numbers to read.
    pdl_wait(PDL)
    token = place if tokens_ptr is None else tl.load(tokens_ptr + place)
    row = tl.load(weight_ptr + token * K + offs_k, mask=mask, other=0)
    if scale_ptr is not None:
        row = row.to(tl.float32) * tl.load(scale_ptr + token)
    tl.store(out_ptr + place * stride_out_t + offs_k, row.to(out_ptr.dtype.element_ty), mask=mask)


def embed_triton(
    tokens: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    out: torch.Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Fill ``out``, which may have gaps between rows; ``pdl`` as in norm_linear.py."""
    count, width = out.shape
    if tokens is None:
        assert len(weight) == count
    else:
        assert tokens.shape == (count,) and tokens.dtype == torch.int64 and tokens.is_contiguous()
    assert weight.shape[1:] == (width,) and weight.is_contiguous() and out.stride(1) == 1
    assert weight.dtype == (out.dtype if scale is None else torch.int8)
    if scale is not None:
        assert scale.shape == weight.shape[:1] and scale.is_contiguous()
        assert scale.dtype == torch.float32
    if count == 0:
        return
    block_k = min(triton.next_power_of_2(width), 1024)
    with torch.cuda.device_of(out):
        _embed_kernel[(count, triton.cdiv(width, block_k))](
            tokens,
            weight,
            scale,
            out,
            out.stride(0),
            K=width,
            BLOCK_K=block_k,
            num_warps=4,
            **pdl_options(pdl),
        )
