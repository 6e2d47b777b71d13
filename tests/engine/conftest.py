"""A model that the engine's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

import lfm2_fast
from lfm2_fast.models.lfm2 import Lfm2


@pytest.fixture(scope="module")
def native(tiny: Path) -> Lfm2:
    """The network of the small checkpoint, in float32 on the bodies that run here."""
    return lfm2_fast.load(tiny, device="cpu", dtype="float32").network
