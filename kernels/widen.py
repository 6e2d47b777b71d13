"""Widening of an int4 matrix, for a library's product: ``out [N, K] = scale * (number - 8)``.

``weight [N, K / 2]`` bytes and ``scale [N, K / 32]`` float16 in the interleaved order of format
``INT4``, which gemv_int4.py describes. The last ``N % 8`` rows are side by side with each other.
One product in float32, rounded once. Least bytes: NK / 2 + NK / 16 read, NK elements written.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def _widen_int4_kernel(
    words_ptr, scale_ptr, out_ptr, count, K: tl.constexpr, BLOCK_W: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * 8
    lanes = tl.minimum(count - first, 8)
    word = (tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W))[:, None, None]
    lane = tl.arange(0, 8)[None, :, None]
    mask = (word < K // 8) & (lane < lanes)
    words = tl.load(words_ptr + first * (K // 8) + word * lanes + lane, mask=mask, other=0)
    group = first * (K // 32) + word // 4 * lanes + lane
    scale = tl.load(scale_ptr + group, mask=mask, other=0).to(tl.float32)
    byte = tl.arange(0, 4)[None, None, :]
    out_ptrs = out_ptr + (first + lane) * K + word // 4 * 32 + word % 4 * 4 + byte
    for half in tl.static_range(2):
        number = ((words >> (8 * byte + 4 * half)) & 15) - 8
        widened = (number.to(tl.float32) * scale).to(out_ptr.dtype.element_ty)
        tl.store(out_ptrs + 16 * half, widened, mask=mask)


def widen_int4_triton(weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """Fill ``out``, which is dense."""
    count, columns = out.shape
    assert weight.shape == (count, columns // 2) and weight.dtype == torch.uint8
    assert scale.shape == (count, columns // 32) and scale.dtype == torch.float16
    assert weight.is_contiguous() and scale.is_contiguous() and out.is_contiguous()
    assert columns % 32 == 0
    if out.numel() == 0:
        return
    block_w = min(triton.next_power_of_2(columns // 8), 64)
    with torch.cuda.device_of(out):
        _widen_int4_kernel[(triton.cdiv(count, 8), triton.cdiv(columns // 8, block_w))](
            weight.view(torch.int32),
            scale,
            out,
            count,
            K=columns,
            BLOCK_W=block_w,
            num_warps=4,
        )
