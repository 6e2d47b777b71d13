"""Every operation at a model's true shapes, with the bytes that it must move.

An operation is timed over all layers that have it, one after another. So its weights come from
memory and not from a cache, as in a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from bench.shapes import config_of, random_weights
from lfm2_fast import Lfm2ForCausalLM
from lfm2_fast.cache.kv_cache import KVPages
from lfm2_fast.models.lfm2 import AttentionBlock, ConvBlock
from lfm2_fast.ops.residual import settled

Tensors = list[torch.Tensor]


class Setup:
    """Model, and inputs for its operations: ``tokens`` of ``sequences``, each after ``context``.

    ``layers`` limits the layers; they have the numbers of the whole model's first layers. All is
    drawn in bfloat16, so that every dtype gets the same values.
    """

    def __init__(
        self,
        size: str,
        *,
        tokens: int,
        sequences: int = 1,
        context: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        backend: str = "eager",
        layers: int | None = None,
    ) -> None:
        config = config_of(size)
        self.config = replace(config, layer_types=config.layer_types[:layers])
        weights = random_weights(self.config, torch.bfloat16)
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
        self.model = Lfm2ForCausalLM(self.config, weights, backend=backend)
        self.ops = self.model.ops
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(1)
        hidden, inner = config.hidden_size, config.intermediate_size
        width = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        total = tokens * sequences
        self.x = self.draw(total, hidden)
        self.bcx = self.draw(total, 3 * hidden)
        self.qkv = self.draw(total, width)
        self.gate_up = self.draw(total, 2 * inner)
        self.inner = self.draw(total, inner)
        self.q = self.draw(total, config.num_attention_heads, config.head_dim)
        self.cache = self.model.new_cache(sequences, context + tokens)
        self.prepare(sequences, context)
        self.cache.commit_batch(self.batch)
        self.prepare(sequences, tokens)
        self.fill()
        self.positions = self.batch.positions
        self.inv_freq = self.model.network.rope_frequencies.inv_freq
        self.rope = self.ops.rope(self.positions, self.inv_freq, dtype)
        pairs = list(zip(self.model.network.layers, self.cache.layers, strict=True))
        self.conv = [(block, state) for block, state in pairs if isinstance(block, ConvBlock)]
        self.attention = [(b, state) for b, state in pairs if isinstance(b, AttentionBlock)]

    def draw(self, *shape: int) -> torch.Tensor:
        made = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=self.generator)
        return made.to(self.dtype)

    def prepare(self, sequences: int, tokens: int) -> None:
        """Set the tokens of a step for each sequence, with room in the cache."""
        self.batch = self.cache.next_batch([tokens] * sequences, range(sequences), "cpu")
        self.cache.reserve(self.batch)

    def fill(self) -> None:
        """Fill the cache with random numbers."""
        count = self.cache.pool.memory.count
        for state in self.cache.layers:
            paged = isinstance(state, KVPages)
            for tensor in (state.k[:count], state.v[:count]) if paged else (state.rows,):
                tensor.copy_(self.draw(*tensor.shape))


def norm_conv(s: Setup) -> Tensors:
    return [s.ops.norm_conv(s.x, b.operator_norm, b.conv, w, s.batch) for b, w in s.conv]


def norm_linear_qkv(s: Setup) -> Tensors:
    return [s.ops.norm_linear(s.x, b.operator_norm, b.self_attn.qkv_proj) for b, _ in s.attention]


def norm_linear_head(s: Setup) -> Tensors:
    last = s.x[s.batch.last_rows]
    return [s.ops.norm_linear(last, s.model.network.embedding_norm, s.model.network.lm_head)]


def linear_add_out(s: Setup) -> Tensors:
    return [settled(s.ops.linear_add(s.x, b.conv.out_proj, s.x)) for b, _ in s.conv]


def attend(s: Setup) -> Tensors:
    return [s.ops.attend(s.qkv, b.self_attn, s.rope, p, s.batch) for b, p in s.attention]


def norm_swiglu(s: Setup) -> Tensors:
    blocks = s.model.network.layers
    return [s.ops.norm_swiglu(s.x, b.ffn_norm, b.feed_forward.gate_up_proj) for b in blocks]


def linear_add_down(s: Setup) -> Tensors:
    blocks = s.model.network.layers
    return [settled(s.ops.linear_add(s.inner, b.feed_forward.down_proj, s.x)) for b in blocks]


def rms_norm(s: Setup) -> Tensors:
    return [s.ops.rms_norm(s.x, b.ffn_norm) for b in s.model.network.layers]


def swiglu(s: Setup) -> Tensors:
    return [s.ops.swiglu(s.gate_up) for _ in s.model.network.layers]


def gated_conv(s: Setup) -> Tensors:
    return [s.ops.gated_conv(s.bcx, b.conv.conv, w, s.batch) for b, w in s.conv]


def qk_norm_rope(s: Setup) -> Tensors:
    return [s.ops.qk_norm_rope(s.qkv, b.self_attn, s.rope, p, s.batch) for b, p in s.attention]


def attention(s: Setup) -> Tensors:
    return [s.ops.attention(s.q, p, s.batch) for _, p in s.attention]


def rope(s: Setup) -> Tensors:
    return [*s.ops.rope(s.positions, s.inv_freq, s.dtype)]


OPERATIONS: dict[str, Callable[[Setup], Tensors]] = {
    made.__name__: made
    for made in (
        norm_conv,
        norm_linear_qkv,
        norm_linear_head,
        linear_add_out,
        attend,
        norm_swiglu,
        linear_add_down,
        rms_norm,
        swiglu,
        gated_conv,
        qk_norm_rope,
        attention,
        rope,
    )
}


def least_bytes(name: str, s: Setup) -> int:
    """Bytes that the operation must read and write over all its layers, each once.

    Counted as in docs/operations.md: activations in and out, weights, the window's rows that are
    read and written, and keys and values of the whole context.
    """
    item, total, sequences = s.dtype.itemsize, len(s.x), len(s.batch.slots)
    config = s.config
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    q = config.num_attention_heads * config.head_dim
    past = config.conv_L_cache - 1
    conv, attn, every = len(s.conv), len(s.attention), config.num_hidden_layers
    cached = 2 * kv * int(s.batch.lengths.sum())
    window = sequences * 2 * past * hidden
    numbers = {
        "norm_conv": conv
        * (3 * hidden * hidden + (past + 2) * hidden + window + 2 * total * hidden),
        "norm_linear_qkv": attn * ((q + 2 * kv) * hidden + hidden + total * (hidden + q + 2 * kv)),
        "norm_linear_head": (config.vocab_size + 1) * hidden
        + sequences * (hidden + config.vocab_size),
        "linear_add_out": conv * (hidden * hidden + 3 * total * hidden),
        "attend": attn * (cached + total * (2 * q + 2 * kv)),
        "norm_swiglu": every * (2 * inner * hidden + hidden + total * (hidden + inner)),
        "linear_add_down": every * (inner * hidden + total * (inner + 2 * hidden)),
        "rms_norm": every * (2 * total + 1) * hidden,
        "swiglu": every * 3 * total * inner,
        "gated_conv": conv * ((past + 1) * hidden + window + 4 * total * hidden),
        "qk_norm_rope": attn * total * 2 * (q + 2 * kv),
        "attention": attn * (cached + 2 * total * q),
        "rope": 2 * total * config.head_dim,
    }
    return item * numbers[name]
