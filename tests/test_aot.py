"""The kernels compile for GPUs that are not here, and do not spill."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def aot(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "bench" / "aot.py", "--arch", "90", "--dtype", "bfloat16"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run([*command, *args], capture_output=True, text=True, env=environment)


def test_every_kernel_compiles_for_hopper_without_a_spill() -> None:
    done = aot()
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    for file in (ROOT / "kernels").glob("*.py"):
        for name in re.findall(r"^def _(\w+)_kernel\(", file.read_text(encoding="utf-8"), re.M):
            assert name in compiled, f"bench/aot.py does not compile {name}"


def test_a_spill_is_seen() -> None:
    done = aot("--only", "gated_conv", "--maxnreg", "24")
    assert done.returncode == 1 and "spill registers" in done.stderr
