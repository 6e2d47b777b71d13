"""Facts for ``lfm2-fast info``: the machine, the backend of each operation, and a checkpoint."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import lfm2_fast
from lfm2_fast.cli.session import millions
from lfm2_fast.config import OTHER_METHOD, Config
from lfm2_fast.config_values import read_json
from lfm2_fast.hf.loading import find_device
from lfm2_fast.ops import native_library
from lfm2_fast.ops.base import Ops
from lfm2_fast.ops.native_ops import multiplies, multiplies_int8
from lfm2_fast.ops.select import BACKENDS, choose, why_not
from lfm2_fast.text.presets import sampling
from lfm2_fast.weights import hub
from lfm2_fast.weights.checkpoint import GENERATION_CONFIG
from lfm2_fast.weights.fusion import checkpoint_bytes, num_parameters
from lfm2_fast.weights.gguf_checkpoint import with_formats
from lfm2_fast.weights.gguf_config import raw_config
from lfm2_fast.weights.gguf_file import GGUFFile, read_gguf

Facts = dict[str, dict[str, Any]]

# Fused operations. A backend without its own version of one composes it from the others.
FUSED = (
    "embed_rope", "norm_linear", "norm_conv", "attend", "linear_add", "norm_swiglu", "head_argmax",
    "head_advance",
)  # fmt: skip
# Methods of ``Ops`` that are not operations.
HELPERS = ("verified_tokens", "adapted", "at", "adapts", "adapt", "adapt_rows")
# The instructions that make the CPU code faster, as Linux calls them.
FEATURES = "avx2 avx512f avx512_bf16 avx512_vnni amx_bf16 asimd sve bf16 i8mm".split()


def machine_facts(device: str = "auto", backend: str = "auto") -> Facts:
    """Collect versions, the device, the backend of each operation, and the backends that run.

    Raises ValueError or BackendError for a device or a backend that does not exist here.
    """
    where = find_device(device)
    chosen = choose(backend, where, torch.bfloat16)
    return {
        "versions": versions(),
        "device": {**hardware(where), "backend": chosen.name},
        "operations": operations(chosen),
        "backends": backends(where),
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """Facts about ``device`` that decide its speed."""
    return {"device": str(device), **(_cpu() if device.type == "cpu" else _gpu(device))}


def versions() -> dict[str, str]:
    """Versions of Python and the main packages."""
    found = {"lfm2_fast": lfm2_fast.__version__, "python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "safetensors"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def operations(chosen: Ops) -> dict[str, str]:
    """Return the name of the backend that runs each operation of ``chosen``."""
    classes = [cls for cls in type(chosen).__mro__ if issubclass(cls, Ops)]
    found = {}
    for name, value in vars(Ops).items():
        if callable(value) and not name.startswith("_") and name not in HELPERS:
            owner = next(cls for cls in classes if name in vars(cls))
            if owner is not Ops or name not in FUSED:
                found[name] = owner.name
    return found


def backends(device: torch.device) -> dict[str, str]:
    """Return "yes" for every backend that runs on ``device``, or why it is slow or does not run."""
    names = [name for name in BACKENDS if name != "auto"]
    found = {
        name: f"no: {lacking}" if (lacking := why_not(name, device, torch.float32)) else "yes"
        for name in names
    }
    if slow := native_library.why_slow(device):
        found["native"] = f"yes, but slowly: {slow}"
    return found


def checkpoint_facts(name: str, **options: Any) -> Facts:
    """Return the facts in a checkpoint's config, and its bytes if the dtype is known.

    ``options`` are those of the hub. Raises CheckpointError.
    """
    folder = hub.find_checkpoint(name, weights=False, **options)
    file = read_gguf(folder) if folder.is_file() else None
    if file is not None:
        config = Config.from_dict(raw_config(file), str(file.path))
        config = with_formats(file, config)
    else:
        config = Config.from_file(folder / "config.json")
    stored = folder / GENERATION_CONFIG
    attention = config.layer_types.count("full_attention")
    conv = config.layer_types.count("conv")
    _, words = sampling(name, file=read_json(stored) if stored.is_file() else None)
    return {
        "model": {
            "name": name,
            "parameters": num_parameters(config),
            "dtype": config.dtype,
            "quantization": config.quantization,
            **(_bytes(config, getattr(torch, config.dtype)) if config.dtype else {}),
            "layers": config.num_hidden_layers,
            "conv_layers": conv,
            "attention_layers": attention,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "attention_heads": config.num_attention_heads,
            "key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "conv_width": config.conv_L_cache,
            "vocab_size": config.vocab_size,
            "context": config.context_length,
            "sampling": words,
        },
        **({"gguf": gguf_facts(file)} if file is not None else {}),
    }


def gguf_facts(file: GGUFFile) -> dict[str, Any]:
    """Return the types of a GGUF file's tensors, with count and bytes, and its tokenizer."""
    found = file.metadata
    sizes: dict[str, list[int]] = {}
    for tensor in file.tensors.values():
        sizes.setdefault(tensor.type, []).append(tensor.nbytes)
    largest = sorted(sizes, key=lambda type: -sum(sizes[type]))
    return {
        "architecture": found.get("general.architecture"),
        "name": found.get("general.name"),
        **{f"{type}_tensors": len(sizes[type]) for type in largest},
        **{f"{type}_bytes": sum(sizes[type]) for type in largest},
        "tokenizer": found.get("tokenizer.ggml.pre") or found.get("tokenizer.ggml.model"),
        "tokens": len(found.get("tokenizer.ggml.tokens") or ()),
        "chat_template": "yes" if found.get("tokenizer.chat_template") else "no",
    }


def _bytes(config: Config, dtype: torch.dtype) -> dict[str, int]:
    window = config.conv_L_cache * config.hidden_size * dtype.itemsize
    # The bytes of another method's tensors are known only from their files.
    is_known = config.quantization != OTHER_METHOD
    return {
        **({"weight_bytes": checkpoint_bytes(config, dtype)} if is_known else {}),
        "cache_bytes_per_token": config.cache_bytes(dtype.itemsize),
        "conv_bytes_per_sequence": config.layer_types.count("conv") * window,
    }


def show(facts: Facts, *, as_json: bool = False) -> None:
    """Write facts to stdout: JSON, a table on a terminal, else one fact a line."""
    console = Console(highlight=False)
    if as_json:
        print(json.dumps(facts, indent=2))
    elif console.is_terminal:
        for section, entries in facts.items():
            table = Table(title=section, title_justify="left", title_style="bold", box=None)
            table.show_header = False
            table.add_column(style="dim", no_wrap=True)
            table.add_column(overflow="fold")
            for key, value in entries.items():
                table.add_row(f"  {key}", readable(key, value))
            console.print(table)
    else:
        for section, entries in facts.items():
            for key, value in entries.items():
                print(f"{section}.{key}: {readable(key, value)}")


def readable(key: str, value: Any) -> str:
    """Format a fact for people: bytes in units, large counts in words, "-" for None."""
    if value is None:
        return "-"
    if key.endswith(("bytes", "bytes_per_token", "bytes_per_sequence")):
        units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
        unit, name = next((unit for unit in units if value >= unit[0]), (1, "bytes"))
        return f"{value / unit:.4g} {name}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return millions(value) if key == "parameters" else str(value)


def _cpu() -> dict[str, Any]:
    facts: dict[str, Any] = {"name": platform.processor() or platform.machine()}
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        lines = (line.partition(":") for line in listing.read_text().splitlines())
        first: dict[str, str] = {}
        for key, _, value in lines:
            first.setdefault(key.strip(), value.strip())
        facts["name"] = first.get("model name", facts["name"])
        flags = (first.get("flags") or first.get("Features") or "").split()
        facts["features"] = " ".join(name for name in FEATURES if name in flags)
    products = ["float32"] + ["bfloat16"] * multiplies(torch.bfloat16)
    return {
        **facts,
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "products": " ".join(products + ["int8"] * multiplies_int8()),
        "threads": torch.get_num_threads(),
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts = {
            "name": found.name,
            "compute_capability": f"{found.major}.{found.minor}",
            "memory_bytes": found.total_memory,
            "cuda": torch.version.cuda,
        }
    return facts
