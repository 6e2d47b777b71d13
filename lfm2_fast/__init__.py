"""lfm2_fast: Liquid AI's LFM2 language models on one GPU or one CPU."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A wheel has the Triton kernels in lfm2_fast/kernels. A checkout has them in the folder beside this
# package: that folder, and nothing else of the root, becomes the package lfm2_fast.kernels.
if not (Path(__file__).parent / "kernels").is_dir():
    _spec = ModuleSpec(f"{__name__}.kernels", None, is_package=True)
    _spec.submodule_search_locations = [str(Path(__file__).resolve().parent.parent / "kernels")]
    kernels = sys.modules[_spec.name] = module_from_spec(_spec)
    del _spec

__version__ = "0.2.0"
__all__ = [
    "AsyncEngine",
    "BackendError",
    "Cache",
    "CacheError",
    "CheckpointError",
    "Config",
    "Engine",
    "HookError",
    "Lfm2Config",
    "Lfm2ForCausalLM",
    "Lfm2Model",
    "LogitsError",
    "Request",
    "SamplingParams",
    "from_transformers",
    "generate_batch",
    "load",
    "register",
    "serve",
    "unregister",
]

if TYPE_CHECKING:
    from lfm2_fast.cache.kv_cache import Cache, CacheError
    from lfm2_fast.config import Config
    from lfm2_fast.config_values import CheckpointError
    from lfm2_fast.engine.async_engine import AsyncEngine
    from lfm2_fast.engine.decode import LogitsError
    from lfm2_fast.engine.engine import Engine
    from lfm2_fast.engine.request import Request
    from lfm2_fast.hf.causal_lm import Lfm2ForCausalLM, Lfm2Model
    from lfm2_fast.hf.configuration import Lfm2Config
    from lfm2_fast.hf.generate_batch import generate_batch
    from lfm2_fast.hf.interop import from_transformers, register, unregister
    from lfm2_fast.hf.load import load
    from lfm2_fast.models.hooks import HookError
    from lfm2_fast.ops.sampling import SamplingParams
    from lfm2_fast.ops.select import BackendError
    from lfm2_fast.server.run import serve
else:
    # The names come on first use: `lfm2-fast --help` imports this package, and torch takes seconds.
    def __getattr__(name: str) -> Any:
        homes = {
            "Lfm2Config": "hf.configuration",
            "Lfm2ForCausalLM": "hf.causal_lm",
            "Lfm2Model": "hf.causal_lm",
            "BackendError": "ops.select",
            "Cache": "cache.kv_cache",
            "CacheError": "cache.kv_cache",
            "CheckpointError": "config_values",
            "Config": "config",
            "HookError": "models.hooks",
            "LogitsError": "engine.decode",
            "AsyncEngine": "engine.async_engine",
            "Engine": "engine.engine",
            "Request": "engine.request",
            "SamplingParams": "ops.sampling",
            "from_transformers": "hf.interop",
            "generate_batch": "hf.generate_batch",
            "load": "hf.load",
            "register": "hf.interop",
            "serve": "server.run",
            "unregister": "hf.interop",
        }
        if name not in homes:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{homes[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
