"""Fixtures of the tests of Hugging Face's API."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import lfm2_fast


@pytest.fixture
def registered() -> Iterator[None]:
    """transformers' Auto classes give this package's models until the test ends."""
    lfm2_fast.register()
    yield
    lfm2_fast.unregister()
