"""RMSNorm, alone or after a residual addition: ``x / sqrt(mean(x^2) + eps) * weight``.

``x [T, H]``, ``weight [H]``, ``out [T, H]``; ``add_rms_norm`` takes ``delta [T, H]`` too, writes
``total = x + delta`` rounded to the dtype, and normalises that. Computed in float32, rounded once.
Least bytes: 2TH elements, or 4TH with the addition, and H of weights.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, eps, hidden, stride_x_t, stride_out_t, BLOCK_H: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < hidden
    weight = tl.load(weight_ptr + offs_h, mask=mask_h, other=0)
    x = tl.load(x_ptr + token * stride_x_t + offs_h, mask=mask_h, other=0)
    out = _normalised(x.to(tl.float32), hidden, eps) * weight.to(tl.float32)
    tl.store(out_ptr + token * stride_out_t + offs_h, out.to(x.dtype), mask=mask_h)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    total_ptr,
    out_ptr,
    eps,
    hidden,
    stride_x_t,
    stride_delta_t,
    stride_total_t,
    stride_out_t,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < hidden
    weight = tl.load(weight_ptr + offs_h, mask=mask_h, other=0)
    x = tl.load(x_ptr + token * stride_x_t + offs_h, mask=mask_h, other=0)
    delta = tl.load(delta_ptr + token * stride_delta_t + offs_h, mask=mask_h, other=0)
    total = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
    tl.store(total_ptr + token * stride_total_t + offs_h, total, mask=mask_h)
    out = _normalised(total.to(tl.float32), hidden, eps) * weight.to(tl.float32)
    tl.store(out_ptr + token * stride_out_t + offs_h, out.to(x.dtype), mask=mask_h)


@triton.jit
def _normalised(x, size, eps):
    """Divide ``x``, zero beyond ``size``, by the root of its mean square."""
    return x * tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """Fill ``out``; tensors may have gaps between rows."""
    tokens, hidden = out.shape
    _check(weight, x, out)
    if tokens == 0:
        return
    block_h = triton.next_power_of_2(hidden)
    with torch.cuda.device_of(x):
        _rms_norm_kernel[(tokens,)](
            x,
            weight,
            out,
            eps,
            hidden,
            x.stride(0),
            out.stride(0),
            BLOCK_H=block_h,
            num_warps=_warps(block_h),
        )


def add_rms_norm_triton(
    x: torch.Tensor,
    delta: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    total: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Fill ``total`` and ``out``; gaps between rows are allowed. ``total`` may be ``x`` or
    ``delta``.
    """
    tokens, hidden = out.shape
    _check(weight, x, delta, total, out)
    if tokens == 0:
        return
    block_h = triton.next_power_of_2(hidden)
    with torch.cuda.device_of(x):
        _add_rms_norm_kernel[(tokens,)](
            x,
            delta,
            weight,
            total,
            out,
            eps,
            hidden,
            x.stride(0),
            delta.stride(0),
            total.stride(0),
            out.stride(0),
            BLOCK_H=block_h,
            num_warps=_warps(block_h),
        )


def _check(weight: torch.Tensor, *rows: torch.Tensor) -> None:
    tokens, hidden = rows[0].shape
    assert weight.shape == (hidden,) and weight.is_contiguous()
    for tensor in rows:
        assert tensor.shape == (tokens, hidden) and tensor.stride(1) == 1
        assert tensor.dtype == weight.dtype != torch.float64


def _warps(block_h: int) -> int:
    """Number of warps for sixteen elements a thread, at most eight."""
    return min(max(block_h // 512, 1), 8)
