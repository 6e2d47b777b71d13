"""Published shapes with random weights: configs, checkpoints, and a step's bytes.

A checkpoint here is a folder as Hugging Face writes it, made once and kept under ``build/bench``.
So every engine runs the same numbers, and each measures its own loading.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

import lfm2_fast
from lfm2_fast.weights import fusion

ROOT = Path(__file__).resolve().parent.parent
MADE = Path(os.environ.get("LFM2_FAST_BENCH_DIR", ROOT / "build" / "bench"))
TINY = ROOT / "lfm2_fast" / "tiny"
SIZES = ("350M", "700M", "1.2B", "2.6B")


def config_of(size: str) -> lfm2_fast.Config:
    """Published config of "350M", "700M", "1.2B" or "2.6B"."""
    return lfm2_fast.Config.from_file(ROOT / "tests" / "data" / f"LFM2-{size}.json")


def random_weights(
    config: lfm2_fast.Config, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Return weights of a fresh model by our names, the same ones every time."""
    generator = torch.Generator(device).manual_seed(0)
    return fusion.random_weights(config, dtype, device, generator)


def checkpoint(size: str) -> Path:
    """Return the folder of a bfloat16 checkpoint of that size, and write it if it is missing.

    "tiny" is the small trained one that the package carries.
    """
    if size == "tiny":
        return TINY
    folder = MADE / f"LFM2-{size}"
    if not (folder / "model.safetensors").is_file():
        config = config_of(size)
        weights = random_weights(config, torch.bfloat16)
        lfm2_fast.Lfm2ForCausalLM(config, weights, backend="eager").save_pretrained(folder)
    return folder
