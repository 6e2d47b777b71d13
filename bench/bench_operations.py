"""Time of each implementation of each operation, beside the others and the memory's speed."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from bench.gate import wrong_operation
from bench.operations import OPERATIONS, Setup, least_bytes

# Tokens of a step: one after 1,024, one of each of eight sequences, a prompt.
STEPS = {
    "1 token": {"tokens": 1, "context": 1024},
    "8 sequences": {"tokens": 1, "sequences": 8, "context": 128},
    "512 tokens": {"tokens": 512},
}
# Enough for one layer of each kind at every published size.
FEW = 3


@lru_cache(maxsize=2)  # both implementations take turns
def whole(size: str, step: str, backend: str) -> Setup:
    return Setup(size, backend=backend, **STEPS[step])


@lru_cache(maxsize=2)
def few(size: str, step: str, dtype: torch.dtype) -> Setup:
    return Setup(size, dtype=dtype, layers=FEW, **STEPS[step])


@pytest.fixture
def setup_of() -> Any:
    return whole


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", OPERATIONS)
def bench_operation(
    benchmark: Any,
    setup_of: Any,
    bandwidth: float,
    size: str,
    step: str,
    backend: str,
    name: str,
) -> None:
    call = OPERATIONS[name]
    exact = call(few(size, step, torch.float64))
    plain = call(few(size, step, torch.bfloat16))
    setup = setup_of(size, step, backend)
    for mine, oracle, other in zip(call(setup), exact, plain, strict=False):
        if wrong := wrong_operation(mine, oracle, other):
            pytest.fail(f"not timed: {wrong}")
    benchmark.group = f"{size} {step} {name}"
    benchmark.pedantic(call, (setup,), rounds=15, warmup_rounds=2)
    least = least_bytes(name, setup)
    benchmark.extra_info |= {
        "bytes": least,
        "floor_seconds": least / bandwidth,
        "share_of_memory_speed": least / bandwidth / benchmark.stats["median"],
    }
