"""SwiGLU's activation: ``silu(gate) * up``.

``gate_up [T, 2F]``, gate first; ``out [T, F]``. Computed in float32, rounded once. Least bytes: 3TF
elements.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _swiglu_kernel(
    gate_up_ptr, out_ptr, size, stride_gate_up_t, stride_out_t, BLOCK_F: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_f = offs_f < size
    gate_up_ptr += token * stride_gate_up_t + offs_f
    gate = tl.load(gate_up_ptr, mask=mask_f, other=0)
    up = tl.load(gate_up_ptr + size, mask=mask_f, other=0)
    wide = gate.to(tl.float32)
    out = wide / (1 + tl.exp(-wide)) * up.to(tl.float32)
    tl.store(out_ptr + token * stride_out_t + offs_f, out.to(gate.dtype), mask=mask_f)


def swiglu_triton(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """Fill ``out``; tensors may have gaps between rows."""
    tokens, size = out.shape
    assert gate_up.shape == (tokens, 2 * size)
    assert gate_up.stride(1) == out.stride(1) == 1
    assert gate_up.dtype == out.dtype != torch.float64
    if tokens == 0:
        return
    block_f = 1024
    with torch.cuda.device_of(gate_up):
        _swiglu_kernel[(tokens, triton.cdiv(size, block_f))](
            gate_up,
            out,
            size,
            gate_up.stride(0),
            out.stride(0),
            BLOCK_F=block_f,
            num_warps=4,
        )
