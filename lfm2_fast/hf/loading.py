"""From a checkpoint's name and options to a model of some class."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from lfm2_fast.config import OTHER_METHOD, Config
from lfm2_fast.config_values import CheckpointError, read_json
from lfm2_fast.hf.adapter_lookup import find_adapter_and_base
from lfm2_fast.hf.configuration import Lfm2Config
from lfm2_fast.hf.load_args import check_load_args
from lfm2_fast.ops.cpu_threads import release_threads
from lfm2_fast.ops.select import choose
from lfm2_fast.weights import checkpoint, compressed_tensors, gguf_checkpoint, gguf_config
from lfm2_fast.weights.adapter import Adapter, read_adapter
from lfm2_fast.weights.adapter_merge import merged_config
from lfm2_fast.weights.formats import FORMATS
from lfm2_fast.weights.fusion import widen_for
from lfm2_fast.weights.gguf_file import GGUFFile, read_gguf

Device = str | int | torch.device
Model = TypeVar("Model", bound=torch.nn.Module)


def load_as(
    kind: Callable[..., Model],
    model: str | os.PathLike[str],
    *,
    config: Any,
    generation_config: Any,
    hub_options: Mapping[str, Any],
    others: Mapping[str, Any],
    **options: Any,
) -> Model:
    """Load a checkpoint as a model of class ``kind``; the arguments are those of ``load``.

    ``options`` are those of ``check_options``, ``hub_options`` those of ``find_checkpoint``, and
    ``others`` all further arguments of Hugging Face's callers.
    """
    where, named = check_options(**options)
    check_load_args(others)
    # The changes of the config below are the model's, not the caller's.
    given = None if config is None else copy.deepcopy(Lfm2Config.of(config))
    adapter_folder, folder = find_adapter_and_base(
        model,
        options["adapter"],
        hub_options,
        options["adapter_kwargs"],
        from_auto=bool(others.get("_from_auto")),
    )
    file = read_gguf(folder) if folder.is_file() else None
    if file is not None:
        raw = gguf_config.raw_config(file)
        inner = Config.from_dict(raw, str(file.path)) if given is None else given.to_internal()
        given = given or Lfm2Config.from_dict(raw)
    elif given is None:
        path = folder / "config.json"
        raw = read_json(path)
        inner = Config.from_dict(raw, str(path))
        given = Lfm2Config.from_dict(raw)
    else:
        inner = given.to_internal()
    given.name_or_path = os.fspath(model)
    if named is None and inner.dtype is not None:
        named = _dtype(inner.dtype)
    adapter = None if adapter_folder is None else read_adapter(adapter_folder, inner)
    if adapter is not None:
        merged_config(inner, adapter)  # raises before anything is read
    quantization, variant = options["quantization"], hub_options.get("variant")
    if file is not None:
        inner, weights = _of_gguf(file, inner, where, named, quantization, adapter)
    else:
        inner, weights = _of_folder(folder, inner, where, named, quantization, variant, adapter)
    given.tie_word_embeddings = inner.tie_word_embeddings
    inner = replace(inner, quantization=inner.quantization or quantization)
    inner = widen_for(where, inner, weights)
    if inner.quantization is not None:
        given.quantization_config = inner.quantization_config
    made = kind(
        given,
        weights,
        internal=inner,
        backend=options["backend"],
        max_length=options["max_length"],
        generation_config=generation_config or _generation_config(folder, file, inner),
        name_or_path=os.fspath(model),
    )
    if options["device_map"] is not None:
        # Clients that see this attribute do not move the model.
        setattr(made, "hf_device_map", {"": where})  # noqa: B010  (a type checker knows it not)
    # Texts may be written in another thread, as with transformers' TextIteratorStreamer.
    release_threads()
    return made


def _of_gguf(
    file: GGUFFile,
    config: Config,
    device: torch.device,
    dtype: torch.dtype | None,
    quantization: str | None,
    adapter: Adapter | None,
) -> tuple[Config, dict[str, torch.Tensor]]:
    """Return the config and tensors of a GGUF file."""
    if adapter is not None:
        raise CheckpointError(
            f"{adapter.folder} cannot be merged into a GGUF file's weights: load the model "
            "without adapter= and call load_adapter()"
        )
    config = gguf_checkpoint.with_formats(file, config)
    gguf_checkpoint.check_quantization(file, config, quantization)
    weights = gguf_checkpoint.load_weights(
        file, config, device=device, dtype=dtype or torch.bfloat16, quantization=quantization
    )
    return config, weights


def _of_folder(
    folder: Path,
    config: Config,
    device: torch.device,
    dtype: torch.dtype | None,
    quantization: str | None,
    variant: str | None,
    adapter: Adapter | None,
) -> tuple[Config, dict[str, torch.Tensor]]:
    """Return the config and tensors of a folder of safetensors, with an adapter merged."""
    if config.quantization == OTHER_METHOD:
        _refuse_twice(folder, quantization)
        config, found = compressed_tensors.sources(folder, config, variant)
        weights = compressed_tensors.load_weights(folder, config, found, device=device, dtype=dtype)
        return config, weights
    config = checkpoint.with_stored_head(folder, config, variant)
    weights = checkpoint.load_weights(
        folder,
        config,
        device=device,
        dtype=dtype,
        quantization=quantization,
        variant=variant,
        adapter=adapter,
    )
    return (config if adapter is None else merged_config(config, adapter)), weights


def _refuse_twice(folder: Path, quantization: str | None) -> None:
    """Raise ValueError if ``quantization`` is given for a checkpoint that is already quantized."""
    if quantization is not None:
        raise ValueError(
            f"quantization={quantization!r}: {folder} is already quantized ({OTHER_METHOD}), "
            "and is used as it is; leave quantization out, or give the unquantized checkpoint"
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
    """Return device and dtype for these options of ``load``; dtype None is the checkpoint's own.

    Raises, as ``load`` does, for options that are wrong for any checkpoint. Options of the hub may
    be among them and are ignored.
    """
    if device_map is not None:
        if device != "auto":
            raise ValueError("give device or device_map, not both")
        device = _whole(device_map)
        if device in ("balanced", "balanced_low_0", "sequential"):
            device = "auto"  # with one device they mean the same
    if torch_dtype is not None:
        if dtype != "auto":
            raise ValueError("give dtype or torch_dtype, not both")
        dtype = torch_dtype
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    makes = [name for name, format in FORMATS.items() if format.from_dense]
    if quantization not in makes:
        known = ", ".join(repr(each) for each in makes if each)
        raise ValueError(f"quantization={quantization!r} is not supported; use {known} or None")
    where, named = find_device(device), None if dtype == "auto" else _dtype(dtype)
    choose(backend, where, named or torch.float32)
    return where, named


def find_device(device: Device) -> torch.device:
    """Return the device of a name, "auto" included. Raises ValueError if it does not exist."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device == "auto":
        # Other devices are accepted by name. Nothing was tried on one.
        is_cuda = accelerator is not None and accelerator.type == "cuda"
        return torch.device("cuda" if is_cuda else "cpu")
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device={str(device)!r} is not a device; use 'auto', 'cpu' or 'cuda'"
            f"{_advice(str(device))}"
        ) from error
    if where.type != "cpu":
        if accelerator is None or accelerator.type != where.type:
            raise ValueError(
                f"device={str(device)!r} is not available: torch {torch.__version__} sees "
                f"{accelerator or 'no accelerator'} here; use device='cpu'{_advice(where.type)}"
            )
        if where.index is not None and where.index >= torch.accelerator.device_count():
            raise ValueError(
                f"device={str(device)!r} is not available: there are "
                f"{torch.accelerator.device_count()} devices, counted from 0"
            )
    return where


def _advice(device: str) -> str:
    """Return more advice on a device that is missing."""
    if device.startswith("npu"):
        return (
            ". torch has Ascend's NPUs where torch_npu is installed. Intel's run an export: "
            "lfm2-fast export openvino"
        )
    return ""


def _whole(device_map: Device | Mapping[str, Device]) -> Device:
    """Return the device of the whole model in Hugging Face's ``device_map``."""
    if not isinstance(device_map, Mapping):
        return device_map
    if set(device_map) != {""}:
        raise ValueError(
            f"device_map={dict(device_map)!r} names parts of the model, which lfm2_fast runs on "
            "one device; use {'': device}"
        )
    return device_map[""]


def _generation_config(folder: Path, file: GGUFFile | None, config: Config) -> dict[str, Any]:
    """Return the checkpoint's own or, as Hugging Face does, the special tokens of its config."""
    if file is not None:
        return gguf_config.generation_config(file, config)
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
