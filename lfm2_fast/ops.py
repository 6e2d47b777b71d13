"""The vocabulary that the model is written in, and the only door to the bodies behind it.

A word ends where every output depends on every input, so that fusing more of it into one launch
never changes the model's text. Words are made of small operations; a backend is a subclass of
``Ops`` that brings its own bodies for the small operations, for whole words, or for both.
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


def choose(backend: str, device: torch.device) -> Ops:
    """The operations that ``backend`` names, for a model on ``device``.

    "eager" is plain PyTorch and runs on any device; "auto" takes the fastest there is, which today
    is the same. Raises BackendError for a name that is unknown or cannot run here.
    """
    if backend not in BACKENDS:
        raise BackendError(
            f"backend={backend!r} is not in this version of lfm2_fast; "
            f"choose one of {', '.join(map(repr, BACKENDS))}"
        )
    return Ops()


class Ops:
    """The words in plain PyTorch; with T tokens packed, H hidden, D head size.

    Every operation gives a new tensor and mutates nothing but the ``window`` or ``pages`` that it
    is handed.
    """

    name = "eager"

    def norm_linear(self, x: torch.Tensor, norm: nn.RMSNorm, linear: nn.Linear) -> torch.Tensor:
        """RMSNorm, then a projection: ``[T, H] -> [T, N]``."""
        return self.linear(self.rms_norm(x, norm), linear)

    def conv_out_add(
        self,
        bcx: torch.Tensor,
        conv: nn.Module,
        residual: torch.Tensor,
        window: ConvWindow,
        batch: Batch,
    ) -> torch.Tensor:
        """``residual + out_proj(C * causal_conv(B * x))``: ``[T, 3H] -> [T, H]``; moves the window."""
        y = self.gated_conv(bcx, conv.conv, window, batch)
        return self.linear_add(y, conv.out_proj, residual)

    def attend(
        self,
        qkv: torch.Tensor,
        attention: nn.Module,
        rope: Rope,
        pages: KVPages,
        batch: Batch,
    ) -> torch.Tensor:
        """QK-norm, RoPE, k and v into their pages, causal attention: ``[T, N] -> [T, heads * D]``."""
        q = self.qk_norm_rope(qkv, attention, rope, pages, batch)
        return self.attention(q, pages, batch)

    def linear_add(
        self, y: torch.Tensor, linear: nn.Linear, residual: torch.Tensor
    ) -> torch.Tensor:
        """``residual + linear(y)``: ``[T, K] -> [T, H]``."""
        return residual + self.linear(y, linear)

    def norm_swiglu(self, x: torch.Tensor, norm: nn.RMSNorm, gate_up: nn.Linear) -> torch.Tensor:
        """RMSNorm, gate and up projections, ``silu(gate) * up``: ``[T, H] -> [T, F]``."""
        return self.swiglu(self.norm_linear(x, norm, gate_up))

    def rope(self, positions: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype) -> Rope:
        """Cosines and sines ``[T, 1, D]`` of the tokens' positions, made once per step."""
        return ref.rope_ref(positions, inv_freq, dtype)

    def linear(self, x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        """A projection alone: ``[T, K] -> [T, N]``."""
        return ref.linear_ref(x, linear.weight, linear.bias)

    def rms_norm(self, x: torch.Tensor, norm: nn.RMSNorm) -> torch.Tensor:
        """RMSNorm over the last axis."""
        return ref.rms_norm_ref(x, norm.weight, epsilon(norm))

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``silu(gate) * up``: ``[T, 2F] -> [T, F]``."""
        return ref.swiglu_ref(gate_up)

    def gated_conv(
        self, bcx: torch.Tensor, conv: nn.Module, window: ConvWindow, batch: Batch
    ) -> torch.Tensor:
        """``C * causal_conv(B * x)``: ``[T, 3H] -> [T, H]``; moves the window."""
        body = ref.gated_conv_step_ref if batch.max_query == 1 else ref.gated_conv_ref
        return body(bcx, conv.weight, conv.bias, window.rows, batch)

    def qk_norm_rope(
        self, qkv: torch.Tensor, attention: nn.Module, rope: Rope, pages: KVPages, batch: Batch
    ) -> torch.Tensor:
        """Norm and turn q and k, write k and v to their pages, give q ``[T, heads, D]``."""
        return ref.qk_norm_rope_ref(
            qkv,
            attention.q_layernorm.weight,
            attention.k_layernorm.weight,
            epsilon(attention.q_layernorm),
            rope,
            pages.k,
            pages.v,
            batch,
        )

    def attention(self, q: torch.Tensor, pages: KVPages, batch: Batch) -> torch.Tensor:
        """Causal grouped-query attention over the pages: ``[T, heads, D] -> [T, heads * D]``."""
        return ref.attention_ref(q, pages.k, pages.v, batch)


def epsilon(norm: nn.RMSNorm) -> float:
    """A norm's eps, which torch types as optional."""
    assert norm.eps is not None
    return norm.eps
