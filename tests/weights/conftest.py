"""The small checkpoint as GGUF files, each type written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lfm2_fast.weights.gguf_export import export_gguf


@pytest.fixture(scope="session")
def gguf_of(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the path of the small checkpoint's file of a type."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("gguf")

    def make(type: str) -> Path:
        path = folder / f"tiny-{type.upper()}.gguf"
        if not path.is_file():
            export_gguf(tiny, path, type)
        return path

    return make


@pytest.fixture(scope="session")
def q4_0(gguf_of: Callable[[str], Path]) -> Path:
    return gguf_of("q4_0")
