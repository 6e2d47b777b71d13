"""The kernels compile for GPUs that are not here, and do not spill."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
        aot.launch_few(aot.SIZES[0], torch.bfloat16, tokens=sequences)
        print(len(launches), len({kernel.hash for _, kernel, _ in launches}))
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    launched, compiled = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    assert len(set(launched)) == 4 and len(set(compiled)) == 1, done.stdout


def test_weights_are_under_way_before_the_wait() -> None:
    """As the assembler has left it: 16 bytes a thread, the whole first tile above the wait.

    The following tiles are as many loads again in the loop, and what the previous kernel wrote is
    not read above the wait.
    """
    code = """
import json, re, shutil, sys
sys.path.insert(0, "bench")
import aot, torch, triton
tools = triton.knobs.nvidia
if not all(shutil.which(tool.path) for tool in (tools.cuobjdump, tools.nvdisasm)):
    sys.exit("no disassembler")
found = []
for size, int8 in ((aot.SIZES[0], False), (aot.SIZES[2], False), (aot.SIZES[2], True)):
    with aot.compiling(90) as launches:
        aot.launch_few(size, torch.bfloat16, int8=int8, pdl=True)
    for name, kernel, _ in launches:
        constants = {k[0]: v for k, v in kernel.src.constants.items()}
        named = {kernel.src.fn.arg_names[k]: v for k, v in constants.items()}
        lines = kernel.asm["sass"].splitlines()
        marks = [re.search(r"LDG[.\\w]*|STG|ACQBULK|PREEXIT", line) for line in lines]
        found.append((name, size.name, int8, named, [mark[0] for mark in marks if mark]))
print(json.dumps(found))
"""
    done = run("-c", code)
    if done.returncode and "no disassembler" in done.stderr:
        pytest.skip("the disassembler that triton brings is not there")
    assert done.returncode == 0, done.stderr
    together = {"norm_linear": 1, "linear_add": 1, "norm_swiglu": 2, "norm_conv": 3}
    together["head_argmax"] = 1
    judged = set()
    for name, size, int8, named, marks in json.loads(done.stdout):
        assert marks.count("ACQBULK") == marks.count("PREEXIT") == 1, (name, size)
        wait = marks.index("ACQBULK")
        above, below = marks[:wait], marks[wait:]
        assert "STG" not in above and any(mark.startswith("LDG") for mark in below)
        if name == "last_argmax":
            assert above == ["PREEXIT"]
            continue
        tile = together[name] * named["BLOCK_N"] * named["BLOCK_K"] * (1 if int8 else 2)
        wanted = [tile // (16 * 128)] * 2
        streamed = "LDG.E.EF.128"
        assert [above.count(streamed), below.count(streamed)] == wanted, (name, size, above)
        # The rest is the norm's weight and, three to a channel and odd of address, the taps.
        rest = [mark for mark in above if mark not in (streamed, "PREEXIT")]
        taps = [mark for mark in rest if ".U16" in mark]
        assert len(taps) <= named["BLOCK_N"] * (name == "norm_conv") * 4
        assert all(mark == "LDG.E.128" for mark in rest if mark not in taps), (name, size, rest)
        judged.add((name, size, int8))
    assert len(judged) == len(together) * 3
