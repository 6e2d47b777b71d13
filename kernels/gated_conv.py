"""Gated short convolution of many tokens: ``C * (conv(B * x) + bias)``, causal and depthwise.

T tokens of S sequences packed end to end, H hidden, W width. ``bcx [T, 3H]`` has B, C and x side by
side. ``weight [H, W]``, newest tap last. ``bias [H]`` or None. ``out [T, H]``. ``cu_seqlens [S +
1]`` int32, ``slots [S]`` int64, ``lengths [S]`` int32 (context after this step). ``window [slots,
ring, H]`` has the W - 1 rows of ``B * x`` before each sequence's first token, at their positions
modulo ring. The newest rows are written to it.

Rounded to the dtype where Hugging Face rounds: after ``B * x``, the convolution and ``C * y``.
Least bytes: 4TH elements of bcx and out, (W + 1)H of weights, SH(W - 1 + min(n, ring)) of window.
"""

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.varlen import sequence_of_tile, tile_of_sequence, tiles


@triton.jit(do_not_specialize=["sequences", "ring"])
def _gated_conv_kernel(
    bcx_ptr,
    weight_ptr,
    bias_ptr,
    window_ptr,
    cu_seqlens_ptr,
    slots_ptr,
    lengths_ptr,
    out_ptr,
    sequences,
    ring,
    hidden,
    stride_bcx_t,
    stride_window_s,
    stride_window_r,
    stride_out_t,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    blocks = tl.cdiv(hidden, BLOCK_H)
    tile = tl.program_id(0) // blocks
    offs_h = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < hidden

    sequence = sequence_of_tile(cu_seqlens_ptr, tile, sequences, BLOCK_T)
    tile -= tile_of_sequence(cu_seqlens_ptr, sequence, BLOCK_T)
    first = tl.load(cu_seqlens_ptr + sequence)
    count = tl.load(cu_seqlens_ptr + sequence + 1) - first
    start = tl.load(lengths_ptr + sequence) - count
    window_ptr += tl.load(slots_ptr + sequence) * stride_window_s
    bcx_ptr += first.to(tl.int64) * stride_bcx_t
    out_ptr += first.to(tl.int64) * stride_out_t

    offs_t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = (offs_t < count)[:, None] & mask_h[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
    for tap in tl.static_range(WIDTH):
        weight = tl.load(weight_ptr + offs_h * WIDTH + tap, mask=mask_h, other=0).to(tl.float32)
        source = offs_t - (WIDTH - 1 - tap)
        inside = (source >= 0)[:, None]
        bx = _load_bx(bcx_ptr, source, offs_h, hidden, stride_bcx_t, mask & inside)
        if tap < WIDTH - 1:
            before = (source < 0) & (start + source >= 0)
            row = ((start + source) % ring).to(tl.int64) * stride_window_r
            old = tl.load(
                window_ptr + row[:, None] + offs_h[None, :],
                mask=mask & before[:, None],
                other=0,
            )
            bx = tl.where(inside, bx, old)
        acc += bx.to(tl.float32) * weight[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_h, mask=mask_h, other=0).to(tl.float32)[None, :]

    row = offs_t.to(tl.int64)[:, None]
    c = tl.load(bcx_ptr + row * stride_bcx_t + (hidden + offs_h)[None, :], mask=mask, other=0)
    y = acc.to(c.dtype).to(tl.float32)
    out = c.to(tl.float32) * y
    tl.store(out_ptr + row * stride_out_t + offs_h[None, :], out.to(c.dtype), mask=mask)

    # Only the first tile of a sequence reads its old rows. No thread may still be reading them
    # here.
    if tile == 0:
        tl.debug_barrier()
        kept = tl.minimum(count, ring)
        done = 0
        while done < kept:
            offs_new = count - kept + done + tl.arange(0, BLOCK_T)
            mask_new = (offs_new < count)[:, None] & mask_h[None, :]
            new = _load_bx(bcx_ptr, offs_new, offs_h, hidden, stride_bcx_t, mask_new)
            row_new = ((start + offs_new) % ring).to(tl.int64) * stride_window_r
            tl.store(window_ptr + row_new[:, None] + offs_h[None, :], new, mask=mask_new)
            done += BLOCK_T


@triton.jit
def _load_bx(bcx_ptr, offs_t, offs_h, hidden, stride_bcx_t, mask):
    """``B * x`` in bcx's dtype, zero where masked."""
    at = bcx_ptr + offs_t.to(tl.int64)[:, None] * stride_bcx_t + offs_h[None, :]
    b = tl.load(at, mask=mask, other=0)
    x = tl.load(at + 2 * hidden, mask=mask, other=0)
    return (b.to(tl.float32) * x.to(tl.float32)).to(b.dtype)


def gated_conv_triton(
    bcx: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    window: torch.Tensor,
    cu_seqlens: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Fill ``out`` and update ``window``; ``bcx`` may have gaps between rows."""
    tokens, hidden = out.shape
    sequences, ring, width = slots.shape[0], window.shape[1], weight.shape[1]
    block_t, block_h = 32, 64
    assert bcx.shape == (tokens, 3 * hidden) and window.shape[2] == hidden
    assert weight.shape == (hidden, width) and weight.is_contiguous()
    assert bias is None or (bias.shape == (hidden,) and bias.is_contiguous())
    assert bcx.stride(1) == out.stride(1) == window.stride(2) == 1
    assert bcx.dtype == weight.dtype == window.dtype == out.dtype != torch.float64
    assert 2 <= width <= min(ring, block_t)
    assert cu_seqlens.shape == (sequences + 1,) and lengths.shape == slots.shape
    if tokens == 0:
        return
    grid = (tiles(tokens, sequences, block_t) * triton.cdiv(hidden, block_h),)
    with torch.cuda.device_of(bcx):
        _gated_conv_kernel[grid](
            bcx,
            weight,
            bias,
            window,
            cu_seqlens,
            slots,
            lengths,
            out,
            sequences,
            ring,
            hidden,
            bcx.stride(0),
            window.stride(0),
            window.stride(1),
            out.stride(0),
            WIDTH=width,
            BLOCK_T=block_t,
            BLOCK_H=block_h,
            num_warps=4,
        )
