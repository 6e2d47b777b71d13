"""Weights of transformers' LFM2 models in memory, as this package's network takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lfm2_fast.hf.configuration import Lfm2Config
from lfm2_fast.hf.loading import check_options
from lfm2_fast.weights.formats import DENSE, Format
from lfm2_fast.weights.fusion import BASE, HEAD, formats_of, fusion_table, widen_for
from lfm2_fast.weights.safetensors_files import BLOCK


def fused_weights(
    model: Any,
    quantization: str | None = None,
    backend: str = "auto",
    max_length: int | None = None,
) -> tuple[Lfm2Config, dict[str, torch.Tensor]]:
    """Return the config of transformers' LFM2 model and its tensors, fused, by our names.

    What both store alike is shared. Raises as ``from_transformers`` does.
    """
    _check_source(model)
    ours = Lfm2Config.of(model.config)
    state = {
        name if name == HEAD or name.startswith(BASE) else BASE + name: tensor.detach()
        for name, tensor in model.state_dict().items()
    }
    embedding = state[f"{BASE}embed_tokens.weight"]
    check_options(
        device=embedding.device,
        dtype=embedding.dtype,
        max_length=max_length,
        backend=backend,
        quantization=quantization,
    )
    head = state.get(HEAD, embedding)
    ours.tie_word_embeddings = head.data_ptr() == embedding.data_ptr()
    ours.vocab_size = len(embedding)
    ours.dtype = str(embedding.dtype).removeprefix("torch.")
    dense = ours.to_internal()
    formats = formats_of(replace(dense, quantization=quantization))
    weights: dict[str, torch.Tensor] = {}
    for name, fused in fusion_table(dense).items():
        parts = [state[part.name] for part in fused.parts]
        format = formats[name] if fused.is_matrix else DENSE
        if format is not DENSE:
            made = zip(format.suffixes, _quantized(parts, format), strict=True)
            weights.update({name + suffix: part for suffix, part in made})
        elif len(parts) == 1:
            weights[name] = parts[0].reshape(fused.shape)
        else:
            weights[name] = torch.cat(parts)
    held = widen_for(embedding.device, replace(dense, quantization=quantization), weights)
    if held.quantization is not None:
        ours.quantization_config = held.quantization_config
    return ours, weights


def _check_source(model: Any) -> None:
    """Raise TypeError or ValueError unless ``model`` is a whole dense LFM2 on one device."""
    if hasattr(model, "peft_config") or any(
        "lora_" in name for name, _ in model.named_parameters()
    ):
        raise ValueError("the model has an adapter: call merge_and_unload() first")
    if getattr(getattr(model, "config", None), "model_type", None) != "lfm2":
        raise TypeError(f"from_transformers() takes an LFM2 model, not {type(model).__name__}")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "the model is quantized: load it without quantization_config, and give "
            "from_transformers() quantization='int8'"
        )
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    if len({tensor.device for tensor in tensors.values()}) > 1:
        raise ValueError("the model lies on several devices: move it to one with model.to(device)")
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError("some weights of the model are offloaded: load it without device_map")


def _quantized(parts: Sequence[torch.Tensor], format: Format) -> list[torch.Tensor]:
    """Return the matrix of ``parts [n, K]``, stacked, in ``format``, made some rows at a time."""
    shape = (sum(map(len, parts)), parts[0].shape[1])
    made = [
        torch.empty(own, dtype=dtype or parts[0].dtype, device=parts[0].device)
        for own, dtype in format.parts(shape).values()
    ]
    first, count = 0, max(1, BLOCK // shape[1])
    for part in parts:
        places = [each[first : first + len(part)] for each in made]
        here = (slice(i, i + count) for i in range(0, len(part), count))
        format.fill(places, ((rows, part[rows]) for rows in here))
        first += len(part)
    format.interleave(made)
    return made
