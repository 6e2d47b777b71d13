"""Time before the first token: the command line's start, imports, loading, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from bench.report.results import ROOT
from bench.shapes import checkpoint

COMMANDS = {
    "--version": ["-m", "lfm2_fast", "--version"],
    "--help": ["-m", "lfm2_fast", "--help"],
    "info": ["-m", "lfm2_fast", "info"],
    "import torch": ["-c", "import torch"],
    "import torch, lfm2_fast": ["-c", "import torch; from lfm2_fast import *"],
}
LOAD = """
import json, sys, time
import lfm2_fast
from lfm2_fast.cli.machine_load import memory
lfm2_fast.load
before, begin = memory(), time.perf_counter()
model = lfm2_fast.load(sys.argv[1], device="cpu", dtype=sys.argv[2])
seconds = time.perf_counter() - begin
after = memory()
print(json.dumps([seconds, after["resident"] - before["resident"], after["peak"]]))
"""


def python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def bench_start(benchmark: Any, command: str) -> None:
    benchmark.group = "start of a process"
    benchmark.pedantic(python, COMMANDS[command], rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def bench_load(benchmark: Any, size: str, dtype: str) -> None:
    """Time of loading in a new process, with the import, and beside it without the import."""
    folder = str(checkpoint(size))
    found: list[list[float]] = []
    benchmark.group = f"{size} load"
    benchmark.pedantic(
        lambda: found.append(json.loads(python("-c", LOAD, folder, dtype))),
        rounds=3,
        warmup_rounds=1,
    )
    seconds, resident, peak = (
        sorted(column)[len(column) // 2] for column in zip(*found, strict=True)
    )
    benchmark.extra_info |= {
        "load_seconds": seconds,
        "memory_after_load_bytes": resident,
        "peak_memory_bytes": peak,
    }
