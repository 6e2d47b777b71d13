"""The layout of a checkpoint: which of our tensors is made of which of Hugging Face's, stored how.

Fused: q, k and v into ``qkv_proj``; gate (``w1``) and up (``w3``) into ``gate_up_proj``. This is
the one place that knows the names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lfm2_fast.config import Config

# What the class with a head puts before the names of the class that it wraps.
BASE = "model."


@dataclass(frozen=True)
class Part:
    """One of Hugging Face's tensors, its shape there, and how many rows of ours it fills."""

    name: str
    shape: tuple[int, ...]

    @property
    def base_name(self) -> str:
        """Its name in a checkpoint of ``Lfm2Model``, Hugging Face's class without a head."""
        return self.name.removeprefix(BASE)

    @property
    def rows(self) -> int:
        """Rows of the fused tensor that this part is."""
        return self.shape[0]


def layout(config: Config) -> dict[str, list[Part]]:
    """Our tensors' names, each with the parts that it is made of, stacked along the first axis."""
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads * size, config.num_key_value_heads * size
    made = {
        "embed_tokens.weight": [Part(f"{BASE}embed_tokens.weight", (config.vocab_size, hidden))]
    }

    def put(name: str, *parts: tuple[str, tuple[int, ...]]) -> None:
        made[name] = [Part(f"{BASE}{part}", shape) for part, shape in parts]

    for i, kind in enumerate(config.layer_types):
        at = f"layers.{i}."
        for norm in ("operator_norm.weight", "ffn_norm.weight"):
            put(at + norm, (at + norm, (hidden,)))
        if kind == "conv":
            at += "conv."
            put(at + "in_proj.weight", (at + "in_proj.weight", (3 * hidden, hidden)))
            put(at + "conv.weight", (at + "conv.weight", (hidden, 1, config.conv_L_cache)))
            put(at + "out_proj.weight", (at + "out_proj.weight", (hidden, hidden)))
            if config.conv_bias:
                put(at + "in_proj.bias", (at + "in_proj.bias", (3 * hidden,)))
                put(at + "conv.bias", (at + "conv.bias", (hidden,)))
                put(at + "out_proj.bias", (at + "out_proj.bias", (hidden,)))
        else:
            at += "self_attn."
            put(
                at + "qkv_proj.weight",
                (at + "q_proj.weight", (heads, hidden)),
                (at + "k_proj.weight", (kv_heads, hidden)),
                (at + "v_proj.weight", (kv_heads, hidden)),
            )
            put(at + "out_proj.weight", (at + "out_proj.weight", (hidden, heads)))
            for norm in ("q_layernorm.weight", "k_layernorm.weight"):
                put(at + norm, (at + norm, (size,)))
        at = f"layers.{i}.feed_forward."
        put(
            at + "gate_up_proj.weight",
            (at + "w1.weight", (inner, hidden)),
            (at + "w3.weight", (inner, hidden)),
        )
        put(at + "down_proj.weight", (at + "w2.weight", (hidden, inner)))
    put("embedding_norm.weight", ("embedding_norm.weight", (hidden,)))
    if not config.tie_word_embeddings:
        made["lm_head.weight"] = [Part("lm_head.weight", (config.vocab_size, hidden))]
    if config.quantization is not None:
        for name in [name for name, parts in made.items() if is_matrix(parts)]:
            scales = [Part(f"{part.name}_scale", part.shape[:1]) for part in made[name]]
            made[f"{name}_scale"] = scales
    return made


def is_matrix(parts: list[Part]) -> bool:
    """Whether a tensor of these parts is one of those that quantization is about."""
    return len(parts[0].shape) == 2


def stored_dtype(config: Config, parts: list[Part]) -> torch.dtype | None:
    """What a quantized checkpoint's tensor is stored as whatever the model's dtype, else None."""
    if config.quantization is not None:
        if is_matrix(parts):
            return torch.int8
        if parts[0].name.endswith("_scale"):
            return torch.float32
    return None


def weight_bytes(config: Config, dtype: torch.dtype) -> int:
    """Bytes of all tensors of a checkpoint, what is not in 8 bits being in ``dtype``."""
    return sum(
        (stored_dtype(config, parts) or dtype).itemsize * sum(math.prod(p.shape) for p in parts)
        for parts in layout(config).values()
    )
