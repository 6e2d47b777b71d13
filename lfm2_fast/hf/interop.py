"""Into and out of transformers: models in memory, and its Auto classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lfm2_fast.hf.causal_lm import Lfm2ForCausalLM, Lfm2Model
from lfm2_fast.hf.configuration import Lfm2Config
from lfm2_fast.hf.loading import check_options
from lfm2_fast.weights.formats import DENSE, Format
from lfm2_fast.weights.fusion import BASE, HEAD, formats_of, fusion_table, widen_for
from lfm2_fast.weights.safetensors_files import BLOCK


def from_transformers(
    model: Any,
    *,
    quantization: str | None = None,
    backend: str = "auto",
    max_length: int | None = None,
) -> Lfm2ForCausalLM | Lfm2Model:
    """Return our model of transformers' LFM2 model in memory, as it is now.

    Takes ``Lfm2ForCausalLM`` or ``Lfm2Model``. Tensors that both store alike are shared: embedding,
    head, norms, taps, biases, in_proj, out_proj and down_proj. Fused ones (q, k and v; gate and up)
    are copies, at the published sizes 46 to 53 % of the weights. With ``quantization`` all matrices
    are copies in that format. The copies are all that the call allocates, but for a few megabytes:
    its peak of memory is ``model`` and the copies.

    ``model`` is not changed and stays usable. A change in place shows in both where the tensor is
    shared, and in one alone where it was copied: after an edit, call this again. When ``model`` is
    deleted, what was fused or quantized is freed there, and the weights are held once.

    Raises TypeError for another model, ValueError for one that is quantized, has an adapter or lies
    on several devices, and for options that ``load`` refuses.
    """
    config = getattr(model, "config", None)
    if hasattr(model, "peft_config") or any(
        "lora_" in name for name, _ in model.named_parameters()
    ):
        raise ValueError("the model has an adapter: call merge_and_unload() first")
    if getattr(config, "model_type", None) != "lfm2":
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
    kind = Lfm2ForCausalLM if HEAD in model.state_dict() else Lfm2Model
    ours = Lfm2Config.of(config)
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
    settings = getattr(model, "generation_config", None)
    return kind(
        ours,
        weights,
        backend=backend,
        max_length=max_length,
        generation_config=None if settings is None else settings.to_dict(),
        name_or_path=getattr(model, "name_or_path", ""),
    )


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


def register() -> None:
    """Make transformers' Auto classes give this package's models for LFM2 checkpoints.

    ``AutoModelForCausalLM`` and ``AutoModel`` then load them in every framework that uses those
    classes. ``unregister`` undoes it.
    """
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers import Lfm2Config as Theirs

    AutoModelForCausalLM.register(Theirs, Lfm2ForCausalLM, exist_ok=True)
    AutoModel.register(Theirs, Lfm2Model, exist_ok=True)


def unregister() -> None:
    """Give transformers' Auto classes their own LFM2 models again."""
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers import Lfm2Config as Theirs

    for auto in (AutoModelForCausalLM, AutoModel):
        auto._model_mapping._extra_content.pop(Theirs, None)
