"""lfm2_fast: Liquid AI's LFM2 language models on one GPU or one CPU."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A wheel carries the Triton kernels as lfm2_fast/kernels; in a checkout they lie beside it.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "Cache",
    "CacheError",
    "CheckpointError",
    "Config",
    "Lfm2ForCausalLM",
    "load",
]

if TYPE_CHECKING:
    from lfm2_fast.cache import Cache, CacheError
    from lfm2_fast.config import CheckpointError, Config
    from lfm2_fast.loading import load
    from lfm2_fast.model import Lfm2ForCausalLM
    from lfm2_fast.ops import BackendError
else:
    # The names come on first use: `lfm2-fast --help` imports this package, and torch takes seconds.
    def __getattr__(name: str) -> Any:
        homes = {
            "Lfm2ForCausalLM": "model",
            "BackendError": "ops",
            "Cache": "cache",
            "CacheError": "cache",
            "CheckpointError": "config",
            "Config": "config",
            "load": "loading",
        }
        if name not in homes:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{homes[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
