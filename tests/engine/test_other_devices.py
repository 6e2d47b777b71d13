"""The model on accelerators that are not CUDA, which stand in: no CUDA, no float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast
from lfm2_fast.engine.memory import free_memory
from tests.engine.stand_in_device import Refused, StandInDevice

PROMPTS = [[1, 40, 41], [1, 50, 60, 70, 80]]
DRAWN = {
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
}


def texts(model: Any, **arguments: Any) -> list[list[int]]:
    torch.manual_seed(3)
    padded = torch.tensor([[0, 0, *PROMPTS[0]], PROMPTS[1]])
    mask = (padded != 0).long()
    found = model.generate(
        padded, attention_mask=mask, max_new_tokens=8, eos_token_id=[], **arguments
    )
    return found.tolist()


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_the_eager_bodies_run_without_cuda(
    kind: str, random_checkpoint: Callable[..., Path]
) -> None:
    folder = random_checkpoint()
    options = {"dtype": "float32", "backend": "eager"}
    plain = lfm2_fast.load(folder, device="cpu", **options)
    expected = [texts(plain), texts(plain, **DRAWN)]
    logits = plain(torch.tensor([PROMPTS[1]])).logits
    with StandInDevice(kind) as device:
        model = lfm2_fast.load(folder, device=kind, dtype="float32")
        assert model.device.type == kind and model.ops.name == "eager"
        assert [texts(model), texts(model, **DRAWN)] == expected
        found = model(torch.tensor([PROMPTS[1]]).to(model.device)).logits
        assert found.device == device.place
        torch.testing.assert_close(found.cpu(), logits)


def test_an_engine_schedules_by_the_clock(random_checkpoint: Callable[..., Path]) -> None:
    folder = random_checkpoint()
    with StandInDevice("mps"):
        model = lfm2_fast.load(folder, device="mps", dtype="float32")
        engine = lfm2_fast.Engine(model, max_rows=2)
        for prompt in PROMPTS:
            engine.add(lfm2_fast.Request(prompt, max_tokens=4))
        written = 0
        while engine.busy:
            written += sum(event.token is not None for event in engine.step())
        assert written == 8
        assert free_memory(model.device) > 2**20


def test_the_stand_in_refuses() -> None:
    with StandInDevice("mps"):
        here = torch.ones(2, device="mps")
        with pytest.raises(Refused, match="no float64"):
            here.double()
        with pytest.raises(Refused, match="both devices"):
            here + torch.ones(2)
        with pytest.raises(Refused, match="no CUDA"):
            torch.cuda.Event()


def test_an_npu_without_its_torch_is_explained(tiny: Path) -> None:
    with pytest.raises(ValueError, match="'npu' is not .*torch_npu.*lfm2-fast export openvino"):
        lfm2_fast.load(tiny, device="npu")
