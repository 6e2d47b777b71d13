"""Fixtures shared by the tests: checkpoints on disk, and models in Hugging Face's and our classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast

ROOT = Path(__file__).resolve().parent.parent

# Odd on purpose: no size is a power of two but the head's, and no two are equal.
SMALL = {
    "vocab_size": 307,
    "hidden_size": 96,
    "intermediate_size": 150,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"],
    "block_auto_adjust_ff_dim": False,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 7,
}

Pair = tuple[Any, lfm2_fast.LFM2]


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The small real checkpoint's folder."""
    return ROOT / "lfm2_fast" / "tiny"


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes, with Hugging Face's class, a random checkpoint of SMALL with some values changed.

    Matrices are scaled up: at the usual initial size a model with a tied head repeats its input.
    """
    made: dict[str, Path] = {}

    def make(*, seed: int = 0, scale: float = 4.0, **changed: Any) -> Path:
        from transformers import Lfm2Config, Lfm2ForCausalLM

        key = repr((seed, scale, sorted(changed.items())))
        if key not in made:
            torch.manual_seed(seed)
            model = Lfm2ForCausalLM(Lfm2Config(**{**SMALL, **changed}))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "norm" in name:
                        parameter.uniform_(0.5, 1.5)
                    elif "bias" in name:
                        parameter.normal_(std=0.5)
                    elif "conv.conv" in name:
                        parameter.normal_(std=0.7)
                    else:
                        parameter.mul_(scale)
            folder = tmp_path_factory.mktemp("random")
            model.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def pair() -> Callable[..., Pair]:
    """Loads a folder in both classes, in float32 on the CPU unless told otherwise."""

    def load(folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Pair:
        from transformers import Lfm2ForCausalLM

        theirs = Lfm2ForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        return theirs, lfm2_fast.load(folder, device="cpu", dtype=dtype, **kwargs)

    return load
