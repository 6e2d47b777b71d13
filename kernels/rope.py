"""Cosines and sines of rotary embedding: ``scale * cos(position * frequency)``, in float32.

``positions [T]`` int64, ``inv_freq [D/2]`` float32, ``cos, sin [T, D/2]`` float32. They have D/2
columns because both halves of a head rotate by the same angles. ``inv_freq [T, D/2]`` has separate
frequencies for each token, made by the step. The result is computed once per step and read by every
attention layer, D elements a token. In each layer, it would cost a range reduction up to 128,000.
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
    OWN_FREQ: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = offs // HALF
    mask = token < tokens
    if OWN_FREQ:
        pdl_wait(PDL)
        inv_freq = tl.load(inv_freq_ptr + offs, mask=mask, other=0.0)
    else:
        inv_freq = tl.load(inv_freq_ptr + offs % HALF)
        pdl_wait(PDL)
    position = tl.load(positions_ptr + token, mask=mask, other=0)
    angle = position.to(tl.float32) * inv_freq
    tl.store(cos_ptr + offs, tl.cos(angle) * SCALE, mask=mask)
    tl.store(sin_ptr + offs, tl.sin(angle) * SCALE, mask=mask)


def rope_triton(
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    scale: float = 1.0,
    pdl: bool = False,
) -> None:
    """Fill ``cos`` and ``sin``, both times ``scale``; ``pdl`` as in norm_linear.py."""
    tokens, half = cos.shape
    own = inv_freq.dim() == 2
    assert positions.shape == (tokens,) and sin.shape == cos.shape
    assert inv_freq.shape == ((tokens, half) if own else (half,))
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
            OWN_FREQ=own,
            SCALE=scale,
            BLOCK=block,
            num_warps=4,
            **pdl_options(pdl),
        )
