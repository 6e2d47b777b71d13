"""The vocabulary that the model is written in, and the only door to the bodies behind it.

A word ends where every output depends on every input, so that fusing more of it into one launch
never changes the model's text. Words are made of small operations; a backend is a subclass of
``Ops`` that brings its own bodies for the small operations, for whole words, or for both.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import nn

from lfm2_fast.cache.batch import Batch
from lfm2_fast.cache.kv_cache import ConvWindow, KVPages
from lfm2_fast.ops import reference as ref
from lfm2_fast.ops.sampling import SamplingState, sample_ref

BACKENDS = ("auto", "eager", "triton", "native")

Rope = tuple[torch.Tensor, torch.Tensor]


class Depthwise(Protocol):
    """A short convolution's weights: ``weight [H, W]``, newest tap last, and maybe ``bias [H]``."""

    @property
    def weight(self) -> torch.Tensor: ...
    @property
    def bias(self) -> torch.Tensor | None: ...


class Linear(Protocol):
    """A projection's ``weight [N, K]``; with ``weight_scale [N]`` int8, see ``matrix.Matrix``."""

    @property
    def weight(self) -> torch.Tensor: ...
    @property
    def weight_scale(self) -> torch.Tensor | None: ...
    @property
    def bias(self) -> torch.Tensor | None: ...


class ShortConv(Protocol):
    """What ``norm_conv`` needs of a conv layer."""

    @property
    def in_proj(self) -> Linear: ...
    @property
    def conv(self) -> Depthwise: ...


class Attention(Protocol):
    """What ``attend`` needs of an attention layer."""

    @property
    def q_layernorm(self) -> nn.RMSNorm: ...
    @property
    def k_layernorm(self) -> nn.RMSNorm: ...


class BackendError(RuntimeError):
    """The backend that was asked for cannot run here."""


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> Ops:
    """The operations that ``backend`` names, for a model of ``dtype`` on ``device``.

    "eager" is plain PyTorch and runs anything anywhere, "triton" runs on GPUs, "native" is C++ for
    CPUs (on GPUs: for the convolution's step); "auto" takes the fastest that can run, Triton on
    GPUs and C++ on CPUs. Raises BackendError for a name that is unknown or cannot run here.
    """
    if backend not in BACKENDS:
        raise BackendError(
            f"backend={backend!r} is not in this version of lfm2_fast; "
            f"choose one of {', '.join(map(repr, BACKENDS))}"
        )
    if backend == "auto":
        best = {"cuda": "triton", "cpu": "native"}.get(device.type, "eager")
        backend = "eager" if why_not(best, device, dtype) else best
    elif lacking := why_not(backend, device, dtype):
        raise BackendError(f"backend={backend!r} cannot run on {device}: {lacking}")
    if backend == "triton":
        from lfm2_fast.ops.triton_ops import TritonOps

        return TritonOps(dependent=has_dependent_launch(device))
    if backend == "native":
        from lfm2_fast.ops.native_ops import NativeOps, NativeStepOps

        return NativeOps() if device.type == "cpu" else NativeStepOps()
    return Ops()


def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What ``backend`` lacks to run ``dtype`` on ``device`` and what to do, or None."""
    if backend == "eager":
        return None
    if dtype == torch.float64:
        return "it has no float64; choose backend='eager'"
    if backend == "triton":
        return why_not_triton(device)
    from lfm2_fast.ops import native_library as native

    return native.why_not(device)


def why_not_triton(device: torch.device) -> str | None:
    """What Triton's kernels lack to run on ``device`` and how to get it, or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed; pip install triton"
    if device.type == "cuda":
        if torch.version.hip:
            return "the kernels are written for NVIDIA's GPUs; choose backend='eager'"
        if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
            return "Triton needs compute capability 8.0 or higher; choose backend='eager'"
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") == "1":
        return None
    return (
        "Triton runs on GPUs, and on the CPU in its interpreter alone, for tests: start Python "
        "with TRITON_INTERPRET=1, or choose backend='eager'"
    )


def has_dependent_launch(device: torch.device) -> bool:
    """Whether ``device`` can begin a kernel while the one before it runs: Hopper GPUs and later."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


class Ops:
    """The words in plain PyTorch; with T tokens packed, H hidden, D head size.

    Every operation gives a new tensor and mutates nothing but the ``window`` or ``pages`` that it
    is handed.
    """

    name = "eager"
    # Whether a step of one token per sequence is captured as a graph, a step ahead of the host.
    captures = False
    # Up to how many rows such a step is worth recording as a tape, on a CPU.
    tapes = 0

    @property
    def by_tensors(self) -> bool:
        """Whether such a step goes by tensors alone, and not by the batch's numbers on the host."""
        return self.captures or self.tapes > 0

    @property
    def captured(self) -> Ops:
        """The same operations as what is captured is to launch them, its first run included."""
        return self

    def norm_linear(self, x: torch.Tensor, norm: nn.RMSNorm, linear: Linear) -> torch.Tensor:
        """RMSNorm, then a projection: ``[T, H] -> [T, N]``."""
        return self.linear(self.rms_norm(x, norm), linear)

    def norm_conv(
        self,
        x: torch.Tensor,
        norm: nn.RMSNorm,
        conv: ShortConv,
        window: ConvWindow,
        batch: Batch,
    ) -> torch.Tensor:
        """RMSNorm, in_proj, ``C * causal_conv(B * x)``: ``[T, H] -> [T, H]``; moves the window."""
        return self.gated_conv(self.norm_linear(x, norm, conv.in_proj), conv.conv, window, batch)

    def attend(
        self,
        qkv: torch.Tensor,
        attention: Attention,
        rope: Rope,
        pages: KVPages,
        batch: Batch,
    ) -> torch.Tensor:
        """QK-norm, RoPE, k and v to their pages, attention: ``[T, N] -> [T, heads * D]``."""
        q = self.qk_norm_rope(qkv, attention, rope, pages, batch)
        return self.attention(q, pages, batch)

    def linear_add(self, y: torch.Tensor, linear: Linear, residual: torch.Tensor) -> torch.Tensor:
        """``residual + linear(y)``: ``[T, K] -> [T, H]``."""
        return residual + self.linear(y, linear)

    def norm_swiglu(self, x: torch.Tensor, norm: nn.RMSNorm, gate_up: Linear) -> torch.Tensor:
        """RMSNorm, gate and up projections, ``silu(gate) * up``: ``[T, H] -> [T, F]``."""
        return self.swiglu(self.norm_linear(x, norm, gate_up))

    def head_argmax(self, x: torch.Tensor, norm: nn.RMSNorm, linear: Linear) -> torch.Tensor:
        """``norm_linear(x, norm, linear).argmax(-1)``: ``[T, H] -> [T]`` int64, the best tokens.

        Of equal logits it is the first, and NaN is larger than any number.
        """
        return self.norm_linear(x, norm, linear).argmax(-1)

    def advance(
        self,
        chosen: torch.Tensor,
        eos: torch.Tensor,
        scrap: int | None,
        tokens: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        lengths: torch.Tensor,
        finished: torch.Tensor,
    ) -> None:
        """Make the next step's inputs of the tokens that this one chose; see ``advance_ref``."""
        ref.advance_ref(chosen, eos, scrap, tokens, slots, positions, lengths, finished)

    def sample(self, logits: torch.Tensor, state: SamplingState) -> torch.Tensor:
        """The next token of every row, ``[B, V] -> [B]`` int64; moves ``state`` on."""
        return sample_ref(logits, state)

    def rope(self, positions: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype) -> Rope:
        """Cosines and sines ``[T, 1, D]`` of the tokens' positions, made once per step."""
        return ref.rope_ref(positions, inv_freq, dtype)

    def linear(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """A projection alone: ``[T, K] -> [T, N]``."""
        return ref.linear_ref(x, linear.weight, linear.bias, linear.weight_scale)

    def embed(self, tokens: torch.Tensor, embedding: Linear, dtype: torch.dtype) -> torch.Tensor:
        """The tokens' rows of the embedding: ``[T] -> [T, H]``."""
        return ref.embed_ref(tokens, embedding.weight, embedding.weight_scale, dtype)

    def rms_norm(self, x: torch.Tensor, norm: nn.RMSNorm) -> torch.Tensor:
        """RMSNorm over the last axis."""
        return ref.rms_norm_ref(x, norm.weight, epsilon(norm))

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``silu(gate) * up``: ``[T, 2F] -> [T, F]``."""
        return ref.swiglu_ref(gate_up)

    def gated_conv(
        self, bcx: torch.Tensor, conv: Depthwise, window: ConvWindow, batch: Batch
    ) -> torch.Tensor:
        """``C * causal_conv(B * x)``: ``[T, 3H] -> [T, H]``; moves the window."""
        body = ref.gated_conv_step_ref if batch.max_query == 1 else ref.gated_conv_ref
        return body(bcx, conv.weight, conv.bias, window.rows, batch)

    def qk_norm_rope(
        self, qkv: torch.Tensor, attention: Attention, rope: Rope, pages: KVPages, batch: Batch
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
