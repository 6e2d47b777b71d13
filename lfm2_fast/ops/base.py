"""Fused operations that the model is written in, in plain PyTorch.

An operation ends where every output depends on every input. So the model's code stays the same when
an implementation fuses more. A backend is a subclass of ``Ops``. It overrides whole operations, the
small ones that they are made of, or both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from typing import Protocol

import torch
from torch import nn

from lfm2_fast.cache.batch import Batch, DecodeInputs
from lfm2_fast.cache.kv_cache import ConvWindow, KVPages
from lfm2_fast.ops import reference as ref
from lfm2_fast.ops.low_rank import low_rank, low_rank_rows
from lfm2_fast.ops.sampling import SamplingState, best_tokens, sample_ref
from lfm2_fast.weights.formats import Projection

Rope = tuple[torch.Tensor, torch.Tensor]


class TapsLike(Protocol):
    """Weights of a depthwise convolution: ``weight [H, W]``, newest tap last, ``bias [H]``."""

    @property
    def weight(self) -> torch.Tensor: ...
    @property
    def bias(self) -> torch.Tensor | None: ...


class ConvLike(Protocol):
    """Weights of a conv layer that ``norm_conv`` reads."""

    @property
    def in_proj(self) -> Projection: ...
    @property
    def conv(self) -> TapsLike: ...


class AttentionLike(Protocol):
    """Weights of an attention layer that ``attend`` reads."""

    @property
    def q_layernorm(self) -> nn.RMSNorm: ...
    @property
    def k_layernorm(self) -> nn.RMSNorm: ...


class Ops:
    """Operations in plain PyTorch. T packed tokens, H hidden size, D head size.

    Every operation returns a new tensor. It mutates only its arguments ``window``, ``pages``,
    ``state``, ``inputs`` and ``written``.
    """

    name = "eager"
    # True if a decode step is captured as a CUDA graph and launched a step ahead of the host.
    captures = False
    # Largest decode batch that is worth recording as a CPU graph.
    cpu_graph_rows = 0
    # True if a decode step reads only device tensors of ``Batch``. Captured work needs this.
    device_only = False
    # True if a projection multiplies tokens one by one, so that none changes another's bits.
    by_token = False
    # Entry of each token in the stacks of adapters, ``[T]`` int64; None if no token has an adapter.
    entries: torch.Tensor | None = None
    # Entries whose whole matrices the tokens may have, as far as the host knows; None is any.
    whole: frozenset[int] | None = None

    @property
    def uses_graphs(self) -> bool:
        """Return True if decode steps are captured or recorded."""
        return self.captures or self.cpu_graph_rows > 0

    @property
    def for_capture(self) -> Ops:
        """Operations for captured work and its warm-up run. Only launch options may differ."""
        return self

    @property
    def for_verification(self) -> Ops:
        """Operations for a step in which adjacent tokens may belong to one slot, in order.

        Each token gets the bits that it gets in a step of its own. PyTorch's products do not keep
        them, so plain PyTorch multiplies token by token: this is right, and gains no time.
        """
        made = copy(self)
        made.by_token = True
        return made

    def verified_tokens(self, matrices: Iterable[Projection], dtype: torch.dtype) -> int:
        """Return the largest step of ``for_verification`` in tokens; 0 if it cannot run.

        ``matrices`` are the model's, and ``dtype`` is that of its activations.
        """
        return 16

    @property
    def settling(self) -> Ops:
        """Operations that leave no addition pending, for a caller's Python between layers."""
        return self

    def adapted(self, entries: torch.Tensor, whole: frozenset[int] | None = None) -> Ops:
        """Operations for tokens that have adapters, whose ``entries [T]`` are int64.

        A matrix that replaces the base's is multiplied only if ``whole`` has its entry; None has
        all. So the host need not wait for ``entries``.
        """
        made = copy(self)
        made.entries, made.whole = entries, whole
        return made

    def at(self, rows: torch.Tensor | None) -> Ops:
        """Operations for the packed tokens ``rows [R]`` alone; None is all of them."""
        if self.entries is None or rows is None:
            return self
        return self.adapted(self.entries.index_select(0, rows), self.whole)

    def adapts(self, linear: Projection) -> bool:
        """Return True if tokens have adapters, and some may change this projection."""
        return self.entries is not None and bool(linear.adapters or self._replaced(linear))

    def _replaced(self, linear: Projection) -> list[tuple[int, int, Projection]]:
        """Return entry, first row and matrix of each replacement that a token may have."""
        if self.entries is None:
            return []
        return [
            (entry, first, own)
            for (entry, first), own in linear.replaced.items()
            if self.whole is None or entry in self.whole
        ]

    def adapt(self, x: torch.Tensor, linear: Projection, product: torch.Tensor) -> torch.Tensor:
        """``product [T, N]`` of tokens ``x [T, K]`` as their adapters change it; mutates it."""
        self._replace(x, linear, product)
        return self.add_low_rank(x, linear, product)

    def _replace(self, x: torch.Tensor, linear: Projection, product: torch.Tensor) -> None:
        """Give tokens of adapters with a whole matrix its product, in ``product [T, N]``."""
        for entry, first, own in self._replaced(linear):
            here = product[:, first : first + own.shape[0]]
            here.copy_(torch.where(self._have(entry), self._unadapted_product(x, own), here))

    def _have(self, entry: int) -> torch.Tensor:
        """Return the tokens that have the adapter of ``entry``: ``[T, 1]``."""
        assert self.entries is not None
        return (self.entries == entry)[:, None]

    def _unadapted_product(self, x: torch.Tensor, linear: Projection) -> torch.Tensor:
        """Product of tokens ``x [T, K]``, by the code for few tokens if there are few."""
        plain = copy(self.settling)
        plain.entries = None
        return plain.linear_add(x, linear, x.new_zeros(len(x), linear.shape[0]))

    def add_low_rank(
        self, x: torch.Tensor, linear: Projection, product: torch.Tensor
    ) -> torch.Tensor:
        """Add the changes of adapters to ``product [T, N]`` of tokens ``x [T, K]``."""
        if self.entries is None or linear.adapters is None:
            return product
        stack, bias = linear.adapters, linear.bias
        if not self.by_token:
            return low_rank(x, product, self.entries, stack, bias)
        each = zip(x.split(1), product.split(1), self.entries.split(1), strict=True)
        return torch.cat([low_rank(*token, stack, bias) for token in each])

    def norm_linear(self, x: torch.Tensor, norm: nn.RMSNorm, linear: Projection) -> torch.Tensor:
        """RMSNorm, then a projection: ``[T, H] -> [T, N]``."""
        return self.linear(self.rms_norm(x, norm), linear)

    def norm_conv(
        self,
        x: torch.Tensor,
        norm: nn.RMSNorm,
        conv: ConvLike,
        window: ConvWindow,
        batch: Batch,
    ) -> torch.Tensor:
        """RMSNorm, in_proj, ``C * causal_conv(B * x)``: ``[T, H] -> [T, H]``; mutates window."""
        return self.gated_conv(self.norm_linear(x, norm, conv.in_proj), conv.conv, window, batch)

    def attend(
        self,
        qkv: torch.Tensor,
        attention: AttentionLike,
        rope: Rope,
        pages: KVPages,
        batch: Batch,
    ) -> torch.Tensor:
        """QK-norm, RoPE, k and v to their pages, attention: ``[T, N] -> [T, heads * D]``."""
        q = self.qk_norm_rope(qkv, attention, rope, pages, batch)
        return self.attention(q, pages, batch)

    def linear_add(
        self, y: torch.Tensor, linear: Projection, residual: torch.Tensor
    ) -> torch.Tensor:
        """``residual + linear(y)``: ``[T, K] -> [T, H]``."""
        return residual + self.linear(y, linear)

    def norm_swiglu(self, x: torch.Tensor, norm: nn.RMSNorm, gate_up: Projection) -> torch.Tensor:
        """RMSNorm, gate and up projections, ``silu(gate) * up``: ``[T, H] -> [T, F]``."""
        return self.swiglu(self.norm_linear(x, norm, gate_up))

    def head_argmax(self, x: torch.Tensor, norm: nn.RMSNorm, linear: Projection) -> torch.Tensor:
        """``best_tokens(norm_linear(x, norm, linear))``: ``[T, H] -> [T]`` int64.

        Of equal logits the first one counts. A row gets NO_TOKEN if its best logit is NaN or
        infinite.
        """
        return best_tokens(self.norm_linear(x, norm, linear))

    def head_advance(
        self,
        x: torch.Tensor,
        norm: nn.RMSNorm,
        linear: Projection,
        eos: torch.Tensor,
        dummy_slot: int | None,
        inputs: DecodeInputs,
        written: torch.Tensor,
    ) -> None:
        """Step by the most likely tokens: ``advance`` with the tokens of ``head_argmax``."""
        self.advance(self.head_argmax(x, norm, linear), eos, dummy_slot, inputs, written)

    def keep_streams(
        self,
        streams: Sequence[torch.Tensor],
        slots: torch.Tensor,
        positions: torch.Tensor,
        ring: torch.Tensor,
    ) -> None:
        """Store the streams of tokens in their slots' rings; see ``keep_streams_ref``."""
        ref.keep_streams_ref(streams, slots, positions, ring)

    def advance(
        self,
        chosen: torch.Tensor,
        eos: torch.Tensor,
        dummy_slot: int | None,
        inputs: DecodeInputs,
        written: torch.Tensor,
    ) -> None:
        """Turn a step's ``inputs`` into the next step's, from the chosen tokens; see
        ``advance_ref``.
        """
        ref.advance_ref(chosen, eos, dummy_slot, inputs, written)

    def sample(self, logits: torch.Tensor, state: SamplingState) -> torch.Tensor:
        """Choose each row's next token, or NO_TOKEN: ``[B, V] -> [B]`` int64; mutates ``state``."""
        return sample_ref(logits, state)

    def embed_rope(
        self,
        tokens: torch.Tensor,
        embedding: Projection,
        positions: torch.Tensor,
        inv_freq: torch.Tensor,
        dtype: torch.dtype,
        scale: float = 1.0,
    ) -> tuple[torch.Tensor, Rope]:
        """``embed`` of the tokens, and ``rope`` of their positions."""
        rope = self.rope(positions, inv_freq, dtype, scale)
        return self.embed(tokens, embedding, dtype), rope

    def rope(
        self,
        positions: torch.Tensor,
        inv_freq: torch.Tensor,
        dtype: torch.dtype,
        scale: float = 1.0,
    ) -> Rope:
        """Cosines and sines ``[T, 1, D]`` of the tokens' positions, times ``scale``, once per step.

        ``inv_freq`` is ``[D/2]`` for all tokens, or ``[T, D/2]``.
        """
        return ref.rope_ref(positions, inv_freq, dtype, scale)

    def linear(self, x: torch.Tensor, linear: Projection) -> torch.Tensor:
        """Projection: ``[T, K] -> [T, N]``."""
        weight = linear.dequantized(x.dtype)
        if self.by_token:
            rows = [ref.linear_ref(each, weight, linear.bias) for each in x.split(1)]
            product = torch.cat(rows)
        else:
            product = ref.linear_ref(x, weight, linear.bias)
        return self.adapt(x, linear, product)

    def embed(
        self, tokens: torch.Tensor, embedding: Projection, dtype: torch.dtype
    ) -> torch.Tensor:
        """Rows of the embedding for the tokens: ``[T] -> [T, H]``."""
        return self.adapt_rows(tokens, embedding, embedding.rows(tokens, dtype))

    def adapt_rows(
        self, tokens: torch.Tensor, embedding: Projection, rows: torch.Tensor
    ) -> torch.Tensor:
        """Rows ``[T, H]`` of the embedding as the tokens' adapters change them."""
        if self.entries is None:
            return rows
        for entry, _, own in self._replaced(embedding):
            rows = torch.where(self._have(entry), own.rows(tokens, rows.dtype), rows)
        if embedding.adapters is None:
            return rows
        return low_rank_rows(tokens, rows, self.entries, embedding.adapters)

    def rms_norm(self, x: torch.Tensor, norm: nn.RMSNorm) -> torch.Tensor:
        """RMSNorm over the last axis."""
        return ref.rms_norm_ref(x, norm.weight, epsilon(norm))

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``silu(gate) * up``: ``[T, 2F] -> [T, F]``."""
        return ref.swiglu_ref(gate_up)

    def gated_conv(
        self, bcx: torch.Tensor, conv: TapsLike, window: ConvWindow, batch: Batch
    ) -> torch.Tensor:
        """``C * causal_conv(B * x)``: ``[T, 3H] -> [T, H]``; mutates the window."""
        body = ref.gated_conv_step_ref if batch.max_query == 1 else ref.gated_conv_ref
        return body(bcx, conv.weight, conv.bias, window.rows, batch)

    def qk_norm_rope(
        self, qkv: torch.Tensor, attention: AttentionLike, rope: Rope, pages: KVPages, batch: Batch
    ) -> torch.Tensor:
        """Norm and rotate q and k, write k and v to their pages, return q ``[T, heads, D]``."""
        return ref.qk_norm_rope_ref(
            qkv,
            attention.q_layernorm.weight,
            attention.k_layernorm.weight,
            epsilon(attention.q_layernorm),
            rope,
            pages.k,
            pages.v,
            pages.table,
            batch,
        )

    def attention(self, q: torch.Tensor, pages: KVPages, batch: Batch) -> torch.Tensor:
        """Causal grouped-query attention over the pages: ``[T, heads, D] -> [T, heads * D]``."""
        return ref.attention_ref(q, pages.k, pages.v, pages.table, batch)


def epsilon(norm: nn.RMSNorm) -> float:
    """Return a norm's eps, which is optional in torch's types."""
    assert norm.eps is not None
    return norm.eps
