"""A copy of a checkpoint, in a folder that benchmarks may write to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path, tiny: Path) -> Path:
    """A copy of the small checkpoint's config and weights."""
    made = tmp_path / "checkpoint"
    made.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny / name, made / name)
    return made
