"""load(): from a checkpoint's name to a model that is ready to run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lfm2_fast.config import Config, read_json
from lfm2_fast.hf.causal_lm import Lfm2ForCausalLM
from lfm2_fast.ops.select import choose
from lfm2_fast.weights import checkpoint, hub
from lfm2_fast.weights.formats import FORMATS

Device = str | int | torch.device


def load(
    model: str | os.PathLike[str],
    *,
    device: Device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    max_length: int | None = None,
    backend: str = "auto",
    quantization: str | None = None,
    device_map: Device | Mapping[str, Device] | None = None,
    torch_dtype: str | torch.dtype | None = None,
) -> Lfm2ForCausalLM:
    """Load an LFM2 checkpoint, ready to run.

    ``model`` is a hub id ("LiquidAI/LFM2-1.2B") or a folder. ``device`` "auto" means the
    CUDA device if there is one, else the CPU; ``device_map`` is another name for it, as Hugging
    Face's callers write, and may be ``{"": device}`` too. ``dtype`` "auto" means the checkpoint's
    own; names like "bfloat16" or "float32" are taken too, and ``torch_dtype`` is its older name.
    ``revision``, ``cache_dir``, ``token`` and ``local_files_only`` go to
    the hub. ``max_length`` bounds the context in tokens (default: the model's limit). ``backend``
    chooses the bodies of the operations, see ``lfm2_fast.ops``. ``quantization`` "int8" makes the
    matrices 8-bit integers while they are loaded, about half of bfloat16's memory; None takes them
    as they are stored, which is so for what ``save_pretrained`` wrote of such a model.

    Raises CheckpointError for what is wrong with the checkpoint, BackendError for a backend that
    is not there, ValueError for any other argument.
    """
    where, named = check_options(
        device=device,
        dtype=dtype,
        max_length=max_length,
        backend=backend,
        quantization=quantization,
        device_map=device_map,
        torch_dtype=torch_dtype,
    )
    folder = hub.find_checkpoint(
        model,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
    )
    config = Config.from_file(folder / "config.json")
    if named is None and config.dtype is not None:
        named = _dtype(config.dtype)
    return Lfm2ForCausalLM(
        replace(config, quantization=quantization or config.quantization),
        checkpoint.load_weights(
            folder, config, device=where, dtype=named, quantization=quantization
        ),
        backend=backend,
        max_length=max_length,
        generation_config=_generation_config(folder, config),
        name_or_path=os.fspath(model),
    )


def check_options(
    *,
    device: Device = "auto",
    dtype: str | torch.dtype = "auto",
    max_length: int | None = None,
    backend: str = "auto",
    quantization: str | None = None,
    device_map: Device | Mapping[str, Device] | None = None,
    torch_dtype: str | torch.dtype | None = None,
    **_: Any,
) -> tuple[torch.device, torch.dtype | None]:
    """The device and the dtype that these options of ``load`` mean; None is the checkpoint's own.

    Raises, as ``load``, for what is wrong with them whatever the checkpoint is. The others, which
    are the hub's, may stand beside them and are not looked at.
    """
    if device_map is not None:
        if device != "auto":
            raise ValueError("give device or device_map, not both")
        device = _whole(device_map)
    if torch_dtype is not None:
        if dtype != "auto":
            raise ValueError("give dtype or torch_dtype, not both")
        dtype = torch_dtype
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    if quantization is not None and quantization not in FORMATS:
        raise ValueError(f"quantization={quantization!r} is not supported; use 'int8' or None")
    where, named = find_device(device), None if dtype == "auto" else _dtype(dtype)
    choose(backend, where, named or torch.float32)
    return where, named


def find_device(device: Device) -> torch.device:
    """The device that is meant, "auto" included. Raises ValueError for one that is not there."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device == "auto":
        # Others than CUDA are taken when they are named; nothing was tried on them.
        is_cuda = accelerator is not None and accelerator.type == "cuda"
        return torch.device("cuda" if is_cuda else "cpu")
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device={str(device)!r} is not a device; use 'auto', 'cpu' or 'cuda'"
        ) from error
    if where.type != "cpu":
        if accelerator is None or accelerator.type != where.type:
            raise ValueError(
                f"device={str(device)!r} is not available: torch {torch.__version__} sees "
                f"{accelerator or 'no accelerator'} here; use device='cpu'"
            )
        if where.index is not None and where.index >= torch.accelerator.device_count():
            raise ValueError(
                f"device={str(device)!r} is not available: there are "
                f"{torch.accelerator.device_count()} devices, counted from 0"
            )
    return where


def _whole(device_map: Device | Mapping[str, Device]) -> Device:
    """The device that Hugging Face's ``device_map`` gives to the whole model."""
    if not isinstance(device_map, Mapping):
        return device_map
    if set(device_map) != {""}:
        raise ValueError(
            f"device_map={dict(device_map)!r} names parts of the model, which lfm2_fast runs on "
            "one device; use {'': device}"
        )
    return device_map[""]


def _generation_config(folder: Path, config: Config) -> dict[str, Any]:
    """The checkpoint's own, or, as Hugging Face does, the special tokens of its config."""
    path = folder / checkpoint.GENERATION_CONFIG
    if path.is_file():
        return read_json(path)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = {name: config.to_dict()[name] for name in names}
    return {name: token for name, token in found.items() if token is not None}


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(
            f"dtype={dtype!r} is not supported; use 'auto', 'bfloat16', 'float16' or 'float32'"
        )
    return found
