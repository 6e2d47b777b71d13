"""Sizes by marker, the gate before every figure, and the facts beside the figures.

``pytest bench --benchmark-only`` runs 350M's shape and the small real checkpoint; ``-m size_1_2B``
another size, ``-m "size_350M or size_1_2B"`` several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

import lfm2_fast
from bench.gate import logits, rounding, wrong_logits
from bench.report.results import commit
from bench.shapes import SIZES, checkpoint
from lfm2_fast.cli.environment import hardware, versions
from lfm2_fast.cli.machine_load import memory_speed
from lfm2_fast.ops.select import why_not

DEFAULT = ("size_350M", "size_tiny")


def mark(size: str) -> str:
    return f"size_{size.replace('.', '_')}"


def pytest_configure(config: pytest.Config) -> None:
    for size in (*SIZES, "tiny"):
        config.addinivalue_line("markers", f"{mark(size)}: runs at {size}'s shape")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "size" in metafunc.fixturenames:
        sizes = SIZES if "setup_of" in metafunc.fixturenames else (*SIZES, "tiny")
        marked = [pytest.param(size, marks=getattr(pytest.mark, mark(size))) for size in sizes]
        metafunc.parametrize("size", marked, scope="module")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("-m"):
        return
    others = {mark(size) for size in (*SIZES, "tiny")} - set(DEFAULT)
    left = [item for item in items if not others & {m.name for m in item.iter_markers()}]
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = left


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    machine_info["device"] = hardware(torch.device("cpu"))
    machine_info["packages"] = versions()
    machine_info.update(commit())


@pytest.fixture(scope="session")
def bandwidth() -> float:
    """Measure the bytes a second that the memory moves."""
    return max(memory_speed(torch.device("cpu")).values())


@pytest.fixture(params=["eager", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    """Implementations that can run here."""
    if lacking := why_not(request.param, torch.device("cpu"), torch.bfloat16):
        pytest.skip(f"{request.param}: {lacking}")
    return request.param


@pytest.fixture
def model_of() -> Callable[[str, str], Any]:
    """Load a model of a size, and check it with the gate."""
    return checked_model


@lru_cache(maxsize=2)  # both implementations take turns
def checked_model(size: str, backend: str) -> Any:
    model = lfm2_fast.load(checkpoint(size), device="cpu", dtype="bfloat16", backend=backend)
    if wrong := wrong_logits(logits(model), *judges(size)):
        pytest.fail(f"not timed: {wrong}")
    return model


@lru_cache(maxsize=4)
def judges(size: str) -> tuple[np.ndarray, float]:
    """Compute logits in float32, and the allowed error of those in bfloat16."""
    exact, plain = (
        logits(lfm2_fast.load(checkpoint(size), device="cpu", dtype=dtype, backend="eager"))
        for dtype in ("float32", "bfloat16")
    )
    return exact, rounding(exact, plain)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
