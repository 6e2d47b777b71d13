"""The kernels compile for GPUs that are not here, and do not spill."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Python in another process, where Triton does not interpret."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment
    )


def aot(*args: str) -> subprocess.CompletedProcess[str]:
    return run("bench/aot.py", "--arch", "90", "--dtype", "bfloat16", *args)


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


def test_no_length_compiles_anew() -> None:
    """A user waits for the compiler once, not again at every new number of tokens or pages."""
    code = """
import sys
sys.path.insert(0, "bench")
import aot, torch
with aot.compiling(90) as launches:
    for sequences, tokens, page_size in ((2, 6, 64), (1, 1, 16), (16, 16, 128), (3, 48, 80)):
        aot.launch_all(aot.SIZES[0], torch.bfloat16, sequences=sequences, tokens=tokens,
                       page_size=page_size)
        print(len(launches), len({kernel.hash for _, kernel, _ in launches}))
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    launched, compiled = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    assert len(set(launched)) == 4 and len(set(compiled)) == 1, done.stdout
