"""The cosines and sines of rotary embedding: ``cos(position * frequency)``, in float32.

``positions [T]`` int64, ``inv_freq [D/2]`` float32, ``cos, sin [T, D/2]`` float32: halves, since
both halves of a head turn by the same angles. Made once per step and read by every attention layer,
for D elements a token; computed there they would cost each layer a range reduction up to 128,000.
"""

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.pdl import pdl_options, pdl_wait


@triton.jit(do_not_specialize=["tokens"])
def _rope_kernel(
    positions_ptr,
    inv_freq_ptr,
    cos_ptr,
    sin_ptr,
    tokens,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = offs // HALF
    mask = token < tokens
    inv_freq = tl.load(inv_freq_ptr + offs % HALF)
    pdl_wait(PDL)
    position = tl.load(positions_ptr + token, mask=mask, other=0)
    angle = position.to(tl.float32) * inv_freq
    tl.store(cos_ptr + offs, tl.cos(angle), mask=mask)
    tl.store(sin_ptr + offs, tl.sin(angle), mask=mask)


def rope_triton(
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Fill ``cos`` and ``sin``; ``pdl`` as in norm_linear.py."""
    tokens, half = cos.shape
    assert positions.shape == (tokens,) and inv_freq.shape == (half,) and sin.shape == cos.shape
    assert cos.dtype == sin.dtype == inv_freq.dtype == torch.float32
    assert cos.is_contiguous() and sin.is_contiguous()
    assert positions.is_contiguous() and inv_freq.is_contiguous()
    if tokens == 0:
        return
    block = 128
    with torch.cuda.device_of(cos):
        _rope_kernel[(triton.cdiv(tokens * half, block),)](
            positions,
            inv_freq,
            cos,
            sin,
            tokens,
            HALF=half,
            BLOCK=block,
            num_warps=4,
            **pdl_options(pdl),
        )
