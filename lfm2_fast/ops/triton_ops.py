"""Operations in Triton. Importing this module imports triton."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from lfm2_fast.cache.batch import Batch, DecodeInputs
from lfm2_fast.cache.kv_cache import ConvWindow, KVPages
from lfm2_fast.kernels.advance import advance_triton
from lfm2_fast.kernels.embed import embed_triton
from lfm2_fast.kernels.embed_rope import embed_rope_triton
from lfm2_fast.kernels.flash_decode import flash_decode_triton, most_splits
from lfm2_fast.kernels.flash_prefill import flash_prefill_triton
from lfm2_fast.kernels.gated_conv import gated_conv_triton
from lfm2_fast.kernels.gated_conv_step import gated_conv_step_triton
from lfm2_fast.kernels.gemv import MOST_TOKENS, is_readable
from lfm2_fast.kernels.gemv_low_rank import MOST_RANKS, Change
from lfm2_fast.kernels.head_argmax import argmax_advance_triton, head_argmax_triton, head_tiling
from lfm2_fast.kernels.linear_add import linear_add_triton
from lfm2_fast.kernels.low_rank import low_rank_down_triton, low_rank_triton, low_shape
from lfm2_fast.kernels.norm_conv import norm_conv_triton
from lfm2_fast.kernels.norm_linear import norm_linear_triton
from lfm2_fast.kernels.norm_swiglu import norm_swiglu_triton
from lfm2_fast.kernels.qk_norm_rope import qk_norm_rope_triton
from lfm2_fast.kernels.rms_norm import add_rms_norm_triton, rms_norm_triton
from lfm2_fast.kernels.rope import rope_triton
from lfm2_fast.kernels.sample import Scratch, sample_triton
from lfm2_fast.kernels.swiglu import swiglu_triton
from lfm2_fast.kernels.widen import widen_int4_triton
from lfm2_fast.ops.base import AttentionLike, ConvLike, Rope, TapsLike, epsilon
from lfm2_fast.ops.reference import linear_ref
from lfm2_fast.ops.residual import PendingResidual, PendingResidualOps, settled
from lfm2_fast.ops.sampling import SamplingState
from lfm2_fast.weights.formats import DENSE, INT4, INT8, Projection

# Weight formats that the kernels of few tokens read, and those of them that ``embed`` reads.
FORMATS = (DENSE, INT8, INT4)
TABLES = (DENSE, INT8)


class TritonOps(PendingResidualOps):
    """Operations on a GPU, with T packed tokens and H hidden.

    A few tokens take one launch for a fused operation, its projection included. With more tokens,
    PyTorch's library multiplies. Kernels run between the projections, and leave the residual
    addition pending.

    With ``dependent``, which needs compute capability 9.0, ``for_capture`` makes dependent launches
    for steps of a few tokens: a kernel begins before the previous one ends (``kernels/pdl.py``).
    Outside of graphs they would cost the host more than they gain.
    """

    name = "triton"
    captures = device_only = True
    pdl = False
    # True if several tokens of a step may be of one slot.
    verifies = False

    def __init__(self, *, dependent: bool = False) -> None:
        # The counters of flash_decode belong to a cache, found by its page table. Launches on one
        # cache never overlap, in any stream or graph. Launches on two caches may overlap.
        self._arrivals = WeakTensorKeyDictionary()
        # The same by token, for steps in which several are of one slot.
        self._arrivals_by_token = WeakTensorKeyDictionary()
        self._dependent: TritonOps | None = None
        if dependent:
            # With the same counters, because captured and uncaptured launches share caches.
            self._dependent = copy(self)
            self._dependent.pdl = True

    @property
    def for_capture(self) -> TritonOps:
        return self._dependent or self

    def linear(self, x: torch.Tensor, linear: Projection) -> torch.Tensor:
        """Library's product; a weight in int8 or int4 is widened for it in one launch."""
        weight, scale = linear.weight, linear.weight_scale
        if scale is None or linear.format not in FORMATS:
            return super().linear(x, linear)
        wide = torch.empty(linear.shape, dtype=x.dtype, device=x.device)
        if linear.format is INT8:
            embed_triton(None, weight, scale, wide)
        else:
            widen_int4_triton(weight, scale, wide)
        return self.adapt(x, linear, linear_ref(x, wide, linear.bias))

    @property
    def for_verification(self) -> TritonOps:
        made = copy(self)
        made.verifies = True
        return made

    def verified_tokens(self, matrices: Iterable[Projection], dtype: torch.dtype) -> int:
        """Return the most tokens of one launch, 0 where PyTorch multiplies by some matrix.

        The bits of its product depend on the number of tokens.
        """
        return MOST_TOKENS if all(map(_is_readable, matrices)) else 0

    def add_low_rank(
        self,
        x: torch.Tensor,
        linear: Projection,
        product: torch.Tensor,
        norm: nn.RMSNorm | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``product`` itself, to which two launches have added what the tokens' adapters add.

        They norm ``x`` where there is a norm, and add ``residual`` to all tokens.
        """
        stack = linear.adapters
        if self.entries is None or stack is None:
            return product
        ranks = len(stack.parts) * stack.rank
        shape = low_shape(*x.shape, ranks)
        low = torch.empty(shape, dtype=torch.float32, device=x.device)
        numbers = stack.down, stack.up, stack.gain, stack.shift
        low_rank_triton(
            x,
            self.entries,
            *numbers,
            stack.parts,
            linear.bias,
            product,
            low,
            norm=None if norm is None else norm.weight,
            eps=0.0 if norm is None else epsilon(norm),
            residual=residual,
            pdl=self.pdl,
        )
        return product

    def _change(
        self, x: torch.Tensor, linear: Projection, norm: nn.RMSNorm | None = None
    ) -> Change | None:
        """Change of few tokens ``x``, for the kernel that multiplies them to add; None if none can.

        One launch has made the first of its two products, of the normed tokens where there is a
        norm.
        """
        stack = linear.adapters
        # Matrices that are loaded decide, not those that this step has: so a token's bits do not
        # depend on other tokens.
        if self.entries is None or stack is None or linear.replaced or len(x) == 0:
            return None
        ranks = len(stack.parts) * stack.rank
        if not 0 < ranks <= MOST_RANKS:
            return None
        low = torch.empty(low_shape(*x.shape, ranks), dtype=torch.float32, device=x.device)
        low_rank_down_triton(
            x,
            self.entries,
            stack.down,
            low,
            norm=None if norm is None else norm.weight,
            eps=0.0 if norm is None else epsilon(norm),
            pdl=self.pdl,
        )
        numbers = stack.up, stack.gain, stack.shift, linear.bias, stack.parts
        return Change(self.entries, low, *numbers)

    def norm_linear(self, x: Any, norm: nn.RMSNorm, linear: Projection) -> torch.Tensor:
        few = _few(x, linear)
        if few is None:
            return super().norm_linear(x, norm, linear)
        out = few.new_empty(len(few), len(linear.weight))
        change = self._change(few, linear, norm)
        weight = *_norm(norm), *_linear(linear)
        norm_linear_triton(few, *weight, out, change=change, pdl=self.pdl)
        if change is not None:
            return out
        if self._replaced(linear):
            self._replace(self.rms_norm(few, norm), linear, out)
        # It norms by itself, with whole matrices or without: so the bits are the same.
        return self.add_low_rank(few, linear, out, norm)

    def norm_conv(
        self, x: Any, norm: nn.RMSNorm, conv: ConvLike, window: ConvWindow, batch: Batch
    ) -> torch.Tensor:
        few = _few(x, conv.in_proj, 3)
        if few is None or batch.max_query != 1:
            return super().norm_conv(x, norm, conv, window, batch)
        change = self._change(few, conv.in_proj, norm)
        if change is None and self.adapts(conv.in_proj):
            return super().norm_conv(few, norm, conv, window, batch)
        taps, out = conv.conv, torch.empty_like(few)
        norm_conv_triton(
            few,
            *_norm(norm),
            *_linear(conv.in_proj),
            taps.weight,
            taps.bias,
            window.rows,
            batch.positions,
            batch.slots,
            out,
            verified=self.verifies,
            change=change,
            pdl=self.pdl,
        )
        return out

    def linear_add(self, y: torch.Tensor, linear: Projection, residual: Any) -> Any:
        few = _few(residual, linear)
        if few is None:
            return super().linear_add(y, linear, residual)
        out = torch.empty_like(few)
        change = self._change(y, linear)
        whole = change is not None or not self.adapts(linear)
        weight = *_linear(linear), few if whole else None
        linear_add_triton(y, *weight, out, change=change, pdl=self.pdl)
        if whole:
            return out
        if self._replaced(linear):
            return few + self.adapt(y, linear, out)
        return self.add_low_rank(y, linear, out, residual=few)

    def norm_swiglu(self, x: Any, norm: nn.RMSNorm, gate_up: Projection) -> torch.Tensor:
        few = _few(x, gate_up, 2)
        if few is None:
            return super().norm_swiglu(x, norm, gate_up)
        change = self._change(few, gate_up, norm)
        if change is None and self.adapts(gate_up):
            return self.swiglu(self.norm_linear(few, norm, gate_up))
        out = few.new_empty(len(few), len(gate_up.weight) // 2)
        weight = *_norm(norm), *_linear(gate_up)
        norm_swiglu_triton(few, *weight, out, change=change, pdl=self.pdl)
        return out

    def head_advance(
        self,
        x: Any,
        norm: nn.RMSNorm,
        linear: Projection,
        eos: torch.Tensor,
        dummy_slot: int | None,
        inputs: DecodeInputs,
        written: torch.Tensor,
    ) -> None:
        """Step by the best tokens; two launches for a few tokens, which never write logits."""
        few = _few(x, linear)
        if few is None or self.adapts(linear):
            return super().head_advance(x, norm, linear, eos, dummy_slot, inputs, written)
        programs = head_tiling(linear.weight).programs
        best = torch.empty(programs, MOST_TOKENS, dtype=torch.int64, device=few.device)
        head_argmax_triton(few, *_norm(norm), *_linear(linear), best, pdl=self.pdl)
        argmax_advance_triton(best, eos, dummy_slot, *inputs, written, pdl=self.pdl)
        return None

    def advance(
        self,
        chosen: torch.Tensor,
        eos: torch.Tensor,
        dummy_slot: int | None,
        inputs: DecodeInputs,
        written: torch.Tensor,
    ) -> None:
        advance_triton(chosen, eos, dummy_slot, *inputs, written, pdl=self.pdl)

    def sample(self, logits: torch.Tensor, state: SamplingState) -> torch.Tensor:
        draws = "do_sample" in state.active
        cuts = not state.active.isdisjoint({"top_k", "top_p"})
        tokens = torch.empty_like(state.positions)
        sample_triton(
            logits,
            state.seen,
            state.repetition_penalty,
            state.do_sample,
            state.temperature,
            state.top_k,
            state.top_p,
            state.min_p,
            state.seeds,
            state.rows,
            state.positions,
            tokens,
            Scratch.empty(logits, draws=draws, cuts=cuts),
            draws=draws,
            cuts=cuts,
            pdl=self.pdl,
        )
        return tokens

    def rope(
        self,
        positions: torch.Tensor,
        inv_freq: torch.Tensor,
        dtype: torch.dtype,
        scale: float = 1.0,
    ) -> Rope:
        """Cosines and sines ``[T, D/2]``, times ``scale``, in float32 for every ``dtype``."""
        cos, sin = _angles(positions, inv_freq)
        rope_triton(positions, inv_freq, cos, sin, scale=scale)
        return cos, sin

    def embed(
        self, tokens: torch.Tensor, embedding: Projection, dtype: torch.dtype
    ) -> torch.Tensor:
        if embedding.format not in TABLES:
            return super().embed(tokens, embedding, dtype)
        weight, scale = embedding.weight, embedding.weight_scale
        out = torch.empty(len(tokens), weight.shape[1], dtype=dtype, device=weight.device)
        embed_triton(tokens, weight, scale, out)
        return self.adapt_rows(tokens, embedding, out)

    def embed_rope(
        self,
        tokens: torch.Tensor,
        embedding: Projection,
        positions: torch.Tensor,
        inv_freq: torch.Tensor,
        dtype: torch.dtype,
        scale: float = 1.0,
    ) -> tuple[torch.Tensor, Rope]:
        if embedding.format not in TABLES:
            return super().embed_rope(tokens, embedding, positions, inv_freq, dtype, scale)
        weight, scales = embedding.weight, embedding.weight_scale
        out = torch.empty(len(tokens), weight.shape[1], dtype=dtype, device=weight.device)
        rope = _angles(positions, inv_freq)
        given = tokens, weight, scales, out, positions, inv_freq, *rope
        embed_rope_triton(*given, by=scale, pdl=self.pdl)
        return self.adapt_rows(tokens, embedding, out), rope

    def rms_norm(self, x: torch.Tensor, norm: nn.RMSNorm) -> torch.Tensor:
        out = torch.empty_like(x)
        rms_norm_triton(x, norm.weight, epsilon(norm), out)
        return out

    def add_rms_norm(
        self, x: torch.Tensor, delta: torch.Tensor, norm: nn.RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.empty_like(x)
        add_rms_norm_triton(x, delta, norm.weight, epsilon(norm), delta, out)
        return delta, out

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        tokens, size = gate_up.shape
        out = torch.empty(tokens, size // 2, dtype=gate_up.dtype, device=gate_up.device)
        swiglu_triton(gate_up, out)
        return out

    def gated_conv(
        self, bcx: torch.Tensor, conv: TapsLike, window: ConvWindow, batch: Batch
    ) -> torch.Tensor:
        tokens, hidden = len(bcx), len(conv.weight)
        out = torch.empty(tokens, hidden, dtype=bcx.dtype, device=bcx.device)
        if batch.max_query == 1:
            gated_conv_step_triton(
                bcx, conv.weight, conv.bias, window.rows, batch.positions, batch.slots, out
            )
        else:
            gated_conv_triton(
                bcx,
                conv.weight,
                conv.bias,
                window.rows,
                batch.cu_seqlens,
                batch.slots,
                batch.lengths,
                out,
            )
        return out

    def qk_norm_rope(
        self, qkv: torch.Tensor, attention: AttentionLike, rope: Rope, pages: KVPages, batch: Batch
    ) -> torch.Tensor:
        tokens, width = qkv.shape
        _, kv_heads, _, head_dim = pages.k.shape
        heads = width // head_dim - 2 * kv_heads
        q = torch.empty(tokens, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
        qk_norm_rope_triton(
            qkv,
            attention.q_layernorm.weight,
            attention.k_layernorm.weight,
            epsilon(attention.q_layernorm),
            *rope,
            batch.positions,
            batch.cu_seqlens,
            batch.slots,
            batch.write_from,
            pages.table,
            q,
            pages.k,
            pages.v,
        )
        return q

    def attend(
        self, qkv: torch.Tensor, attention: AttentionLike, rope: Rope, pages: KVPages, batch: Batch
    ) -> torch.Tensor:
        """Attention: one launch if every sequence runs one token, otherwise two."""
        if batch.max_query != 1:
            return super().attend(qkv, attention, rope, pages, batch)
        tokens, width = qkv.shape
        _, kv_heads, page_size, head_dim = pages.k.shape
        heads = width // head_dim - 2 * kv_heads
        splits = most_splits(pages.table.shape[1] * page_size)
        shape = (tokens, kv_heads, splits, heads // kv_heads)
        out = torch.empty(tokens, heads * head_dim, dtype=qkv.dtype, device=qkv.device)
        flash_decode_triton(
            qkv,
            attention.q_layernorm.weight,
            attention.k_layernorm.weight,
            epsilon(attention.q_layernorm),
            *rope,
            batch.slots,
            batch.lengths,
            pages.table,
            pages.k,
            pages.v,
            out,
            torch.empty(*shape, head_dim, dtype=torch.float32, device=qkv.device),
            torch.empty(shape, dtype=torch.float32, device=qkv.device),
            self._counters(pages.table, kv_heads),
            verified=self.verifies,
            pdl=self.pdl,
        )
        return out

    def attention(self, q: torch.Tensor, pages: KVPages, batch: Batch) -> torch.Tensor:
        out = torch.empty(len(q), q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        flash_prefill_triton(
            q,
            pages.k,
            pages.v,
            pages.table,
            batch.cu_seqlens,
            batch.slots,
            batch.lengths,
            out,
            batch.max_query,
        )
        return out

    def _counters(self, table: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """Return ``[slots, kv_heads]`` int32 zeros, shared by all launches on the table's cache.

        Steps that verify have a row for each token instead.
        """
        known = self._arrivals_by_token if self.verifies else self._arrivals
        if table not in known:
            shape = (MOST_TOKENS if self.verifies else len(table), kv_heads)
            known[table] = torch.zeros(shape, dtype=torch.int32, device=table.device)
        return known[table]


def _few(
    x: torch.Tensor | PendingResidual, linear: Projection, parts: int = 1
) -> torch.Tensor | None:
    """Return the rows with nothing pending, if they are few and the kernels know the weight."""
    return settled(x) if len(x) <= MOST_TOKENS and _is_readable(linear, parts) else None


def _is_readable(linear: Projection, parts: int = 1) -> bool:
    """Return True if the kernels of few tokens know the weight, of ``parts`` stacked matrices."""
    return linear.format in FORMATS and is_readable(linear.weight, parts)


def _angles(positions: torch.Tensor, inv_freq: torch.Tensor) -> Rope:
    """Return memory for the cosines and sines of the tokens, ``[T, D/2]`` float32."""
    cos = torch.empty(len(positions), inv_freq.shape[-1], device=positions.device)
    return cos, torch.empty_like(cos)


def _norm(norm: nn.RMSNorm) -> tuple[torch.Tensor, float]:
    return norm.weight, epsilon(norm)


def _linear(linear: Projection) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    return linear.weight, linear.bias, linear.weight_scale
