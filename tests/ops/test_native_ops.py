"""Whole models on the extension's bodies: what eager ones give, in threads too, and what runs."""

from __future__ import annotations

import platform
import sys
import threading
from typing import Any

import pytest
import torch

import lfm2_fast
from lfm2_fast.ops import native_library, native_ops, reference
from lfm2_fast.ops.select import BackendError, choose
from lfm2_fast.weights.formats import DENSE, INT4, INT8, Format
from tests.batches import logits_of

CPU = torch.device("cpu")
NAN = float("nan")

_lacking = native_library.why_not(CPU)
pytestmark = [
    pytest.mark.skipif(_lacking is not None, reason=str(_lacking)),
    pytest.mark.usefixtures("threads"),
]


CHANGED = {
    "plain": {},
    "odd": {"conv_L_cache": 5, "conv_bias": True, "head_dim": 24, "num_key_value_heads": 3},
    "wide": {"conv_L_cache": 11, "num_attention_heads": 4, "num_key_value_heads": 4},
    "attention_first": {
        "conv_L_cache": 2,
        "tie_word_embeddings": False,
        "layer_types": ["full_attention", "conv", "full_attention", "full_attention", "conv"],
    },
}
LONG = {"short_factor": [1.5] * 8, "long_factor": [2.0 + i for i in range(8)], "factor": 8.0}
CHANGED["long_rope"] = {
    "max_position_embeddings": 16,
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONG},
}
# Tokens by slot: prompts; then a second turn, a chunk, a step and a new prompt in one batch; then
# a step of all.
STEPS = [{2: 35, 0: 1, 3: 5}, {3: 4, 2: 1, 1: 9, 0: 1}, {1: 1, 0: 1, 3: 1, 2: 1}]


@pytest.fixture
def poisoned(monkeypatch) -> None:
    """New tensors begin as NaN, so that what no body wrote shows."""
    new_empty = torch.Tensor.new_empty

    def poison(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = new_empty(*args, **kwargs)
        return made.fill_(NAN if made.is_floating_point() else -(2**40))

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)


@pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED.keys())
def test_models_equal_eager(random_checkpoint, poisoned, dtype, within_budget, changed) -> None:
    def load(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        model = lfm2_fast.load(
            random_checkpoint(**changed), device="cpu", dtype=dtype, backend=backend
        )
        assert model.ops.name == backend
        return logits_of(model, STEPS)

    exact, plain = load("eager", torch.float64), load("eager", dtype)
    for ours, a, b in zip(load("native", dtype), exact, plain, strict=True):
        within_budget(ours, a, b)


def test_the_native_bodies_run(random_checkpoint, monkeypatch) -> None:
    """Only projections of many tokens run in the reference."""
    model = lfm2_fast.load(random_checkpoint(), device="cpu")
    assert model.ops.name == "native"
    expected = logits_of(model, STEPS)

    def refuse(*args: object) -> None:
        raise AssertionError("the reference ran")

    for name in dir(reference):
        if name.endswith("_ref") and name != "linear_ref":
            monkeypatch.setattr(reference, name, refuse)
    for ours, same in zip(logits_of(model, STEPS), expected, strict=True):
        assert torch.equal(ours, same)
    one = {slot: 1 for slot in range(4)}
    monkeypatch.setattr(reference, "linear_ref", refuse)
    logits_of(model, [one, one])


@pytest.mark.parametrize(
    ("capability", "right", "most"),
    [("AVX512", True, 16), ("AVX2", False, sys.maxsize), ("DEFAULT", False, 16)],
)
def test_each_format_has_its_own_limit_of_few_tokens(monkeypatch, capability, right, most) -> None:
    """Many tokens go to PyTorch's product where it is right and fast, or where AVX2 lacks too."""
    monkeypatch.setattr(native_ops, "multiplies_int8", lambda: right)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    few_tokens = native_ops.few_tokens.__wrapped__
    assert few_tokens(INT8, torch.bfloat16) == most
    assert few_tokens(INT4, torch.bfloat16) == (16 if capability == "DEFAULT" else sys.maxsize)
    assert few_tokens(DENSE, torch.float32) == 32
    assert few_tokens(DENSE, torch.bfloat16) == 64
    assert few_tokens(Format(), torch.bfloat16) == 0


@pytest.mark.skipif(platform.machine() != "x86_64", reason="VNNI is of x86-64")
def test_int8_without_vnni_is_the_extensions(monkeypatch) -> None:
    """PyTorch's exact product takes ten times as long as float32's there."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: a.int() @ b.int())
    assert not native_ops.multiplies_int8.__wrapped__()


def test_threads_do_not_meet(random_checkpoint) -> None:
    """One model, two Python threads with a cache each: what each alone gives."""
    model = lfm2_fast.load(random_checkpoint(), device="cpu")
    steps = [{0: 30, 1: 3}] + [{0: 1, 1: 1, 2: 1}] * 12
    expected = logits_of(model, steps)
    found: list[Any] = [None, None]

    def work(i: int) -> None:
        found[i] = [logits_of(model, steps) for _ in range(3)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for run in found[0] + found[1]:
        assert all(torch.equal(a, b) for a, b in zip(run, expected, strict=True))


def test_unsupported_dtypes_and_devices_are_refused() -> None:
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        assert choose("auto", CPU, kind).name == choose("native", CPU, kind).name == "native"
    assert choose("auto", CPU, torch.float64).name == "eager"
    with pytest.raises(BackendError, match="float64"):
        choose("native", CPU, torch.float64)
    with pytest.raises(BackendError, match="mps"):
        choose("native", torch.device("mps"), torch.float32)
