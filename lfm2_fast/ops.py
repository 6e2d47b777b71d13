"""The vocabulary that the model is written in, and the only door to the bodies behind it.

A word ends where every output depends on every input, so that fusing more of it into one launch
never changes the model's text. ``Ops`` holds which bodies run; a model makes one for its device.
"""

from __future__ import annotations

import torch
from torch import nn

from lfm2_fast import reference as ref
from lfm2_fast.batch import Batch
from lfm2_fast.cache import ConvWindow, KVPages

BACKENDS = ("auto", "eager")

Rope = tuple[torch.Tensor, torch.Tensor]


class BackendError(RuntimeError):
    """The backend that was asked for cannot run here."""


class Ops:
    """The words, each made of the bodies that ``backend`` names.

    "eager" is plain PyTorch and runs on any device; "auto" takes the fastest there is, which today
    is the same. Raises BackendError for any other name.
    """

    def __init__(self, backend: str = "auto") -> None:
        if backend not in BACKENDS:
            raise BackendError(
                f"backend={backend!r} is not in this version of lfm2_fast; "
                f"choose one of {', '.join(map(repr, BACKENDS))}"
            )
        self.backend = "eager"

    def rope(self, positions: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype) -> Rope:
        """Cosines and sines ``[T, 1, D]`` of the tokens' positions, made once per step."""
        return ref.rope_ref(positions, inv_freq, dtype)

    def norm_linear(self, x: torch.Tensor, norm: nn.RMSNorm, linear: nn.Linear) -> torch.Tensor:
        """RMSNorm, then a projection: ``[T, H] -> [T, N]``."""
        return ref.linear_ref(_norm(x, norm), linear.weight, linear.bias)

    def conv_out_add(
        self,
        bcx: torch.Tensor,
        conv: nn.Module,
        residual: torch.Tensor,
        window: ConvWindow,
        batch: Batch,
    ) -> torch.Tensor:
        """``residual + out_proj(C * causal_conv(B * x))``: ``[T, 3H] -> [T, H]``; moves the window."""
        body = ref.gated_conv_step_ref if batch.max_query == 1 else ref.gated_conv_ref
        y = body(bcx, conv.conv.weight, conv.conv.bias, window.rows, batch)
        return residual + ref.linear_ref(y, conv.out_proj.weight, conv.out_proj.bias)

    def attend(
        self,
        qkv: torch.Tensor,
        attention: nn.Module,
        rope: Rope,
        pages: KVPages,
        batch: Batch,
    ) -> torch.Tensor:
        """QK-norm, RoPE, k and v into their pages, causal attention: ``[T, N] -> [T, heads * D]``."""
        heads, kv_heads = attention.num_heads, attention.num_kv_heads
        q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split(
            [heads, kv_heads, kv_heads], dim=1
        )
        q = ref.rotate_ref(_norm(q, attention.q_layernorm), *rope)
        k = ref.rotate_ref(_norm(k, attention.k_layernorm), *rope)
        return ref.attention_ref(q, k, v, pages.k, pages.v, batch)

    def linear_add(
        self, y: torch.Tensor, linear: nn.Linear, residual: torch.Tensor
    ) -> torch.Tensor:
        """``residual + linear(y)``: ``[T, K] -> [T, H]``."""
        return residual + ref.linear_ref(y, linear.weight, linear.bias)

    def norm_swiglu(self, x: torch.Tensor, norm: nn.RMSNorm, gate_up: nn.Linear) -> torch.Tensor:
        """RMSNorm, gate and up projections, ``silu(gate) * up``: ``[T, H] -> [T, F]``."""
        return ref.swiglu_ref(self.norm_linear(x, norm, gate_up))


def _norm(x: torch.Tensor, norm: nn.RMSNorm) -> torch.Tensor:
    assert norm.eps is not None
    return ref.rms_norm_ref(x, norm.weight, norm.eps)
