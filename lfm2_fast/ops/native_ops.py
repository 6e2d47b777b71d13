"""Operations in C++ and CUDA. Calling them needs the extension, importing does not."""

from __future__ import annotations

import functools
import platform
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lfm2_fast.cache.batch import Batch, DecodeInputs
from lfm2_fast.cache.kv_cache import ConvWindow, KVPages
from lfm2_fast.ops import reference as ref
from lfm2_fast.ops.base import AttentionLike, Ops, Rope, TapsLike, epsilon
from lfm2_fast.ops.native_library import native
from lfm2_fast.ops.residual import PendingResidualOps, settled
from lfm2_fast.ops.sampling import SamplingState
from lfm2_fast.weights.formats import DENSE, INT8, Format, Groups, Projection

# Most tokens of a step that verifies drafts: more take so long that no drafts pay for them.
MOST_VERIFIED = 32


def multiplies(dtype: torch.dtype) -> bool:
    """Return True if PyTorch has fast products of ``dtype``. If not, float32 is much faster."""
    if dtype != torch.bfloat16:
        return dtype == torch.float32
    # PyTorch uses oneDNN, which is fast on x86-64 only with instructions for the type.
    there = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if platform.machine().lower() in ("x86_64", "amd64"):
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return there and fast
    return there


@functools.cache
def multiplies_int8() -> bool:
    """Return True if PyTorch's product of 8-bit integers is right and fast on this CPU.

    On x86-64 without VNNI it is never both. Some versions add pairs of products in 16 bits, which
    overflow silently. Others are exact, but ten times as slow as float32.
    """
    if platform.machine().lower() in ("x86_64", "amd64"):
        if not (torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()):
            return False
    a, b = (torch.full((64, 64), n, dtype=torch.int8, device="cpu") for n in (127, -127))
    return bool((torch._int_mm(a, a) == 64 * 127 * 127).all()) and bool(
        (torch._int_mm(a, b) == -64 * 127 * 127).all()
    )


@functools.cache
def few_tokens(format: Format, dtype: torch.dtype) -> int:
    """Return how many tokens the extension multiplies itself at most; 0 if it lacks the format.

    For more tokens, PyTorch's products of float32, and of 8-bit integers with VNNI, are faster.
    Each of its calls packs a matrix of 16-bit floats again, which pays only above 64 tokens.
    Without VNNI the extension's 8-bit products are faster than PyTorch's, and than a widened
    matrix. AArch64 was never timed: its products in groups are taken to be faster than the widened
    matrix too.
    """
    if format is DENSE:
        return 32 if dtype == torch.float32 else 64
    wide = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    wide |= platform.machine().lower() in ("aarch64", "arm64")
    if format is INT8:
        return sys.maxsize if wide and not multiplies_int8() else 16
    if isinstance(format, Groups):
        return sys.maxsize if wide else 16
    return 0


# Most tokens whose low-rank changes the extension multiplies itself; PyTorch's products of more are
# faster.
FEW_ADAPTED = 32


class NativeStepOps(Ops):
    """Operations on a GPU: CUDA for the convolution of a decode step, PyTorch for the rest."""

    name = "native"

    def gated_conv(
        self, bcx: torch.Tensor, conv: TapsLike, window: ConvWindow, batch: Batch
    ) -> torch.Tensor:
        # Its threads run tokens in any order, so tokens of one slot are not for it.
        if batch.max_query != 1 or self.by_token:
            return super().gated_conv(bcx, conv, window, batch)
        tokens, size = bcx.shape
        out = bcx.new_empty(tokens, size // 3)
        places = batch.positions, batch.slots
        native.gated_conv_step(bcx, conv.weight, conv.bias, window.rows, *places, out)
        return out


class NativeOps(PendingResidualOps):
    """Operations on a CPU: whole fused ones for a few tokens, all but projections for more.

    For float32 and 16-bit types. Results of one of a few tokens do not depend on the others.
    """

    name = "native"
    cpu_graph_rows = 16
    device_only = True

    @property
    def for_verification(self) -> NativeOps:
        return self

    def verified_tokens(self, matrices: Iterable[Projection], dtype: torch.dtype) -> int:
        """Return the fewest of the tokens that the extension multiplies by a matrix itself."""
        formats = {each.format for each in matrices}
        return min([MOST_VERIFIED, *(few_tokens(format, dtype) for format in formats)])

    def add_low_rank(
        self, x: torch.Tensor, linear: Projection, product: torch.Tensor
    ) -> torch.Tensor:
        stack = linear.adapters
        if self.entries is None or stack is None or len(x) > FEW_ADAPTED:
            return super().add_low_rank(x, linear, product)
        changes = stack.down, stack.up, stack.gain, stack.shift, stack.ends
        native.low_rank(x, self.entries, *changes, linear.bias, product)
        return product

    def norm_linear(self, x: Any, norm: nn.RMSNorm, linear: Projection) -> torch.Tensor:
        if len(x) > few_tokens(linear.format, norm.weight.dtype):
            return super().norm_linear(x, norm, linear)
        x = settled(x)
        out = x.new_empty(len(x), len(linear.weight))
        matrix = linear.weight, linear.weight_scale, linear.bias
        native.norm_linear(x, norm.weight, epsilon(norm), *matrix, out)
        if self.adapts(linear):
            return self.adapt(self.rms_norm(x, norm), linear, out)
        return out

    def linear_add(self, y: torch.Tensor, linear: Projection, residual: Any) -> Any:
        if len(y) > few_tokens(linear.format, y.dtype):
            return super().linear_add(y, linear, residual)
        residual = settled(residual)
        out = residual.new_empty(residual.shape)
        matrix = linear.weight, linear.weight_scale, linear.bias
        if self.adapts(linear):
            native.linear_add(y, *matrix, torch.zeros_like(out), out)
            return residual + self.adapt(y, linear, out)
        native.linear_add(y, *matrix, residual, out)
        return out

    def norm_swiglu(self, x: Any, norm: nn.RMSNorm, gate_up: Projection) -> torch.Tensor:
        if len(x) > few_tokens(gate_up.format, norm.weight.dtype):
            return super().norm_swiglu(x, norm, gate_up)
        if self.adapts(gate_up):
            return self.swiglu(self.norm_linear(x, norm, gate_up))
        x = settled(x)
        out = x.new_empty(len(x), len(gate_up.weight) // 2)
        matrix = gate_up.weight, gate_up.weight_scale
        native.norm_swiglu(x, norm.weight, epsilon(norm), *matrix, out)
        return out

    def head_argmax(self, x: Any, norm: nn.RMSNorm, linear: Projection) -> torch.Tensor:
        logits = self.norm_linear(x, norm, linear)
        tokens = logits.new_empty(len(logits), dtype=torch.int64)
        native.best_tokens(logits, tokens)
        return tokens

    def linear(self, x: torch.Tensor, linear: Projection) -> torch.Tensor:
        """Projection of many tokens, by PyTorch's products."""
        return self.adapt(x, linear, self._product(x, linear))

    def _product(self, x: torch.Tensor, linear: Projection) -> torch.Tensor:
        if linear.format is INT8 and multiplies_int8():
            numbers = x.new_empty(x.shape, dtype=torch.int8)
            scales = x.new_empty(len(x), dtype=torch.float32)
            native.quantize(x, numbers, scales)
            out = x.new_empty(len(x), len(linear.weight))
            products = torch._int_mm(numbers, linear.weight.T)
            native.finish_products(products, scales, linear.weight_scale, linear.bias, out)
            return out
        if multiplies(x.dtype):
            return ref.linear_ref(x, linear.dequantized(x.dtype), linear.bias)
        weight = linear.dequantized(x.dtype).float()
        bias = None if linear.bias is None else linear.bias.float()
        return ref.linear_ref(x.float(), weight, bias).to(x.dtype)

    def rope(
        self,
        positions: torch.Tensor,
        inv_freq: torch.Tensor,
        dtype: torch.dtype,
        scale: float = 1.0,
    ) -> Rope:
        shape = (len(positions), 1, 2 * inv_freq.shape[-1])
        # Scaled before it is rounded, as in Hugging Face's class.
        made = dtype if scale == 1.0 else inv_freq.dtype
        cos, sin = inv_freq.new_empty(shape, dtype=made), inv_freq.new_empty(shape, dtype=made)
        native.rope(positions, inv_freq, cos, sin)
        if scale == 1.0:
            return cos, sin
        return (cos * scale).to(dtype), (sin * scale).to(dtype)

    def embed(
        self, tokens: torch.Tensor, embedding: Projection, dtype: torch.dtype
    ) -> torch.Tensor:
        if not few_tokens(embedding.format, dtype):
            return super().embed(tokens, embedding, dtype)
        weight, width = embedding.weight, embedding.shape[1]
        out = weight.new_empty(len(tokens), width, dtype=dtype)
        native.embed(tokens, weight, embedding.weight_scale, out)
        return self.adapt_rows(tokens, embedding, out)

    def rms_norm(self, x: torch.Tensor, norm: nn.RMSNorm) -> torch.Tensor:
        out = x.new_empty(x.shape)
        native.rms_norm(x, norm.weight, epsilon(norm), out)
        return out

    def add_rms_norm(
        self, x: torch.Tensor, delta: torch.Tensor, norm: nn.RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = x.new_empty(x.shape)
        native.add_rms_norm(x, delta, norm.weight, epsilon(norm), delta, out)
        return delta, out

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        tokens, size = gate_up.shape
        out = gate_up.new_empty(tokens, size // 2)
        native.swiglu(gate_up, out)
        return out

    def gated_conv(
        self, bcx: torch.Tensor, conv: TapsLike, window: ConvWindow, batch: Batch
    ) -> torch.Tensor:
        tokens, size = bcx.shape
        out = bcx.new_empty(tokens, size // 3)
        if batch.max_query == 1:
            places = batch.positions, batch.slots
            native.gated_conv_step(bcx, conv.weight, conv.bias, window.rows, *places, out)
        else:
            runs = batch.cu_seqlens, batch.slots, batch.lengths
            native.gated_conv(bcx, conv.weight, conv.bias, window.rows, *runs, out)
        return out

    def qk_norm_rope(
        self, qkv: torch.Tensor, attention: AttentionLike, rope: Rope, pages: KVPages, batch: Batch
    ) -> torch.Tensor:
        tokens, size = qkv.shape
        _, kv_heads, _, head_dim = pages.k.shape
        q = qkv.new_empty(tokens, size // head_dim - 2 * kv_heads, head_dim)
        native.qk_norm_rope(
            qkv,
            attention.q_layernorm.weight,
            attention.k_layernorm.weight,
            epsilon(attention.q_layernorm),
            *rope,
            pages.k,
            pages.v,
            pages.table,
            batch.cu_seqlens,
            batch.slots,
            batch.lengths,
            batch.write_from,
            q,
        )
        return q

    def attention(self, q: torch.Tensor, pages: KVPages, batch: Batch) -> torch.Tensor:
        tokens, heads, head_dim = q.shape
        out = q.new_empty(tokens, heads * head_dim)
        cached = pages.k, pages.v, pages.table
        if batch.max_query == 1:
            native.flash_decode(q, *cached, batch.slots, batch.lengths, out)
        else:
            native.flash_prefill(q, *cached, batch.cu_seqlens, batch.slots, batch.lengths, out)
        return out

    def sample(self, logits: torch.Tensor, state: SamplingState) -> torch.Tensor:
        scores, shape = logits, logits.shape
        if state.seen is not None:
            scores = logits.new_empty(shape, dtype=torch.float32)
            native.penalize(logits, state.seen, state.repetition_penalty, scores)
        tokens = torch.empty_like(state.positions)
        if not state.all_drawn:
            native.best_tokens(scores, tokens)
        if "do_sample" in state.active:
            warped = logits.new_empty(shape, dtype=torch.float32)
            native.warp(scores, state.temperature, state.top_k, state.top_p, state.min_p, warped)
            drawn = torch.empty_like(tokens)
            native.draw(warped, state.seeds, state.rows, state.positions, drawn)
            tokens = drawn if state.all_drawn else torch.where(state.do_sample, drawn, tokens)
        state.record(tokens)
        return tokens

    def keep_streams(
        self,
        streams: Sequence[torch.Tensor],
        slots: torch.Tensor,
        positions: torch.Tensor,
        ring: torch.Tensor,
    ) -> None:
        for number, x in enumerate(streams):
            native.keep_stream(x, slots, positions, number * x.shape[1], ring)

    def advance(
        self,
        chosen: torch.Tensor,
        eos: torch.Tensor,
        dummy_slot: int | None,
        inputs: DecodeInputs,
        written: torch.Tensor,
    ) -> None:
        native.advance(chosen, eos, dummy_slot, *inputs, written)
