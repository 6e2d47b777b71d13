"""Converts a checkpoint for Core ML, in the environment of coremltools.

Imports nothing of the package. Usage: ``convert_coreml.py CHECKPOINT FOLDER TYPE CONTEXT``. Writes
``FOLDER/model.mlpackage`` for texts of up to CONTEXT tokens. Writes beside FOLDER the program that
coremltools converts, which torch can run: ``FOLDER.program.pt``.

The program runs one text. ``input_ids [1, T]`` come after those before, and ``mask [1, 1, T, S]``
is added to the scores of all S tokens so far, T included. Keys, values and the convolutions' last
rows are states, which Core ML holds in float16. ``logits [1, T, V]`` follow each token.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

STATES = ("k_cache", "v_cache", "conv_cache")


class Lfm2(nn.Module):
    """LFM2 of a ``config.json`` and the ``weights`` by Hugging Face's names, with its states.

    A text begins when the states are zeros.
    """

    model_embed_tokens_weight: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    conv_cache: torch.Tensor

    def __init__(
        self, config: dict[str, Any], weights: dict[str, torch.Tensor], context: int
    ) -> None:
        super().__init__()
        rope = config.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default":
            raise SystemExit(f"rope_type={rope['rope_type']!r} is not supported for Core ML")
        self.kinds = config["layer_types"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.size = config["hidden_size"]
        self.width = config.get("head_dim") or self.size // self.heads
        self.eps = config["norm_eps"]
        for name, weight in weights.items():
            self.register_buffer(name.replace(".", "_"), weight)
        theta = rope.get("rope_theta") or config["rope_theta"]
        exponents = torch.arange(0, self.width, 2, dtype=torch.float64) / self.width
        angles = torch.outer(torch.arange(context, dtype=torch.float64), theta**-exponents)
        angles = torch.cat([angles, angles], 1)
        self.register_buffer("cos", angles.cos().float())
        self.register_buffer("sin", angles.sin().float())
        convs = self.kinds.count("conv")
        keys = torch.zeros(len(self.kinds) - convs, self.kv_heads, context, self.width)
        self.register_buffer("k_cache", keys)
        self.register_buffer("v_cache", torch.zeros_like(keys))
        self.rows = config["conv_L_cache"] - 1
        self.register_buffer("conv_cache", torch.zeros(convs, self.size, self.rows))

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = F.embedding(input_ids, self.model_embed_tokens_weight)
        attentions = convs = 0
        for number, kind in enumerate(self.kinds):
            layer = f"model_layers_{number}"
            h = self.norm(x, f"{layer}_operator_norm")
            if kind == "conv":
                x = x + self.conv(h, f"{layer}_conv", convs)
                convs += 1
            else:
                x = x + self.attention(h, mask, f"{layer}_self_attn", attentions)
                attentions += 1
            h, part = self.norm(x, f"{layer}_ffn_norm"), f"{layer}_feed_forward"
            gate, up = self.linear(h, f"{part}_w1"), self.linear(h, f"{part}_w3")
            x = x + self.linear(F.silu(gate) * up, f"{part}_w2")
        x = self.norm(x, "model_embedding_norm")
        return F.linear(x, getattr(self, "lm_head_weight", self.model_embed_tokens_weight))

    def conv(self, h: torch.Tensor, name: str, place: int) -> torch.Tensor:
        """Return a gated short convolution of ``h [1, T, H]``, and keep its last rows."""
        b, c, v = self.linear(h, f"{name}_in_proj").chunk(3, dim=-1)
        here = slice(place, place + 1)
        rows = torch.cat([self.conv_cache[here], (b * v).transpose(1, 2)], -1)
        taps, bias = getattr(self, f"{name}_conv_weight"), getattr(self, f"{name}_conv_bias", None)
        made = F.conv1d(rows, taps, bias, groups=self.size).transpose(1, 2)
        self.conv_cache[here] = rows[..., -self.rows :]
        return self.linear(c * made, f"{name}_out_proj")

    def attention(self, h: torch.Tensor, mask: torch.Tensor, name: str, place: int) -> torch.Tensor:
        """Return attention of ``h [1, T, H]`` to all tokens so far, and keep keys and values."""
        tokens, end = h.shape[1], mask.shape[-1]
        begin = end - tokens
        cos, sin, half = self.cos[begin:end], self.sin[begin:end], self.width // 2

        def heads(part: str, count: int) -> torch.Tensor:
            return self.linear(h, f"{name}_{part}").view(1, tokens, count, self.width)

        def rotated(x: torch.Tensor) -> torch.Tensor:
            x = x.transpose(1, 2)
            return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

        q = rotated(self.norm(heads("q_proj", self.heads), f"{name}_q_layernorm"))
        k = rotated(self.norm(heads("k_proj", self.kv_heads), f"{name}_k_layernorm"))
        here = slice(place, place + 1)
        self.k_cache[here, :, begin:end] = k
        self.v_cache[here, :, begin:end] = heads("v_proj", self.kv_heads).transpose(1, 2)
        each = self.heads // self.kv_heads
        keys = self.k_cache[here, :, :end].repeat_interleave(each, 1)
        values = self.v_cache[here, :, :end].repeat_interleave(each, 1)
        scores = q @ keys.transpose(-1, -2) * self.width**-0.5 + mask
        made = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        return self.linear(made, f"{name}_out_proj")

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Return the RMSNorm of ``x`` over its last axis."""
        weight = getattr(self, f"{name}_weight")
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * weight

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Return a projection of ``x``."""
        return F.linear(x, getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias", None))


def traced(model: Lfm2) -> torch.jit.ScriptModule:
    """Return the program that coremltools converts, its states zeros."""
    ids = torch.zeros(1, 2, dtype=torch.int32)
    with torch.no_grad():
        made = torch.jit.trace(model, (ids, torch.zeros(1, 1, 2, 5)), check_trace=False)
    for name in STATES:
        getattr(made, name).zero_()
    return made


def in_float16(op: Any) -> bool:
    """Return False for a norm up to its root: squares of numbers from 256 on overflow."""
    if op.op_type == "mul":
        return op.x is not op.y
    if op.op_type == "add":
        return all(each.op is None or each.op.op_type != "reduce_mean" for each in (op.x, op.y))
    return op.op_type not in ("square", "pow", "reduce_mean", "rsqrt")


def main() -> None:
    source, folder = map(Path, sys.argv[1:3])
    type, context = sys.argv[3], int(sys.argv[4])
    import coremltools as ct

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    weights = load_file(source / "model.safetensors")
    if type == "f16":
        weights = {name: weight.half().float() for name, weight in weights.items()}
    program = traced(Lfm2(config, weights, context).eval())
    program.save(folder.with_name(f"{folder.name}.program.pt"))
    tokens, end = (ct.RangeDim(lower_bound=1, upper_bound=context, default=1) for _ in range(2))
    number = {"f16": np.float16, "f32": np.float32}[type]
    half = ct.transform.FP16ComputePrecision(op_selector=in_float16)
    precision = {"f16": half, "f32": ct.precision.FLOAT32}[type]
    states = [
        ct.StateType(
            ct.TensorType(shape=tuple(getattr(program, name).shape), dtype=np.float16), name
        )
        for name in STATES
    ]
    package = ct.convert(
        program,
        inputs=[
            ct.TensorType("input_ids", (1, tokens), np.int32),
            ct.TensorType("mask", (1, 1, tokens, end), number),
        ],
        outputs=[ct.TensorType("logits", dtype=number)],
        states=states,
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=precision,
        skip_model_load=True,
    )
    folder.mkdir()
    package.save(str(folder / "model.mlpackage"))


if __name__ == "__main__":
    main()
