"""DSpark: a drafter that reads a model's streams, and drafts a block of tokens in one pass.

It keeps keys and values of the target's tokens, made of streams after some of the target's layers.
A block has the last known token, then mask tokens. Its tokens attend to all of these keys and to
each other. Place k of the block predicts the token k + 1 behind the known one. The Markov head adds
logits that depend on the token before alone, so tokens of a block are chosen one after the other.

The description is that of LiquidAI's checkpoints in SGLang; ``weights.drafter`` has the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lfm2_fast.cache.batch import Batch, HostBatch, on_device
from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.cache.slot_pages import KVPages
from lfm2_fast.models.lfm2 import AttentionBlock, Lfm2
from lfm2_fast.models.rope import RopeFrequencies
from lfm2_fast.ops.base import Ops, Rope
from lfm2_fast.weights.drafter import DrafterConfig, format_of
from lfm2_fast.weights.formats import Projection


class DSpark(nn.Module):
    """Drafter of one target. ``weights`` are those of ``weights.drafter.load_weights``.

    Its keys and values are in pages of the target's cache, ``Cache.draft_layers``. So they are
    shared, kept and dropped together with the target's own.
    """

    def __init__(
        self, config: DrafterConfig, weights: dict[str, torch.Tensor], target: Lfm2
    ) -> None:
        super().__init__()
        self.config, own = config, config.blocks
        hidden, taps = own.hidden_size, len(config.target_layers)
        with torch.device("meta"):
            self.fc = Projection(hidden, taps * hidden)
            self.hidden_norm = nn.RMSNorm(hidden, eps=own.norm_eps)
            self.layers = nn.ModuleList(AttentionBlock(own) for _ in own.layer_types)
            self.norm = nn.RMSNorm(hidden, eps=own.norm_eps)
            self.markov_w1 = Projection(own.vocab_size, config.rank)
            self.markov_w2 = Projection(own.vocab_size, config.rank)
        for path, module in self.named_modules():
            if isinstance(module, Projection) and path != "markov_w1":
                module.store_as(format_of(target.config, module.shape[1]))
        self.load_state_dict(weights, strict=True, assign=True)
        self.requires_grad_(False).eval()
        self._fit()

    def _fit(self) -> None:
        like = self.norm.weight
        own = self.config.blocks
        self.rope_frequencies = RopeFrequencies(own, like.device, like.dtype)
        # Of the target's tokens only keys and values are needed. A list is no part of the module.
        rows = 2 * own.num_key_value_heads * own.head_dim
        self._keys_values = [_last_rows(block.self_attn.qkv_proj, rows) for block in self._blocks]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which has views of its own tensors."""
        return {name: value for name, value in self.__dict__.items() if name != "_keys_values"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._fit()

    def apply_to_tensors(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Move or cast the weights."""
        self._apply(fn)
        self._fit()

    def remember(
        self, streams: torch.Tensor, batch: Batch, pages: Sequence[KVPages], ops: Ops
    ) -> None:
        """Write keys and values of a target's tokens, from their ``streams [T, layers * H]``."""
        product = _product(streams, self.fc, ops)
        context = ops.rms_norm(product, self.hidden_norm)
        rope = self._rope(batch, ops, context.dtype)
        for block, proj, own in zip(self._blocks, self._keys_values, pages, strict=True):
            ops.qk_norm_rope(_product(context, proj, ops), block.self_attn, rope, own, batch)

    def remember_late(
        self,
        target: Lfm2,
        cache: Cache,
        streams: torch.Tensor,
        slots: Sequence[int],
        positions: Sequence[int],
    ) -> None:
        """Do what ``remember`` does, for tokens of earlier steps at ``positions`` of ``slots``."""
        batch = _single_tokens(positions, slots, [at + 1 for at in positions], target.device)
        self.remember(streams, batch, cache.draft_layers, target.ops.settling)

    def run_block(
        self,
        target: Lfm2,
        cache: Cache,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        size: int,
    ) -> torch.Tensor:
        """Run a block of ``size`` tokens for each row, and return its logits ``[B, size, V]``.

        ``tokens`` are the rows' last known ones, at ``positions`` of ``slots``, which must have
        room for the block. The cache has the tokens before. The Markov head has not run yet.
        """
        ops, device = target.ops.settling, target.device
        ids = [n for token in tokens for n in (token, *[self.config.mask_token] * (size - 1))]
        places = [at + i for at in positions for i in range(size)]
        slots = [slot for slot in slots for _ in range(size)]
        ends = [at + size for at in positions for _ in range(size)]
        # Keys are written at the tokens' own places; each token then sees the whole block.
        write = _single_tokens(places, slots, [at + 1 for at in places], device)
        read = _single_tokens([end - 1 for end in ends], slots, ends, device)
        x = ops.embed(on_device(ids, torch.int64, device), target.embed_tokens, target.dtype)
        rope = self._rope(write, ops, target.dtype)
        for block, pages in zip(self._blocks, cache.draft_layers, strict=True):
            attention = block.self_attn
            qkv = ops.norm_linear(x, block.operator_norm, attention.qkv_proj)
            q = ops.qk_norm_rope(qkv, attention, rope, pages, write)
            x = block.finish(ops.attention(q, pages, read), attention.out_proj, x, ops, None)
        logits = ops.norm_linear(x, self.norm, target.lm_head)
        return logits.view(len(tokens), size, -1)

    def add_markov(self, logits: torch.Tensor, before: torch.Tensor, ops: Ops) -> torch.Tensor:
        """Return ``logits [B, V]`` with what the tokens ``before [B]`` add to them."""
        return ops.linear_add(self.markov_w1.rows(before, logits.dtype), self.markov_w2, logits)

    @property
    def _blocks(self) -> Iterator[AttentionBlock]:
        for block in self.layers:
            assert isinstance(block, AttentionBlock)
            yield block

    def _rope(self, batch: Batch, ops: Ops, dtype: torch.dtype) -> Rope:
        frequencies = self.rope_frequencies
        return ops.rope(batch.positions, frequencies.inv_freq, dtype, frequencies.scale)


def _product(x: torch.Tensor, linear: Projection, ops: Ops) -> torch.Tensor:
    """Return the product ``[T, N]``, by the operation that is fast for few tokens too."""
    return ops.linear_add(x, linear, x.new_zeros(len(x), linear.shape[0]))


def _last_rows(linear: Projection, rows: int) -> Projection:
    """Return the last ``rows`` of a projection, on the same memory."""
    with torch.device("meta"):
        made = Projection(rows, linear.shape[1], format=linear.format)
    made.weight = nn.Parameter(linear.weight[-rows:], requires_grad=False)
    for name, part in linear.named_buffers():
        setattr(made, name, part[-rows:])
    return made


def _single_tokens(
    positions: Sequence[int], slots: Sequence[int], lengths: Sequence[int], device: torch.device
) -> Batch:
    """Return a batch of tokens that each are a sequence's newest; a slot may have several."""
    count = len(positions)
    return Batch(
        positions=on_device(positions, torch.int64, device),
        cu_seqlens=torch.arange(count + 1, dtype=torch.int32, device=device),
        slots=on_device(slots, torch.int64, device),
        lengths=on_device(lengths, torch.int32, device),
        max_query=1,
        host=HostBatch(tuple(slots), tuple(positions), (1,) * count),
    )
