"""Failures on a GPU affect only their own case. Processes end here as with a faulty kernel."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from typing import Any

import pytest
import torch

import lfm2_fast
from bench.gpu import isolated
from bench.gpu.isolated import LATE, Case
from bench.shapes import ROOT, TINY

CONFIG = lfm2_fast.Config.from_file(TINY / "config.json")
CPU = torch.device("cpu")
HANGS = """
import time, torch
from bench.gpu import isolated

def measure(*given):
    time.sleep(60)
    yield

isolated.PATIENCE, isolated.measure = 0.5, measure
isolated.send(None, None, torch.device("cuda"), [], 0)
"""


def well(model: Any) -> dict[str, Any]:
    assert isinstance(model, lfm2_fast.Lfm2ForCausalLM)
    return {"process": os.getpid()}


def fails(model: Any) -> dict[str, Any]:
    raise RuntimeError("an illegal memory access\nwas encountered")


def dies(model: Any) -> dict[str, Any]:
    os._exit(3)


def cases(*calls: Any) -> list[Case]:
    return [((call.__name__, str(i)), partial(call)) for i, call in enumerate(calls)]


def test_a_fault_costs_its_case_alone() -> None:
    given = cases(well, well, fails, well, dies, well)
    found = list(isolated.isolated(CONFIG, CPU, given, time.monotonic() + 600))
    assert [name for name, _ in found] == [name for name, _ in given]
    (first, again, failed, after_failed, died, after_died) = (value for _, value in found)
    assert failed == "not measured: RuntimeError: an illegal memory access"
    assert died == "not measured: its process ended with code 3"
    processes = [row["process"] for row in (first, again, after_failed, after_died)]
    assert processes[0] == processes[1] and len(set(processes)) == 3
    assert os.getpid() not in processes


def test_a_model_that_cannot_be_made_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> Any:
        raise MemoryError("full")

    monkeypatch.setattr(isolated, "random_weights", full)
    found = list(isolated.measure(CONFIG, CPU, cases(well, well), time.monotonic() + 600))
    assert [value for _, value in found] == ["not measured: MemoryError: full"] * 2


def test_nothing_is_begun_when_the_time_is_up() -> None:
    given = cases(fails, well)
    found = [value for _, value in isolated.isolated(CONFIG, CPU, given, time.monotonic())]
    assert found == ["not measured: RuntimeError: an illegal memory access", LATE]
    found = [value for _, value in isolated.measure(CONFIG, CPU, cases(well, well), 0)]
    assert "process" in found[0] and found[1] == LATE


def test_a_case_that_hangs_on_a_gpu_is_ended_and_its_place_shown() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HANGS]
    done = subprocess.run(command, env=env, cwd=ROOT, text=True, stderr=subprocess.PIPE, timeout=50)
    assert done.returncode == 1 and "in measure" in done.stderr
