"""RMSNorm, in_proj and the gated short convolution of one token per sequence, in one launch.

``C * (conv(B * x) + bias)`` with ``B, C, x = rms_norm(h) @ weight.T + in_bias``. S sequences, at
most 16, H channels, W width. ``h [S, K]``, ``norm [K]``, ``weight [3H, K]``, ``in_bias [3H]`` or
None. ``scale [3H]`` of an int8 weight or None (gemv.py). ``taps [H, W]``, newest last, ``bias [H]``
or None. ``window, positions, slots`` as in ``gated_conv_step.py``. ``out [S, H]``.

A program has the three rows of a channel, so it has all inputs of the channel's convolution.
Nothing is computed twice, and no other program touches the channel's window. If the convolution
were fused into out_proj, each of its programs would read all of B, C, x and the window. At 16
tokens that is twenty times its weights. Least bytes: 3HK elements.
"""

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.gemv import launch, multiply
from lfm2_fast.kernels.gemv_low_rank import Change, change_arguments, low_of_tokens, with_change
from lfm2_fast.kernels.gemv_rms import inverse_rms
from lfm2_fast.kernels.gemv_tiles import first_tiles, weight_places
from lfm2_fast.kernels.pdl import pdl_wait
from lfm2_fast.kernels.tiling import Tiling, choose_tiling


@triton.jit(do_not_specialize=["tokens", "ring"])
def _norm_conv_kernel(
    x_ptr,
    words_ptr,
    bias_ptr,
    scale_ptr,
    norm_ptr,
    taps_ptr,
    conv_bias_ptr,
    window_ptr,
    positions_ptr,
    slots_ptr,
    out_ptr,
    eps,
    tokens,
    count,
    ring,
    stride_x_t,
    stride_window_s,
    stride_window_r,
    stride_out_t,
    change,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    VERIFIED: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    STACKED: tl.constexpr,
    PDL: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    first = tl.program_id(0) * BLOCK_N
    step = tl.num_programs(0) * BLOCK_N
    rows, words, columns = weight_places(count, K, BITS, PARTS, BLOCK_N, BLOCK_K, WARPS)
    tiles = first_tiles(
        words_ptr, scale_ptr, rows, words, columns, first, step, count, K, BITS, BLOCK_K, DEPTH
    )  # fmt: skip
    taps = _taps(taps_ptr, first, count, WIDTH, BLOCK_N)
    pdl_wait(PDL)
    scales = inverse_rms(x_ptr, tokens, stride_x_t, eps, K, BITS, BLOCK_K, WARPS)
    offs_t = tl.arange(0, 16)
    # The window belongs to the chain, like all tensors that are not weights. It is read and written
    # below the wait, so it needs no second copy for any number of running steps.
    is_token = offs_t < tokens
    position = tl.load(positions_ptr + offs_t, mask=is_token, other=0).to(tl.int32)
    slot = tl.load(slots_ptr + offs_t, mask=is_token, other=0).to(tl.int32) * stride_window_s
    new_at = (slot + position % ring * stride_window_r)[:, None]
    old_at, is_old = (), ()
    for back in tl.static_range(WIDTH - 1, 0, -1):
        source = position - back
        old_at += ((slot + source % ring * stride_window_r)[:, None],)
        is_old += ((is_token & (source >= 0))[:, None],)
    if change is not None:
        entry, low = low_of_tokens(change, tokens, RANK, SPLITS, STACKED)
    for row in range(first, count, step):
        offs_n = row + tl.arange(0, BLOCK_N)
        mask_n, mask = offs_n < count, is_token[:, None] & (offs_n < count)[None, :]
        if not VERIFIED:
            old = _old(window_ptr, old_at, is_old, offs_n, mask_n, WIDTH)
        following = _taps(taps_ptr, row + step, count, WIDTH, BLOCK_N)
        bcx, tiles = multiply(
            tiles, rows, words, columns, x_ptr, words_ptr, bias_ptr, scale_ptr, norm_ptr, scales,
            row, step, tokens, count, stride_x_t, K, BITS, PARTS, BLOCK_N, BLOCK_K, WARPS, DEPTH,
        )  # fmt: skip
        if change is not None:
            bcx = with_change(bcx, change, entry, low, row, count, RANK, STACKED, PARTS, BLOCK_N)
        # B, C, x and an empty fourth part, because a tile's rows are a power of two.
        pairs = tl.permute(tl.reshape(bcx, [16, 2, 2, BLOCK_N]), [0, 3, 1, 2])
        b_x, c_none = tl.split(pairs)
        b, x = tl.split(b_x)
        c, _ = tl.split(c_none)
        bx = (b * x).to(DTYPE)
        tl.store(window_ptr + new_at + offs_n[None, :], bx, mask=mask)
        if VERIFIED:
            # A token reads the window that an earlier token of its slot, in another thread, wrote.
            tl.debug_barrier()
            old = _old(window_ptr, old_at, is_old, offs_n, mask_n, WIDTH)
        conv = bx.to(tl.float32) * taps[WIDTH - 1].to(tl.float32)[None, :]
        for w in tl.static_range(WIDTH - 1):
            conv += old[w].to(tl.float32) * taps[w].to(tl.float32)[None, :]
        if conv_bias_ptr is not None:
            conv_bias = tl.load(conv_bias_ptr + offs_n, mask=mask_n, other=0)
            conv += conv_bias.to(tl.float32)[None, :]
        out = (c * conv.to(DTYPE).to(tl.float32)).to(DTYPE)
        tl.store(out_ptr + offs_t[:, None] * stride_out_t + offs_n[None, :], out, mask=mask)
        taps = following


@triton.jit
def _taps(taps_ptr, first, count, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Taps of the channels from ``first`` on, WIDTH of ``[BLOCK_N]``."""
    offs_n = first + tl.arange(0, BLOCK_N)
    taps = ()
    for w in tl.static_range(WIDTH):
        taps += (tl.load(taps_ptr + offs_n * WIDTH + w, mask=offs_n < count, other=0),)
    return taps


@triton.jit
def _old(window_ptr, old_at, is_old, offs_n, mask_n, WIDTH: tl.constexpr):
    """Rows of the window before the new one, WIDTH - 1 of ``[16, BLOCK_N]``."""
    old = ()
    for w in tl.static_range(WIDTH - 1):
        ptrs = window_ptr + old_at[w] + offs_n[None, :]
        old += (tl.load(ptrs, mask=is_old[w] & mask_n[None, :], other=0),)
    return old


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
    verified: bool = False,
    change: Change | None = None,
    pdl: bool = False,
    tiling: Tiling | None = None,
) -> None:
    """Fill ``out`` and update ``window``; ``h`` may have gaps between rows.

    A slot may occur once in a launch. With ``verified`` several tokens may be of one slot, each a
    position later; the ring must hold all that they read and write. ``pdl``, ``tiling``: as in
    norm_linear.py.
    """
    tokens, size = out.shape
    ring, width = window.shape[1], taps.shape[1]
    assert tokens == len(h) and len(weight) == 3 * size
    assert window.shape[2] == size and window.stride(2) == out.stride(1) == 1
    assert taps.shape == (size, width) and taps.is_contiguous()
    assert bias is None or (bias.shape == (size,) and bias.is_contiguous())
    assert taps.dtype == window.dtype == out.dtype == h.dtype
    assert 2 <= width <= ring
    # Offsets of 64 bits would cost registers: a window of 2,048 channels has 250,000 slots.
    assert len(window) * window.stride(0) < 2**31
    assert positions.shape == slots.shape == (tokens,)
    assert positions.is_contiguous() and slots.is_contiguous()
    launch(
        _norm_conv_kernel,
        tiling or choose_tiling("norm_conv", weight, parts=3),
        h,
        weight,
        in_bias,
        scale,
        parts=3,
        pdl=pdl,
        **change_arguments(change),
        norm_ptr=norm,
        taps_ptr=taps,
        conv_bias_ptr=bias,
        window_ptr=window,
        positions_ptr=positions,
        slots_ptr=slots,
        out_ptr=out,
        eps=eps,
        ring=ring,
        stride_window_s=window.stride(0),
        stride_window_r=window.stride(1),
        stride_out_t=out.stride(0),
        WIDTH=width,
        VERIFIED=verified,
    )
