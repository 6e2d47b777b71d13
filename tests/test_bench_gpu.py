"""bench/gpu.py runs: on a CPU with a small model, for there is no GPU to time here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_it_measures_and_keeps_what_it_has(tmp_path: Path) -> None:
    config = str(ROOT / "lfm2_fast" / "tiny" / "config.json")
    out = tmp_path / "results" / "gpu.json"
    done = run("--device", "cpu", "--config", config, "--out", str(out), "--seconds", "0")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert all(found["gate"]["tokens_are_the_references"].values())
    decoded = found["decode"]["config"]["context 128"]
    assert decoded["us"]["p10"] > 0 and decoded["share_of_copy"] > 0
    late = {*found["batch"]["config"].values(), *found["first token"]["config"].values()}
    assert late == {"not measured: the time was up"}


def test_without_a_gpu_it_says_so() -> None:
    if not torch.cuda.is_available():
        done = run()
        assert done.returncode == 1 and "no GPU" in done.stderr
