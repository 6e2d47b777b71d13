"""Gated short convolution of one token per sequence: ``C * (conv(B * x) + bias)``.

S sequences, H hidden, W width. ``bcx [S, 3H]`` has B, C and x side by side. ``weight [H, W]``,
newest tap last. ``bias [H]`` or None. ``out [S, H]``. ``positions [S]`` and ``slots [S]`` int64.
``window [slots, ring, H]`` has the W - 1 rows of ``B * x`` before each token, at their positions
modulo ring. The token's own row is written to another row of it.

The sum runs in the order of ``gated_conv``, so that both give the same bits. Least bytes: 4SH
elements of bcx and out, (W + 1)H of weights, SHW of window.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["ring"])
def _gated_conv_step_kernel(
    bcx_ptr,
    weight_ptr,
    bias_ptr,
    window_ptr,
    positions_ptr,
    slots_ptr,
    out_ptr,
    ring,
    hidden,
    stride_bcx_t,
    stride_window_s,
    stride_window_r,
    stride_out_t,
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < hidden

    # The window and the weights do not depend on the projection that makes bcx: they come first.
    position = tl.load(positions_ptr + sequence).to(tl.int32)
    window_ptr += tl.load(slots_ptr + sequence) * stride_window_s + offs_h
    weight_ptr += offs_h * WIDTH
    acc = tl.zeros([BLOCK_H], dtype=tl.float32)
    for tap in tl.static_range(WIDTH - 1):
        weight = tl.load(weight_ptr + tap, mask=mask_h, other=0).to(tl.float32)
        source = position - (WIDTH - 1 - tap)
        row = (source % ring).to(tl.int64) * stride_window_r
        old = tl.load(window_ptr + row, mask=mask_h & (source >= 0), other=0)
        acc += old.to(tl.float32) * weight
    weight = tl.load(weight_ptr + (WIDTH - 1), mask=mask_h, other=0).to(tl.float32)

    bcx_ptr += sequence * stride_bcx_t + offs_h
    b = tl.load(bcx_ptr, mask=mask_h, other=0)
    c = tl.load(bcx_ptr + hidden, mask=mask_h, other=0)
    x = tl.load(bcx_ptr + 2 * hidden, mask=mask_h, other=0)
    bx = (b.to(tl.float32) * x.to(tl.float32)).to(b.dtype)
    acc += bx.to(tl.float32) * weight
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_h, mask=mask_h, other=0).to(tl.float32)
    out = c.to(tl.float32) * acc.to(c.dtype).to(tl.float32)
    tl.store(out_ptr + sequence * stride_out_t + offs_h, out.to(c.dtype), mask=mask_h)
    row = (position % ring).to(tl.int64) * stride_window_r
    tl.store(window_ptr + row, bx, mask=mask_h)


def gated_conv_step_triton(
    bcx: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    window: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Fill ``out`` and update ``window``; ``bcx`` may have gaps between rows."""
    sequences, hidden = out.shape
    ring, width = window.shape[1], weight.shape[1]
    assert bcx.shape == (sequences, 3 * hidden) and window.shape[2] == hidden
    assert weight.shape == (hidden, width) and weight.is_contiguous()
    assert bias is None or (bias.shape == (hidden,) and bias.is_contiguous())
    assert bcx.stride(1) == out.stride(1) == window.stride(2) == 1
    assert bcx.dtype == weight.dtype == window.dtype == out.dtype != torch.float64
    assert 2 <= width <= ring
    assert positions.shape == slots.shape == (sequences,)
    if sequences == 0:
        return
    block_h = 128
    with torch.cuda.device_of(bcx):
        _gated_conv_step_kernel[(sequences, triton.cdiv(hidden, block_h))](
            bcx,
            weight,
            bias,
            window,
            positions,
            slots,
            out,
            ring,
            hidden,
            bcx.stride(0),
            window.stride(0),
            window.stride(1),
            out.stride(0),
            WIDTH=width,
            BLOCK_H=block_h,
            num_warps=2,
        )
