"""Rows of the embedding for the tokens, and the cosines and sines of their positions.

``embed.py`` and ``rope.py`` have the formulas and shapes. A decode step needs both before its first
layer, so one launch makes them: a program for each block of a row, and one for a token's angles.
"""

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.embed import check_embed, embed_block, store_row
from lfm2_fast.kernels.pdl import pdl_options, pdl_wait
from lfm2_fast.kernels.rope import check_rope, store_angles


@triton.jit
def _embed_rope_kernel(
    tokens_ptr,
    weight_ptr,
    scale_ptr,
    out_ptr,
    positions_ptr,
    inv_freq_ptr,
    cos_ptr,
    sin_ptr,
    stride_out_t,
    K: tl.constexpr,
    HALF: tl.constexpr,
    OWN_FREQ: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    # The weight does not change, but the previous step writes the row numbers to read.
    pdl_wait(PDL)
    block = tl.program_id(1)
    if block == tl.num_programs(1) - 1:
        offs_h = tl.arange(0, BLOCK_H)
        mask = offs_h < HALF
        offs = place * HALF + offs_h
        inv_freq = tl.load(inv_freq_ptr + (offs if OWN_FREQ else offs_h), mask=mask, other=0.0)
        position = tl.load(positions_ptr + place)
        store_angles(position, inv_freq, cos_ptr, sin_ptr, offs, mask, SCALE)
    else:
        token = tl.load(tokens_ptr + place)
        store_row(token, place, block, weight_ptr, scale_ptr, out_ptr, stride_out_t, K, BLOCK_K)


def embed_rope_triton(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    out: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    by: float = 1.0,
    pdl: bool = False,
) -> None:
    """Fill ``out``, which may have gaps between rows, and ``cos`` and ``sin``, both times ``by``.

    ``pdl`` as in norm_linear.py.
    """
    check_embed(tokens, weight, scale, out)
    check_rope(positions, inv_freq, cos, sin)
    count, width = out.shape
    assert len(cos) == count
    if count == 0:
        return
    half, block_k = cos.shape[1], embed_block(width)
    with torch.cuda.device_of(out):
        _embed_rope_kernel[(count, triton.cdiv(width, block_k) + 1)](
            tokens,
            weight,
            scale,
            out,
            positions,
            inv_freq,
            cos,
            sin,
            out.stride(0),
            K=width,
            HALF=half,
            OWN_FREQ=inv_freq.dim() == 2,
            SCALE=by,
            BLOCK_K=block_k,
            BLOCK_H=triton.next_power_of_2(half),
            num_warps=4,
            **pdl_options(pdl),
        )
