"""Decoding alone and in batches, after short and long contexts; prompts; the first token."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cpu.engines import prompt
from lfm2_fast.cli.benchmark import Sequences, bytes_read_per_step

STEPS = 8


def note(benchmark: Any, tokens: int, least: int, bandwidth: float) -> None:
    """Store tokens a second, and the share of the memory's speed, beside the seconds."""
    seconds = benchmark.stats["median"]
    benchmark.extra_info |= {
        "tokens_per_second": tokens / seconds,
        "floor_seconds": least / bandwidth,
        "share_of_memory_speed": least / bandwidth / seconds,
    }


@pytest.mark.parametrize("context", [64, 1024])
@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16])
def bench_decode(
    benchmark: Any,
    model_of: Any,
    bandwidth: float,
    size: str,
    backend: str,
    batch: int,
    context: int,
) -> None:
    model = model_of(size, backend)
    if context + 256 > model.max_length:
        pytest.skip(f"the model's context is {model.max_length}")
    sequences = Sequences(model)
    rounds, warm = 8, 1
    sequences.start(prompts(batch, context, model), (rounds + warm) * (STEPS + 2))
    benchmark.group = f"{size} decode, batch {batch}, context {context}"
    benchmark.pedantic(sequences.decode, (STEPS,), rounds=rounds, warmup_rounds=warm)
    cached = model.network.config.cache_bytes(model.dtype.itemsize, batch * context)
    # A round begins with the last token of the round before, which is one more step.
    steps = STEPS + 1
    note(benchmark, steps * batch, steps * (bytes_read_per_step(model) + cached), bandwidth)


@pytest.mark.parametrize("length", [32, 128, 512, 2048])
def bench_first_token(
    benchmark: Any, model_of: Any, bandwidth: float, size: str, backend: str, length: int
) -> None:
    """Time of a whole prompt and the choice of the token after it."""
    model = model_of(size, backend)
    if length + 2 > model.max_length:
        pytest.skip(f"the model's context is {model.max_length}")
    text = prompts(1, length, model)
    benchmark.group = f"{size} first token after {length}"
    benchmark.pedantic(lambda: Sequences(model).start(text, 1), rounds=5, warmup_rounds=1)
    note(benchmark, length, bytes_read_per_step(model), bandwidth)


def prompts(batch: int, length: int, model: Any) -> list[list[int]]:
    size = model.config.vocab_size
    return [[token % size for token in prompt(row, length)] for row in range(batch)]
