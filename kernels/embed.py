"""Rows of the embedding for the tokens; int8 rows are widened and scaled.

T tokens, V rows, K columns. ``tokens [T]`` int64, from 0 to V - 1 (not checked), or None for all
rows in order, which widens a matrix. ``weight [V, K]``. ``scale [V]`` float32 of an int8 weight, or
None. ``out [T, K]``. One product in float32, rounded once. Least bytes: 2TK elements.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def store_row(
    token,
    place,
    block,
    weight_ptr,
    scale_ptr,
    out_ptr,
    stride_out_t,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write a block of a token's row to row ``place`` of ``out``."""
    offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = offs_k < K
    row = tl.load(weight_ptr + token * K + offs_k, mask=mask, other=0)
    if scale_ptr is not None:
        row = row.to(tl.float32) * tl.load(scale_ptr + token)
    tl.store(out_ptr + place * stride_out_t + offs_k, row.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _embed_kernel(
    tokens_ptr,
    weight_ptr,
    scale_ptr,
    out_ptr,
    stride_out_t,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    token = place if tokens_ptr is None else tl.load(tokens_ptr + place)
    block = tl.program_id(1)
    store_row(token, place, block, weight_ptr, scale_ptr, out_ptr, stride_out_t, K, BLOCK_K)


def embed_triton(
    tokens: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Fill ``out``, which may have gaps between rows."""
    check_embed(tokens, weight, scale, out)
    count, width = out.shape
    if count == 0:
        return
    block_k = embed_block(width)
    with torch.cuda.device_of(out):
        _embed_kernel[(count, triton.cdiv(width, block_k))](
            tokens, weight, scale, out, out.stride(0), K=width, BLOCK_K=block_k, num_warps=4
        )


def check_embed(
    tokens: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Assert that shapes, dtypes and layouts are as above."""
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


def embed_block(width: int) -> int:
    """Return the columns of a program."""
    return min(triton.next_power_of_2(width), 1024)
