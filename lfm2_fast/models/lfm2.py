"""LFM2: gated short convolutions and grouped-query attention, top to bottom.

The network is written once, in the fused operations of ``ops``. It runs packed tokens against a
cache. Prefill, decode, chunked prefill and mixed batches are the same call with other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from lfm2_fast.cache.batch import Batch, DecodeInputs
from lfm2_fast.cache.kv_cache import Cache, ConvWindow, KVPages
from lfm2_fast.config import Config
from lfm2_fast.models.hooks import check_hooks, checked_stream, is_hooked
from lfm2_fast.models.rope import RopeFrequencies
from lfm2_fast.models.stream_ring import StreamRing
from lfm2_fast.ops.base import Ops, Rope
from lfm2_fast.ops.residual import settled
from lfm2_fast.ops.select import choose
from lfm2_fast.weights.adapter_set import AdapterSet
from lfm2_fast.weights.drafter import DrafterConfig
from lfm2_fast.weights.formats import Projection
from lfm2_fast.weights.fusion import formats_of, tie


class ShortConvTaps(nn.Module):
    """Taps of a short convolution: ``weight [H, W]``, newest last, and optional ``bias [H]``."""

    bias: nn.Parameter | None

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.conv_L_cache))
        bias = nn.Parameter(torch.empty(config.hidden_size)) if config.conv_bias else None
        self.register_parameter("bias", bias)


class ShortConv(nn.Module):
    """Weights of ``out_proj(C * conv(B * x))``, with ``B, C, x = in_proj(h)``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.conv_bias
        self.in_proj = Projection(3 * hidden, hidden, bias=bias)
        self.conv = ShortConvTaps(config)
        self.out_proj = Projection(hidden, hidden, bias=bias)


class Attention(nn.Module):
    """Weights of grouped-query attention; q, k and v are one projection."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        hidden, width = config.hidden_size, config.head_dim
        rows = (self.num_heads + 2 * self.num_kv_heads) * width
        self.qkv_proj = Projection(rows, hidden)
        self.q_layernorm = nn.RMSNorm(width, eps=config.norm_eps)
        self.k_layernorm = nn.RMSNorm(width, eps=config.norm_eps)
        self.out_proj = Projection(hidden, self.num_heads * width)


class FeedForward(nn.Module):
    """Weights of ``down(silu(gate) * up)``; gate and up are one projection."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Projection(2 * inner, hidden)
        self.down_proj = Projection(hidden, inner)


class Block(nn.Module):
    """``x += operator(norm(x)); x += feed_forward(norm(x))``; the operator is the subclass's.

    The residual stream ``x [T, H]`` is the only positional argument, as hooks expect. Only the
    packed indices ``rows [R]`` of it are returned, where they are given.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.operator_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def compile(self, *_: Any, **__: Any) -> None:
        """Do nothing: the operations are compiled already."""

    def checked(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return ``x``, checked if a caller's pre-hook may have replaced it."""
        if not self._forward_pre_hooks:
            return x
        return checked_stream(x, self.operator_norm.weight, len(batch.positions))

    def finish(
        self,
        y: torch.Tensor,
        out_proj: Projection,
        x: torch.Tensor,
        ops: Ops,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """Add the operator's output and the feed-forward's to ``x``, at ``rows`` alone if given."""
        if rows is not None:
            y, x, ops = y[rows], x[rows], ops.at(rows)
            if not len(rows):
                return x
        x = ops.linear_add(y, out_proj, x)
        y = ops.norm_swiglu(x, self.ffn_norm, self.feed_forward.gate_up_proj)
        return ops.linear_add(y, self.feed_forward.down_proj, x)


class ConvBlock(Block):
    """Block whose operator is the gated short convolution."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.conv = ShortConv(config)

    def forward(
        self,
        x: torch.Tensor,
        *,
        ops: Ops,
        rope: Rope,
        state: ConvWindow,
        batch: Batch,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = self.checked(x, batch)
        y = ops.norm_conv(x, self.operator_norm, self.conv, state, batch)
        return self.finish(y, self.conv.out_proj, x, ops, rows)


class AttentionBlock(Block):
    """Block whose operator is attention."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.self_attn = Attention(config)

    def forward(
        self,
        x: torch.Tensor,
        *,
        ops: Ops,
        rope: Rope,
        state: KVPages,
        batch: Batch,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = self.checked(x, batch)
        qkv = ops.norm_linear(x, self.operator_norm, self.self_attn.qkv_proj)
        y = ops.attend(qkv, self.self_attn, rope, state, batch)
        return self.finish(y, self.self_attn.out_proj, x, ops, rows)


class Drafter(Protocol):
    """Reads the streams of a network; see ``models.dspark.DSpark``."""

    config: DrafterConfig

    def remember(
        self, streams: torch.Tensor, batch: Batch, pages: Sequence[KVPages], ops: Ops
    ) -> None:
        """Take the streams ``[T, layers * H]`` of tokens after ``config.target_layers``."""

    def apply_to_tensors(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> object:
        """Move or cast the weights, as the network's are."""


class Lfm2(nn.Module):
    """Network: embedding, blocks, last norm and head, on one device.

    ``weights`` are the fused tensors of ``weights.fusion`` by name; they are used without a copy.
    ``backend`` is one of ``ops.select.BACKENDS``. ``ops`` are the chosen operations. Moving or
    casting the module chooses them again. ``drafter`` reads its streams, if there is one.
    """

    drafter: Drafter | None

    def __init__(
        self, config: Config, weights: dict[str, torch.Tensor], *, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.embed_tokens = Projection(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(
                ConvBlock(config) if kind == "conv" else AttentionBlock(config)
                for kind in config.layer_types
            )
            self.embedding_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
            self.lm_head = Projection(config.vocab_size, config.hidden_size)
        self.part_names = frozenset(path.rpartition(".")[2] for path, _ in self.named_modules())
        formats = formats_of(config)
        for path, module in self.named_modules():
            if isinstance(module, Projection):
                module.store_as(formats[f"{path}.weight"])
        self.load_state_dict(tie(config, weights), strict=True, assign=True)
        self.tie_weights()
        projections = {n: m for n, m in self.named_modules() if isinstance(m, Projection)}
        self.adapters = AdapterSet(config, projections)
        self.requires_grad_(False).eval()
        self.backend = backend
        self.attach_drafter(None)
        self._fit()

    def _fit(self) -> None:
        """Choose operations and make frequencies for the weights' present device and dtype."""
        self.ops = choose(self.backend, self.device, self.dtype)
        self.rope_frequencies = RopeFrequencies(self.config, self.device, self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without operations: a copy, on any machine, chooses its own."""
        return {name: value for name, value in self.__dict__.items() if name != "ops"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._fit()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Lfm2:
        super()._apply(fn, recurse)
        self.tie_weights()
        self._fit()
        if self.drafter is not None:
            self.drafter.apply_to_tensors(fn)
        return self

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations and of the cache; quantized weights have their own."""
        return self.embedding_norm.weight.dtype

    @property
    def verified_tokens(self) -> int:
        """Most tokens of a step by ``ops.for_verification``; 0 where there is none."""
        matrices = (part for part in self.modules() if isinstance(part, Projection))
        return self.ops.verified_tokens(matrices, self.dtype)

    def attach_drafter(self, drafter: Drafter | None) -> None:
        """Give new caches layers for ``drafter``, and show it the streams of passes on them."""
        # Set past nn.Module: a drafter's weights are not the network's.
        self.__dict__["drafter"] = drafter

    @property
    def draft_layers(self) -> int:
        """Number of the drafter's layers, which caches have beside the network's own.

        A model that was moved to a GPU has none there: its drafter does not run.
        """
        drafter = None if self.ops.captures else self.drafter
        return 0 if drafter is None else drafter.config.blocks.num_hidden_layers

    def drafts_on(self, cache: Cache) -> bool:
        """Return True if ``cache`` has layers for the drafter that is attached."""
        return 0 < len(cache.draft_layers) == self.draft_layers

    @property
    def has_hooked_layers(self) -> bool:
        """Return True if layers run a caller's Python. Steps are then not replayed."""
        return any(is_hooked(each) or not isinstance(each, Block) for each in self.layers)

    def check_hooks(self) -> None:
        """Raise HookError, which names the module, for a hook that would never be called."""
        check_hooks(self, self.layers, Block, TYPES, self.part_names)

    def compile(self, *_: Any, **__: Any) -> None:
        """Do nothing: the operations are compiled already."""

    def tie_weights(self) -> None:
        """Make the head the embedding, if the config says that they are one."""
        if self.config.tie_word_embeddings:
            self.lm_head.share(self.embed_tokens)

    def adapted(self, ops: Ops, batch: Batch) -> Ops:
        """Return ``ops`` for the adapters of the batch's tokens, ``ops`` itself if none has any."""
        if ops.entries is not None:
            return ops
        if batch.adapters is None:
            active = self.adapters.active
            if active is None:
                return ops
            entries = torch.full_like(batch.positions, active.entry)
            return ops.adapted(entries, frozenset({active.entry}))
        if batch.max_query == 1:
            return ops.adapted(batch.adapters, batch.whole)
        bounds = batch.cu_seqlens[1:]
        numbers = torch.arange(len(batch.positions), dtype=bounds.dtype, device=bounds.device)
        # Padding after the last sequence gets that sequence's adapter.
        which = torch.searchsorted(bounds, numbers, right=True).clamp_(max=len(bounds) - 1)
        return ops.adapted(batch.adapters.index_select(0, which), batch.whole)

    @torch.no_grad()
    def run_blocks(
        self,
        tokens: torch.Tensor | None,
        batch: Batch,
        cache: Cache,
        ops: Ops | None = None,
        *,
        rows: torch.Tensor | None = None,
        embeds: torch.Tensor | None = None,
        collected: list[torch.Tensor] | None = None,
        late: StreamRing | None = None,
    ) -> torch.Tensor:
        """Return the residual stream ``[R, H]`` of packed ``tokens [T]`` after the last block.

        ``rows [R]`` are packed indices, None means all T. The cache gets all tokens either way, but
        the last block's out_proj and feed-forward run for ``rows`` alone.

        Writes keys, values and conv rows of the tokens into the tensors of ``cache``. The caller
        reserves room in the cache before, and counts the tokens afterwards. ``ops`` replaces
        ``self.ops``. The last norm and the head have not run yet. The result may have a pending
        addition (``ops.residual``). ``embeds [T, H]`` replace ``tokens`` if those are None.
        ``collected`` gets the embedding and every block's output ``[T, H]``. Hooks on layers are
        called. They see the stream with nothing pending, and may replace it. The drafter reads the
        tokens' streams, unless ``late`` is its ring: that keeps them then, for a step of one token
        a sequence.
        """
        ops = self.adapted(ops or self.ops, batch)
        hooked = self.has_hooked_layers
        drafter = self.drafter if self.drafts_on(cache) else None
        tapped = () if drafter is None else drafter.config.target_layers
        streams: list[torch.Tensor] = []
        if hooked:
            ops = ops.settling
        frequencies = self.rope_frequencies
        angles = batch.positions, frequencies.of(batch), self.dtype, frequencies.scale
        if tokens is None:
            assert embeds is not None
            x, rope = embeds, ops.rope(*angles)
        else:
            x, rope = ops.embed_rope(tokens, self.embed_tokens, *angles)
        if collected is not None:
            collected.append(x)
        last = len(self.layers) - 1
        for number, (layer, state) in enumerate(zip(self.layers, cache.layers, strict=True)):
            # A layer with hooks, or one of a caller's own, gives the whole stream.
            only = {"rows": rows} if number == last and not hooked else {}
            x = layer(x, ops=ops, rope=rope, state=state, batch=batch, **only)
            if hooked:
                x = checked_stream(x, self.embedding_norm.weight, len(batch.positions))
            if collected is not None:
                collected.append(settled(x))
            if number in tapped:
                streams.append(settled(x))
        if drafter is not None:
            if late is not None and late.drafter is drafter:
                late.keep(streams, batch, ops)
            else:
                joined = torch.cat(streams, -1)
                drafter.remember(joined, batch, cache.draft_layers, ops.settling)
        return x[rows] if hooked and rows is not None else x

    @torch.no_grad()
    def last_norm(self, x: torch.Tensor) -> torch.Tensor:
        """Return the residual stream after the last norm, ``[T, H]``, as the head reads it."""
        return self.ops.rms_norm(settled(x), self.embedding_norm)

    @torch.no_grad()
    def logits(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[R, V]`` of the residual stream ``x [T, H]`` at ``rows [R]``.

        The tokens have the active adapter, if there is one.
        """
        ops, active = self.ops, self.adapters.active
        if active is not None:
            ops = ops.adapted(torch.full_like(rows, active.entry), frozenset({active.entry}))
        return ops.norm_linear(x[rows], self.embedding_norm, self.lm_head)

    @torch.no_grad()
    def forward(
        self,
        tokens: torch.Tensor,
        batch: Batch,
        cache: Cache,
        rows: torch.Tensor | None = None,
        *,
        ops: Ops | None = None,
        late: StreamRing | None = None,
    ) -> torch.Tensor:
        """Return logits ``[R, V]`` at the packed indices ``rows [R]`` of ``tokens [T]`` int64.

        ``rows=None`` means all T. Cache and ``late`` are used as by ``run_blocks``. Token ids are
        not checked. Captured steps pass ``ops.for_capture``. If ``ops.device_only``, only tensors
        of ``batch`` are read, and the host does not wait for the device.
        """
        ops = self.adapted(ops or self.ops, batch)
        x = self.run_blocks(tokens, batch, cache, ops, rows=rows, late=late)
        return ops.at(rows).norm_linear(x, self.embedding_norm, self.lm_head)

    @torch.no_grad()
    def advance(
        self,
        inputs: DecodeInputs,
        batch: Batch,
        cache: Cache,
        eos: torch.Tensor,
        written: torch.Tensor,
        *,
        ops: Ops | None = None,
        late: StreamRing | None = None,
    ) -> None:
        """Run a decode step of ``inputs``, whose ``batch`` is given, by the most likely tokens.

        ``inputs`` become those of the next step, and ``written [B]`` gets the tokens, as by the
        operation ``advance``. Logits are never written. The rest is as in ``forward``.
        """
        ops = self.adapted(ops or self.ops, batch)
        x = self.run_blocks(inputs.tokens, batch, cache, ops, late=late)
        head = x, self.embedding_norm, self.lm_head
        ops.head_advance(*head, eos, cache.dummy_slot, inputs, written)


# The types of all modules of a network at construction.
TYPES = frozenset((Lfm2, nn.ModuleList, ConvBlock, AttentionBlock, ShortConv, ShortConvTaps))
TYPES |= {Attention, FeedForward, Projection, nn.RMSNorm}
