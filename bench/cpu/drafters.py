"""Random DSpark drafters in the layout of LiquidAI's checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANK, DEPTH, BLOCK, MASK = 8, 2, 5, 3


def published(target: Any) -> dict[str, Any]:
    """Return the arguments of ``write_drafter`` for a drafter like the published ones."""
    layers = target.num_hidden_layers
    taps = [layers * n // 6 for n in range(1, 6)]
    return {"depth": 5, "block": 9, "rank": 256, "inner": 3 * target.hidden_size, "taps": taps}


def write_drafter(
    folder: Path,
    target: Any,
    *,
    depth: int = DEPTH,
    block: int = BLOCK,
    rank: int = RANK,
    inner: int = 96,
    taps: list[int] | None = None,
    **changes: Any,
) -> Path:
    """Write a random drafter of a target, in the form of LiquidAI's; return its folder.

    ``taps`` are the layers of the target that it reads: by default the first and the last but one.
    """
    folder.mkdir()
    layers = target.num_hidden_layers
    taps = taps or [0, layers - 2]
    fields = {
        "architectures": ["Lfm2DSparkDraftModel"],
        "model_type": "qwen3",
        "hidden_size": target.hidden_size,
        "num_hidden_layers": depth,
        "num_attention_heads": target.num_attention_heads,
        "num_key_value_heads": target.num_key_value_heads,
        "head_dim": target.head_dim,
        "intermediate_size": inner,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "vocab_size": target.vocab_size,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "layer_types": ["full_attention"] * depth,
        "block_size": block,
        "dflash_config": {
            "mask_token_id": MASK,
            "target_layer_ids": taps,
            "num_target_layers": layers,
        },
        "markov_rank": rank,
        "markov_head_type": "vanilla",
        "rope_is_neox_style": False,
        "enable_confidence_head": True,
    } | changes
    (folder / "config.json").write_text(json.dumps(fields))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes_of(target, depth, rank, inner, len(taps)).items():
        drawn = torch.randn(shape, generator=generator)
        tensors[name] = 1 + drawn / 4 if len(shape) == 1 else drawn / math.sqrt(shape[1])
    save_file(tensors, folder / "model.safetensors")
    return folder


def shapes_of(
    target: Any, depth: int, rank: int, inner: int, taps: int
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a drafter, by name."""
    hidden, width = target.hidden_size, target.head_dim
    heads, kv = target.num_attention_heads * width, target.num_key_value_heads * width
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, taps * hidden),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
        "markov_head.markov_w1.weight": (target.vocab_size, rank),
        "markov_head.markov_w2.weight": (target.vocab_size, rank),
        "confidence_head.proj.weight": (1, hidden + rank),
        "confidence_head.proj.bias": (1,),
    }
    for number in range(depth):
        at = f"layers.{number}."
        shapes |= {
            f"{at}input_layernorm.weight": (hidden,),
            f"{at}post_attention_layernorm.weight": (hidden,),
            f"{at}self_attn.q_proj.weight": (heads, hidden),
            f"{at}self_attn.k_proj.weight": (kv, hidden),
            f"{at}self_attn.v_proj.weight": (kv, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, heads),
            f"{at}self_attn.q_norm.weight": (width,),
            f"{at}self_attn.k_norm.weight": (width,),
            f"{at}mlp.gate_proj.weight": (inner, hidden),
            f"{at}mlp.up_proj.weight": (inner, hidden),
            f"{at}mlp.down_proj.weight": (hidden, inner),
        }
    return shapes
