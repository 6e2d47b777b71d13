"""Cosines and sines of rotary embedding: ``scale * cos(position * frequency)``, in float32.

``positions [T]`` int64, ``inv_freq [D/2]`` float32, ``cos, sin [T, D/2]`` float32. They have D/2
columns because both halves of a head rotate by the same angles. ``inv_freq [T, D/2]`` has separate
frequencies for each token, made by the step. The result is computed once per step and read by every
attention layer, D elements a token. Otherwise each layer would reduce angles of up to 128,000.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def store_angles(position, inv_freq, cos_ptr, sin_ptr, offs, mask, SCALE: tl.constexpr):
    """Write the cosines and sines of positions times frequencies, both times ``SCALE``."""
    angle = position.to(tl.float32) * inv_freq
    tl.store(cos_ptr + offs, tl.cos(angle) * SCALE, mask=mask)
    tl.store(sin_ptr + offs, tl.sin(angle) * SCALE, mask=mask)


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
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = offs // HALF
    mask = token < tokens
    own = offs if OWN_FREQ else offs % HALF
    inv_freq = tl.load(inv_freq_ptr + own, mask=mask, other=0.0)
    position = tl.load(positions_ptr + token, mask=mask, other=0)
    store_angles(position, inv_freq, cos_ptr, sin_ptr, offs, mask, SCALE)


def rope_triton(
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    scale: float = 1.0,
) -> None:
    """Fill ``cos`` and ``sin``, both times ``scale``."""
    check_rope(positions, inv_freq, cos, sin)
    tokens, half = cos.shape
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
            OWN_FREQ=inv_freq.dim() == 2,
            SCALE=scale,
            BLOCK=block,
            num_warps=4,
        )


def check_rope(
    positions: torch.Tensor, inv_freq: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> None:
    """Assert that shapes, dtypes and layouts are as above."""
    tokens, half = cos.shape
    assert positions.shape == (tokens,) and sin.shape == cos.shape
    assert inv_freq.shape == ((tokens, half) if inv_freq.dim() == 2 else (half,))
    assert cos.dtype == sin.dtype == inv_freq.dtype == torch.float32
    assert cos.is_contiguous() and sin.is_contiguous()
    assert positions.is_contiguous() and inv_freq.is_contiguous()
