"""Reports of wrong tokens by ``bench.gpu.decode``, and the order in which it times and counts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast
from bench.gpu import decode, steps
from bench.shapes import SIZES, config_of
from lfm2_fast.ops.base import Ops


def test_a_red_gate_tells_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        """Model with a GPU's possible faults: its replays differ, and it cannot draw."""

        def __init__(self, backend: str) -> None:
            self.runs, self.ops, self.sound = 0, Ops(), backend == "eager"

        def generate(self, prompts: Any, **arguments: Any) -> torch.Tensor:
            self.runs += 1
            if "seed" in arguments and not self.sound:
                raise RuntimeError("it burned")
            found = torch.arange(12).reshape(2, 6)
            if self.runs == 3 and not self.sound:
                found[1, 4] = 99
            return found

    monkeypatch.setattr(lfm2_fast, "load", lambda *a, backend="auto", **k: Model(backend))
    out = tmp_path / "gpu.json"
    with pytest.raises(SystemExit, match="tokens are wrong"):
        decode.main(["--device", "cpu", "--out", str(out)])
    found = json.loads(out.read_text(encoding="utf-8"))
    right = found["gate"]["tokens_are_the_references"]
    burned = {"sampled", "sampled, two rows at a time"}
    assert {name for name, is_it in right.items() if not is_it} == {"greedy", *burned}
    assert len(right) == 7
    differs = {"run": "replayed", "row": 1, "column": 4, "token": 99, "expected": 10}
    errors = dict.fromkeys(burned, "RuntimeError: it burned")
    assert found["gate"]["first_differences"] == {"greedy": differs, **errors}
    assert found["commit"] and "copy_gb_s" not in found


def test_a_text_that_ends_early_differs_where_it_ends() -> None:
    one, longer = torch.tensor([[1, 2]]), torch.tensor([[1, 2, 3]])
    assert decode.first_difference(one, one.clone()) is None
    told = ("row", "column", "token", "expected")
    for found, expected, place in (
        (one, longer, (0, 2, None, 3)),
        (longer, longer.expand(2, -1), (1, 0, None, 1)),
    ):
        assert decode.first_difference(found, expected) == dict(zip(told, place, strict=True))


def test_kernels_are_counted_when_all_else_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "has_dependent_launch", lambda device: True)
    configs = {size: config_of(size) for size in SIZES}
    limits = {"copy_gb_s": 1.0, "matmul_tflops": 1.0}
    planned = list(decode.plan(configs, torch.device("cuda"), limits))
    assert [size for size, _ in planned] == 2 * list(SIZES)
    for size, cases in planned:
        names = [name for name, _ in cases]
        timed = [name for name in names if name[0] != "kernels"]
        timed_steps = [name[1:] for name in timed if name[0] in ("decode", "batch")]
        assert names == timed + [("kernels", *name) for name in timed_steps]
        assert all(name[1] == size for name in names) and timed_steps


def test_the_first_token_is_timed_when_it_was_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        runs = 0

        def generate(self, text: torch.Tensor, **arguments: Any) -> None:
            self.runs += 1
            time.sleep(0.05 if self.runs <= 2 else 0)

    monkeypatch.setattr(steps, "bytes_read_per_step", lambda model: 1)
    assert steps.first_token(Model(), 8, 1.0)["us"]["p90"] < 25e3  # type: ignore[arg-type]
