"""Fixtures of the tests of ``lfm2_fast/text``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lfm2_fast.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return load_tokenizer(str(tiny))
