"""LFM2: gated short convolutions and grouped-query attention, top to bottom.

The model is written once, in the words of ``ops``. It runs packed tokens against a cache; prefill,
decode, chunked prefill and mixed batches are the same call with other numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lfm2_fast.cache.batch import Batch
from lfm2_fast.cache.kv_cache import Cache, ConvWindow, KVPages
from lfm2_fast.config import Config
from lfm2_fast.ops.base import Ops, Rope, choose
from lfm2_fast.weights import checkpoint
from lfm2_fast.weights.formats import Matrix

if TYPE_CHECKING:
    from lfm2_fast.hf.forward import CausalLMOutput


def matrix(config: Config, rows: int, columns: int, *, bias: bool = False) -> Matrix:
    """The weight of a projection or embedding, stored as the config says."""
    return Matrix(rows, columns, bias=bias, quantization=config.quantization)


class DepthwiseWeight(nn.Module):
    """A short convolution's ``weight [H, W]``, newest tap last, and optional ``bias [H]``."""

    bias: nn.Parameter | None

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.conv_L_cache))
        bias = nn.Parameter(torch.empty(config.hidden_size)) if config.conv_bias else None
        self.register_parameter("bias", bias)


class ShortConv(nn.Module):
    """The weights of ``out_proj(C * conv(B * x))``, with ``B, C, x = in_proj(h)``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.conv_bias
        self.in_proj = matrix(config, 3 * hidden, hidden, bias=bias)
        self.conv = DepthwiseWeight(config)
        self.out_proj = matrix(config, hidden, hidden, bias=bias)


class Attention(nn.Module):
    """The weights of grouped-query attention; q, k and v are one projection."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        hidden, width = config.hidden_size, config.head_dim
        together = (self.num_heads + 2 * self.num_kv_heads) * width
        self.qkv_proj = matrix(config, together, hidden)
        self.q_layernorm = nn.RMSNorm(width, eps=config.norm_eps)
        self.k_layernorm = nn.RMSNorm(width, eps=config.norm_eps)
        self.out_proj = matrix(config, hidden, self.num_heads * width)


class FeedForward(nn.Module):
    """The weights of ``down(silu(gate) * up)``; gate and up are one projection."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = matrix(config, 2 * inner, hidden)
        self.down_proj = matrix(config, hidden, inner)


class Block(nn.Module):
    """``x += operator(norm(x)); x += feed_forward(norm(x))``; the operator is the subclass's."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.operator_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def mix(self, x: torch.Tensor, ops: Ops) -> torch.Tensor:
        y = ops.norm_swiglu(x, self.ffn_norm, self.feed_forward.gate_up_proj)
        return ops.linear_add(y, self.feed_forward.down_proj, x)


class ConvBlock(Block):
    """A block whose operator is the gated short convolution."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.conv = ShortConv(config)

    def forward(
        self, x: torch.Tensor, ops: Ops, rope: Rope, window: ConvWindow, batch: Batch
    ) -> torch.Tensor:
        y = ops.norm_conv(x, self.operator_norm, self.conv, window, batch)
        return self.mix(ops.linear_add(y, self.conv.out_proj, x), ops)


class AttentionBlock(Block):
    """A block whose operator is attention."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.self_attn = Attention(config)

    def forward(
        self, x: torch.Tensor, ops: Ops, rope: Rope, pages: KVPages, batch: Batch
    ) -> torch.Tensor:
        qkv = ops.norm_linear(x, self.operator_norm, self.self_attn.qkv_proj)
        y = ops.attend(qkv, self.self_attn, rope, pages, batch)
        return self.mix(ops.linear_add(y, self.self_attn.out_proj, x), ops)


class Lfm2ForCausalLM(nn.Module):
    """An LFM2 language model that runs.

    ``weights`` are the fused tensors that ``checkpoint.load_weights`` gives; they are taken over,
    not copied. ``backend`` is one of ``ops.BACKENDS``. ``max_length`` bounds the context that a
    cache of this model may grow to (default: the model's own limit).
    """

    # What transformers' pipelines ask of a model.
    input_modalities = output_modalities = ("text",)

    def __init__(
        self,
        config: Config,
        weights: dict[str, torch.Tensor],
        *,
        backend: str = "auto",
        max_length: int | None = None,
        generation_config: dict[str, Any] | None = None,
        name_or_path: str = "",
    ) -> None:
        super().__init__()
        self.config = config
        self._generation: Any = generation_config or {}
        self.name_or_path = name_or_path
        self.max_length = min(
            max_length or config.max_position_embeddings, config.max_position_embeddings
        )
        with torch.device("meta"):
            self.embed_tokens = matrix(config, config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(
                ConvBlock(config) if kind == "conv" else AttentionBlock(config)
                for kind in config.layer_types
            )
            self.embedding_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
            self.lm_head = matrix(config, config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            tied = {name for name in weights if name.startswith("embed_tokens.")}
            heads = {name.replace("embed_tokens", "lm_head"): weights[name] for name in tied}
            weights = {**weights, **heads}
        self.load_state_dict(weights, strict=True, assign=True)
        self.tie_weights()
        self.requires_grad_(False).eval()
        self._backend = backend
        self._fit()

    def _fit(self) -> None:
        """Take the bodies and the frequencies that go with where and what the weights now are."""
        self.ops = choose(self._backend, self.device, self.dtype)
        # Always float32 (or wider): positions reach 128,000, which 16 bits cannot count.
        dim = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32)
        freq = 1.0 / self.config.rope_theta ** (dim / self.config.head_dim)
        self.inv_freq = freq.to(self.device, torch.promote_types(self.dtype, torch.float32))
        # What was captured points at the weights as they were.
        self._idle: list[Cache] = []

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> Lfm2ForCausalLM:
        super()._apply(fn, recurse)
        self.tie_weights()
        self._fit()
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is computed and of the cache; quantized matrices are int8 beside it."""
        return self.embedding_norm.weight.dtype

    @property
    def generation_config(self) -> Any:
        """The checkpoint's generation parameters, as transformers' GenerationConfig."""
        if isinstance(self._generation, dict):
            from transformers import GenerationConfig

            self._generation = GenerationConfig.from_dict(self._generation)
        return self._generation

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self._generation = {} if value is None else value

    def generation_defaults(self) -> dict[str, Any]:
        """The generation parameters as a mapping, without a need for transformers."""
        found = self._generation
        return found if isinstance(found, dict) else found.to_dict()

    def can_generate(self) -> bool:
        """Whether the model has ``generate``: yes."""
        return True

    def tie_weights(self) -> None:
        """Make the head the embedding, if the config says that they are one."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
            self.lm_head.weight_scale = self.embed_tokens.weight_scale

    def num_parameters(self) -> int:
        """Parameters, a tied head counted once."""
        return self.config.num_parameters

    def new_cache(self, slots: int, max_length: int | None = None, *, spare: int = 1) -> Cache:
        """An empty cache for ``slots`` sequences of at most ``max_length`` tokens each.

        ``spare`` is how many tokens ``rollback`` must be able to take back. Where steps are
        captured, the cache has what those need besides: a slot that nobody reads, if sequences
        run together, and a window's row for the step that is under way when a text ends.
        """
        captures = self.ops.captures
        return Cache(
            self.config,
            slots,
            min(max_length or self.max_length, self.max_length),
            device=self.device,
            dtype=self.dtype,
            spare=spare + captures,
            scrap=captures and slots > 1,
        )

    def borrow_cache(self, slots: int) -> Cache:
        """A cache for one call: the one that was given back, if it fits, with what it captured."""
        with suppress(IndexError):
            # One thread gets it; another that comes at once finds none.
            cache = self._idle.pop()
            if cache.slots == slots and cache.max_length == self.max_length:
                return cache
        return self.new_cache(slots)

    def give_back(self, cache: Cache) -> None:
        """Keep a borrowed cache for the next call, where that saves capturing steps anew."""
        if self.ops.captures:
            cache.reset()
            self._idle = [cache]

    @torch.no_grad()
    def run(
        self,
        tokens: torch.Tensor,
        batch: Batch,
        cache: Cache,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits ``[R, V]`` of packed ``tokens [T]`` int64 at the packed indices ``rows [R]``.

        ``rows=None`` means all T. The cache then holds the tokens too. Token ids are not checked
        here. Raises CacheError when the cache cannot take them; it is unchanged then.
        """
        cache.reserve(batch)
        logits = self.compute(tokens, batch, cache, rows)
        cache.advance(batch)
        return logits

    @torch.no_grad()
    def compute(
        self,
        tokens: torch.Tensor,
        batch: Batch,
        cache: Cache,
        rows: torch.Tensor | None = None,
        *,
        best: bool = False,
        ops: Ops | None = None,
    ) -> torch.Tensor:
        """What ``run`` gives, without the cache's bookkeeping: the caller makes room and counts.

        ``best`` asks for the likeliest tokens ``[R]`` int64 in place of logits, which saves
        writing those. What is captured gives the operations of ``ops.captured``.
        Where ``ops.captures`` only tensors of ``batch`` are read, and nothing waits for the device.
        """
        ops = ops or self.ops
        rope = ops.rope(batch.positions, self.inv_freq, self.dtype)
        x = ops.embed(tokens, self.embed_tokens, self.dtype)
        for layer, state in zip(self.layers, cache.layers, strict=True):
            x = layer(x, ops, rope, state, batch)
        if rows is not None:
            x = x[rows]
        head = ops.head_argmax if best else ops.norm_linear
        return head(x, self.embedding_norm, self.lm_head)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool = True,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Logits of ``input_ids [B, T]``; see ``lfm2_fast.hf.forward.forward``."""
        from lfm2_fast.hf.forward import forward

        return forward(
            self, input_ids, attention_mask, past_key_values, use_cache, logits_to_keep, return_dict
        )

    def generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Continue prompts; see ``lfm2_fast.hf.generate.generate`` for the arguments."""
        from lfm2_fast.hf.generate import generate

        return generate(self, *args, **kwargs)

    def compute_transition_scores(
        self,
        sequences: torch.Tensor,
        scores: tuple[torch.Tensor, ...],
        beam_indices: None = None,
        normalize_logits: bool = False,
    ) -> torch.Tensor:
        """The ``scores`` of the tokens that ``generate`` wrote, ``[B, steps]``, as Hugging Face's.

        ``sequences`` and ``scores`` (or ``logits``) are of its answer; ``normalize_logits`` makes
        logarithms of probabilities of them.
        Raises ValueError for ``beam_indices``: no beams are searched here.
        """
        if beam_indices is not None:
            raise ValueError("beam_indices is not supported by lfm2_fast: leave it out")
        each = torch.stack(scores, 1)
        if normalize_logits:
            each = each.log_softmax(-1)
        written = sequences[:, -len(scores) :].to(each.device)
        return each.gather(-1, written[..., None])[..., 0]

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write a checkpoint that Hugging Face loads, equal tensor for tensor."""
        weights = dict(self.state_dict())
        if self.config.tie_word_embeddings:
            weights = {n: w for n, w in weights.items() if not n.startswith("lm_head.")}
        checkpoint.save(
            Path(save_directory),
            self.config,
            weights,
            generation_config=self.generation_defaults(),
        )
