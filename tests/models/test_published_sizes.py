"""The widths of the four published models, with fewer layers and random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lfm2_fast import Config

DATA = Path(__file__).parents[1] / "data"
SIZES = ["LFM2-350M", "LFM2-700M", "LFM2-1.2B", "LFM2-2.6B"]
# The narrowest and the widest feed-forward are in `make test`, those between in `make nightly`.
FP32 = [
    pytest.param(size, marks=pytest.mark.nightly if 0 < i < 3 else ())
    for i, size in enumerate(SIZES)
]
VOCAB = 2048


@pytest.fixture
def folder(request: pytest.FixtureRequest, random_checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint of the published width: conv, attention, conv; a small vocabulary."""
    config = Config.from_file(DATA / f"{request.param}.json")
    return random_checkpoint(
        scale=1.0,
        vocab_size=VOCAB,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        num_hidden_layers=3,
        layer_types=["conv", "full_attention", "conv"],
    )


@pytest.mark.parametrize("folder", FP32, indirect=True)
def test_fp32_equals_hugging_face(folder: Path, pair: Callable[..., Any]) -> None:
    theirs, ours = pair(folder)
    ids = torch.randint(VOCAB, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
    cache = ours(ids[:, :17]).past_key_values
    parts = [ours(ids[:, at : at + 1], past_key_values=cache).logits for at in range(17, 24)]
    for got, want in ((ours(ids).logits, expected), (torch.cat(parts, 1), expected[:, 17:])):
        assert (got - want).abs().max() < 2e-5 * want.abs().max()


# Hugging Face's products of bfloat16 are slow where the processor has none: 2.6B takes minutes.
@pytest.mark.parametrize(
    ("folder", "prompts", "tokens"),
    [
        ("LFM2-350M", 1, 384),
        pytest.param("LFM2-2.6B", 1, 40, marks=pytest.mark.nightly),
        *(pytest.param(size, 4, 384, marks=pytest.mark.nightly) for size in SIZES),
    ],
    indirect=["folder"],
)
def test_bf16_is_no_further_from_fp32_than_hugging_faces(
    folder: Path,
    prompts: int,
    tokens: int,
    pair: Callable[..., Any],
    as_close_to_fp32: Callable[..., None],
) -> None:
    exact, _ = pair(folder)
    seeds = (torch.Generator().manual_seed(seed) for seed in range(2, 7))
    batches = (torch.randint(VOCAB, (prompts, tokens), generator=seed) for seed in seeds)
    as_close_to_fp32(exact, *pair(folder, torch.bfloat16), batches)
