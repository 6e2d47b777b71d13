"""Fixtures of the tests of Hugging Face's API."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast


@pytest.fixture
def registered() -> Iterator[None]:
    """transformers' Auto classes give this package's models until the test ends."""
    lfm2_fast.register()
    yield
    lfm2_fast.unregister()


@pytest.fixture(scope="module")
def models(tiny: Path, pair: Callable[..., Any]) -> tuple[Any, Any]:
    """The small checkpoint in transformers' class and in ours, in float32."""
    return pair(tiny)


@pytest.fixture(scope="module")
def ours(models: tuple[Any, Any]) -> Any:
    """Our model of the two."""
    return models[1]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    """The small checkpoint's tokenizer, which pads on the left."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny, padding_side="left")


@pytest.fixture(scope="module")
def batch(request: pytest.FixtureRequest, tokenizer: Any) -> dict[str, torch.Tensor]:
    """The test module's PROMPTS, of unequal lengths, left-padded."""
    return dict(tokenizer(request.module.PROMPTS, return_tensors="pt", padding=True))


@pytest.fixture(scope="module")
def ends(models: tuple[Any, Any], batch: dict[str, torch.Tensor]) -> list[int]:
    """Two tokens that end some texts of the batch early."""
    made = models[0].generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None)
    new = made[:, batch["input_ids"].shape[1] :]
    return [int(new[0, 3]), int(new[1, 6])]


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Nothing is recorded for a backward pass."""
    with torch.no_grad():
        yield
