"""RMSNorm, in_proj and the gated short convolution of one token per sequence, in one launch.

``C * (conv(B * x) + bias)`` with ``B, C, x = rms_norm(h) @ weight.T + in_bias``. With S sequences,
at most 16, H channels and W width: ``h [S, K]``, ``norm [K]``, ``weight [3H, K]``, ``in_bias [3H]``
or None; ``scale [3H]`` of an int8 weight or None (gemv.py); ``taps [H, W]``, newest last, ``bias
[H]`` or None; ``window, positions, slots`` as in ``gated_conv_step.py``; ``out [S, H]``.

A program has the three rows of a channel, so it has all that the channel's convolution needs:
nothing is recomputed, in the projection's epilogue, and no other program reads or writes the
channel's window. Before the out projection instead, every one of its programs would read all of B,
C, x and the window, which at 16 tokens is twenty times its weights. Least bytes: 3HK elements.
"""

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.gemv import (
    check_tokens,
    dots,
    inverse_rms,
    normed,
    options,
    rows_of,
)
from lfm2_fast.kernels.pdl import pdl_wait
from lfm2_fast.kernels.tiling import REGISTERS, Tiling, choose_tiling


@triton.jit(do_not_specialize=["tokens", "ring"])
def _norm_conv_kernel(
    h_ptr,
    norm_ptr,
    weight_ptr,
    in_bias_ptr,
    scale_ptr,
    taps_ptr,
    bias_ptr,
    window_ptr,
    positions_ptr,
    slots_ptr,
    out_ptr,
    eps,
    tokens,
    size,
    ring,
    stride_h_t,
    stride_window_s,
    stride_window_r,
    stride_out_t,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PDL: tl.constexpr,
):
    DTYPE: tl.constexpr = h_ptr.dtype.element_ty
    offs_k, offs_w = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_W)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.num_programs(0) * BLOCK_N
    c_ptr = weight_ptr + tl.cast(size, tl.int64) * K
    x_ptr = weight_ptr + 2 * tl.cast(size, tl.int64) * K
    c_bias_ptr, x_bias_ptr = in_bias_ptr, in_bias_ptr
    if in_bias_ptr is not None:
        c_bias_ptr += size
        x_bias_ptr += 2 * size
    c_scale_ptr, x_scale_ptr = scale_ptr, scale_ptr
    if scale_ptr is not None:
        c_scale_ptr += size
        x_scale_ptr += 2 * size
    b_tile = rows_of(weight_ptr, rows, size, offs_k, K)
    c_tile = rows_of(c_ptr, rows, size, offs_k, K)
    x_tile = rows_of(x_ptr, rows, size, offs_k, K)
    taps = rows_of(taps_ptr, rows, size, offs_w, WIDTH)
    norm = tl.load(norm_ptr + offs_k, mask=offs_k < K, other=0)
    pdl_wait(PDL)
    scales = inverse_rms(h_ptr, tokens, stride_h_t, eps, offs_k, K, MOST)
    for _ in range(tl.program_id(0) * BLOCK_N, size, step):
        following_b = rows_of(weight_ptr, rows + step, size, offs_k, K)
        following_c = rows_of(c_ptr, rows + step, size, offs_k, K)
        following_x = rows_of(x_ptr, rows + step, size, offs_k, K)
        following_taps = rows_of(taps_ptr, rows + step, size, offs_w, WIDTH)
        wide_b, wide_c = b_tile.to(tl.float32), c_tile.to(tl.float32)
        wide_x, mask = x_tile.to(tl.float32), rows < size
        for token in range(tokens):
            # The window is the chain's like all else that is not a weight: read and written below
            # the wait, it needs no second copy, however many steps are under way.
            position = tl.load(positions_ptr + token).to(tl.int32)
            slot_ptr = window_ptr + tl.load(slots_ptr + token) * stride_window_s
            source = position - (WIDTH - 1) + offs_w
            mask_old = mask[:, None] & ((source >= 0) & (offs_w < WIDTH - 1))[None, :]
            old_row = (source % ring).to(tl.int64) * stride_window_r
            old = tl.load(slot_ptr + old_row[None, :] + rows[:, None], mask=mask_old, other=0)

            normed_h = normed(h_ptr, norm, scales, token, stride_h_t, offs_k, K, MOST)
            b = dots(wide_b, normed_h, in_bias_ptr, scale_ptr, rows, size, DTYPE)
            c = dots(wide_c, normed_h, c_bias_ptr, c_scale_ptr, rows, size, DTYPE)
            x = dots(wide_x, normed_h, x_bias_ptr, x_scale_ptr, rows, size, DTYPE)
            bx = (b * x).to(DTYPE)
            history = tl.where((offs_w == WIDTH - 1)[None, :], bx[:, None], old)
            conv = tl.sum(history.to(tl.float32) * taps.to(tl.float32), axis=1)
            if bias_ptr is not None:
                conv += tl.load(bias_ptr + rows, mask=mask, other=0).to(tl.float32)
            out = c * conv.to(DTYPE).to(tl.float32)
            tl.store(out_ptr + token * stride_out_t + rows, out.to(DTYPE), mask=mask)
            new_row = (position % ring).to(tl.int64) * stride_window_r
            tl.store(slot_ptr + new_row + rows, bx, mask=mask)
        b_tile, c_tile, x_tile, taps = following_b, following_c, following_x, following_taps
        rows += step


def norm_conv_triton(
    h: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    in_bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    taps: torch.Tensor,
    bias: torch.Tensor | None,
    window: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    out: torch.Tensor,
    *,
    pdl: bool = False,
    tiling: Tiling | None = None,
) -> None:
    """Fill ``out`` and move ``window``; rows of ``h`` may stand apart.

    A slot stands in a launch once. ``pdl``, ``tiling``: as in norm_linear.py.
    """
    tokens, size = out.shape
    ring, width = window.shape[1], taps.shape[1]
    check_tokens(h, norm, weight, in_bias, scale, tokens, 3 * size)
    assert window.shape[2] == size and window.stride(2) == out.stride(1) == 1
    assert taps.shape == (size, width) and taps.is_contiguous()
    assert bias is None or (bias.shape == (size,) and bias.is_contiguous())
    assert taps.dtype == window.dtype == out.dtype == h.dtype
    assert 2 <= width <= ring
    assert positions.shape == slots.shape == (tokens,)
    assert positions.is_contiguous() and slots.is_contiguous()
    if tokens == 0:
        return
    block_k = triton.next_power_of_2(h.shape[1])
    tiling = tiling or choose_tiling("norm_conv", size, weight, block_k, together=3)
    with torch.cuda.device_of(h):
        _norm_conv_kernel[(tiling.programs,)](
            h,
            norm,
            weight,
            in_bias,
            scale,
            taps,
            bias,
            window,
            positions,
            slots,
            out,
            eps,
            tokens,
            size,
            ring,
            h.stride(0),
            window.stride(0),
            window.stride(1),
            out.stride(0),
            WIDTH=width,
            BLOCK_W=triton.next_power_of_2(width),
            maxnreg=REGISTERS,
            **options(h, tiling, block_k, pdl),
        )
