"""load(): from a checkpoint's name to a model that is ready to run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from lfm2_fast.hf.causal_lm import Lfm2ForCausalLM
from lfm2_fast.hf.load_args import quantization_of
from lfm2_fast.hf.loading import Device, load_as


def load(
    model: str | os.PathLike[str],
    *,
    device: Device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str = "",
    variant: str | None = None,
    gguf_file: str | None = None,
    max_length: int | None = None,
    backend: str = "auto",
    quantization: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    adapter_kwargs: Mapping[str, Any] | None = None,
    config: Any = None,
    generation_config: Any = None,
    device_map: Device | Mapping[str, Device] | None = None,
    torch_dtype: str | torch.dtype | None = None,
    quantization_config: Any = None,
    load_in_8bit: bool | None = None,
    load_in_4bit: bool | None = None,
    **others: Any,
) -> Lfm2ForCausalLM:
    """Load an LFM2 checkpoint, ready to run.

    ``model`` is a folder, a hub id ("LiquidAI/LFM2-1.2B"), one with the type of a GGUF file
    ("LiquidAI/LFM2-1.2B-GGUF:Q4_K_M"), or a path to a GGUF file. ``device`` "auto" means the CUDA
    device if there is one, else the CPU. ``dtype`` "auto" means the checkpoint's own; names like
    "bfloat16" are taken too. ``revision``, ``cache_dir``, ``token``, ``local_files_only`` and
    ``force_download`` go to the hub. ``subfolder`` is the checkpoint's folder inside of ``model``,
    ``variant`` a word in the names of its weights, ``gguf_file`` a GGUF file there.
    ``max_length`` limits the context in tokens (default: the model's limit). ``backend`` chooses
    the implementation of the operations, see ``lfm2_fast.ops.select``. ``quantization`` "int8"
    makes the matrices 8-bit integers while they are loaded, about half of bfloat16's memory. "int4"
    makes them GGUF's Q4_0, with embedding and head in int8, about a third. None takes them as they
    are stored. ``adapter`` is the folder or hub id of a LoRA adapter as PEFT saves it, which is
    merged into the weights before they are quantized. If ``model`` is an adapter itself, the base
    that it names is loaded, with the adapter merged. ``adapter_kwargs`` are the adapter's own hub
    options, like ``revision`` and ``subfolder``. ``config`` replaces the checkpoint's config.json,
    ``generation_config`` its generation parameters.

    Hugging Face's spellings are taken as well: ``device_map``, also as ``{"": device}``;
    ``torch_dtype``; ``quantization_config``, ``load_in_8bit`` and ``load_in_4bit``, bitsandbytes' 8
    and 4 bits becoming "int8" and "int4". ``others`` are the rest of its arguments: those without
    an effect here are accepted, the others refused by name (``lfm2_fast.hf.load_args``).

    Raises CheckpointError for a fault in the checkpoint, BackendError for a backend that cannot run
    here. Raises ValueError or TypeError, which name the argument, for any other fault.
    """
    quantization = quantization_of(quantization, quantization_config, load_in_8bit, load_in_4bit)
    return load_as(
        Lfm2ForCausalLM,
        model,
        device=device,
        dtype=dtype,
        max_length=max_length,
        backend=backend,
        quantization=quantization,
        adapter=adapter,
        adapter_kwargs=adapter_kwargs,
        config=config,
        generation_config=generation_config,
        device_map=device_map,
        torch_dtype=torch_dtype,
        hub_options={
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
            "force_download": force_download,
            "subfolder": subfolder,
            "variant": variant,
            "gguf_file": gguf_file,
        },
        others=others,
    )
