"""Masses of the scores that top-p cuts, and what its search costs in machine code for sm_90."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.sample_cut import mass_of
from lfm2_fast.ops.sampling import SamplingParams, SamplingState, warp
from tests.kernels.test_aot import Loop

ROOT = Path(__file__).resolve().parents[2]
VOCAB, TILE, PASS, P = 65536, 2048, 2048, 0.9
# Short functions of the file, whose lines are in all of its loops.
HELPERS = ("place_of", "score_at", "mass_of", "is_defined", "best_key")
CODE = """
import json, subprocess, sys, tempfile
sys.path.insert(0, "bench/gpu")
import aot, torch, triton
from lfm2_fast.kernels.sample import Scratch, sample_triton

logits, whole = torch.zeros(1, int(sys.argv[1])), torch.zeros(1, dtype=torch.int64)
wide, flag = whole.double(), whole.bool()
found = []
for cuts in (False, True):
    with aot.compiling(90, recompile=False) as launches:
        scratch = Scratch.empty(logits, draws=True, cuts=cuts)
        given = (wide, flag, wide, whole, wide, wide, whole, whole, whole, whole, scratch)
        sample_triton(logits.bfloat16(), None, *given, draws=True, cuts=cuts, pdl=True)
    kernels = {}
    for name, kernel, _ in launches:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.nvdisasm.path, "-g", "-c", file.name]
            shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        kernels[name] = kernel.metadata.num_warps, shown
    found.append(kernels)
print(json.dumps(found))
"""


def listing(shown: str) -> tuple[list[tuple[str, int]], list[Loop]]:
    """Instructions, each with its function of sample_cut.py if it has one, and the loops."""
    source = ROOT / "kernels" / "sample_cut.py"
    parts = ast.parse(source.read_text(encoding="utf-8")).body
    owners = {
        line: part.name
        for part in parts
        if isinstance(part, ast.FunctionDef)
        for line in range(part.lineno, (part.end_lineno or 0) + 1)
    }
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    owner = ""
    for line in shown.splitlines():
        if place := re.search(r'## File ".*/(\w+)\.py", line (\d+)', line):
            owner = owners.get(int(place[2]), "") if place[1] == source.stem else ""
        elif label := re.match(r"(\.L_\w+):", line.strip()):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append((instruction[1], owner))
    loops = []
    for at, (instruction, _) in enumerate(code):
        target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction)
        if target and labels[target[1]] < at - 1:
            loops.append(Loop(labels[target[1]], at))
    return code, loops


def search(scores: torch.Tensor) -> Counter[str]:
    """Turns of each loop of the search for ``P``, as the kernel's text has them."""
    ordered = scores.double().sort().values
    masses = (ordered - ordered[-1]).exp()
    below = torch.cat([masses.new_zeros(1), masses.cumsum(0)])
    bits = ordered.float().view(torch.int32)
    places = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    worth = ordered[-1] + torch.tensor((1 - P) / VOCAB).log() - 1
    low, high = int(places[ordered >= worth][0]), int(places[-1])
    few = int((places >= low).sum())
    assert 9000 < few < 11000
    turns = Counter({"collect": VOCAB // PASS, "share": -(-few // PASS)})
    first = True
    while low < high:
        turns["halve"] += 1
        if few > PASS and not first:
            turns["narrow"] += -(-few // PASS)
            few = int(((places >= low) & (places <= high)).sum())
        first = False
        turns["under"] += -(-few // PASS)
        middle = low + (high - low + 1) // 2
        goes = below[int((places < middle).sum())] / below[-1] <= 1 - P
        low, high = (middle, high) if goes else (low, middle - 1)
    kept = int((places >= low).sum())
    params = [SamplingParams(do_sample=True, top_p=P)]
    assert kept == int(warp(scores[None].float(), SamplingState(params)).isfinite().sum())
    # What follows runs over the rest once; equal scores need no more.
    turns["rest"] = -(-few // PASS)
    return turns


def issued(kernels: dict[str, Any], turns: Counter[str]) -> float:
    """Instructions of all warps. Kernels but the cut have tiles, and no loops that count."""
    total = 0.0
    for name, (warps, shown) in kernels.items():
        code, loops = listing(shown)
        if name != "sample_cut":
            total += len(code) * warps * (1 if name == "sample_last" else VOCAB // TILE)
            continue
        named = {loop: turns[turn] for loop, turn in names(code, loops).items()}
        for at in range(len(code)):
            around = [loop for loop in loops if loop.first <= at <= loop.last]
            inner = min(around, key=lambda each: each.last - each.first, default=None)
            total += warps * (1 if inner is None else named[inner])
    return total


def names(code: list[tuple[str, str]], loops: list[Loop]) -> dict[Loop, str]:
    """The loops of the cut by their names in ``search``, or "none" if top-k alone runs them."""
    main = {}
    for loop in loops:
        own = Counter(
            owner
            for at, (_, owner) in enumerate(code[loop.first : loop.last + 1], loop.first)
            if owner and owner not in HELPERS
            and not any(loop.holds(other) and other.first <= at <= other.last for other in loops)
        )  # fmt: skip
        main[loop] = own.most_common(1)[0][0]
    found = {}
    for loop, owner in main.items():
        inside = {main[other] for other in loops if loop.holds(other)}
        outside = [other for other in loops if other.holds(loop)]
        beside = {main[other] for each in outside for other in loops if each.holds(other)}
        if owner == "_narrowed" or "_narrowed" in inside:
            found[loop] = "narrow" if not inside else "halve"
        elif owner == "_mass":
            early = not outside and "share" not in found.values()
            found[loop] = "under" if "_narrowed" in beside else "share" if early else "rest"
        elif owner in ("_how_many", "_token_behind"):
            found[loop] = "none" if outside else "rest"
        elif owner == "_kth_best" or "_how_many" in inside:
            found[loop] = "none"
        else:
            collects = any(name == "mass_of" for _, name in code[loop.first : loop.last])
            found[loop] = "collect" if collects else "none"
    return found


@triton.jit
def _masses_kernel(scores_ptr, best_ptr, masses_ptr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(masses_ptr + at, mass_of(tl.load(scores_ptr + at), tl.load(best_ptr)))


@pytest.mark.parametrize("best", [0.0, 31.7, -250.3, 3e9, -1e12])
def test_masses_are_those_of_float64(best: float, kernel_device: torch.device) -> None:
    """Within a few last places; beyond 700 below the best they are too small to count.

    A low temperature makes scores so large that 700 is less than their last place.
    """
    best_score = torch.tensor(best)
    below = torch.cat([torch.zeros(1), torch.logspace(-7, 1.6, 2043), torch.tensor([699.0, 1e4])])
    scores = torch.cat([best_score - below, torch.full((2,), -torch.inf)])
    masses = torch.full((len(scores),), float("nan"), dtype=torch.float64, device=kernel_device)
    here = scores.to(kernel_device), best_score.to(kernel_device), masses
    _masses_kernel[(1,)](*here, len(scores))
    found, x = masses.cpu(), scores.double() - best_score.double()
    assert found[0] == 1
    far = x < -700
    error = (found - x.exp()).abs() / x.exp()
    assert (error <= 1e-15 * (1 - x))[~far].all() and far[-2:].all()
    assert (found[far] <= 1e-300).all() and (found[far] >= 0).all()


@pytest.mark.nightly
def test_top_p_issues_at_most_twice_the_instructions_of_min_p() -> None:
    """With 65,536 scores, of which 10,000 may be the cut."""
    run = [sys.executable, "-c", CODE, str(VOCAB)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    min_p, top_p = json.loads(done.stdout)
    torch.manual_seed(0)
    turns = search(4.05 * torch.randn(VOCAB))
    code, loops = listing(top_p["sample_cut"][1])
    assert set(names(code, loops).values()) == {*turns, "none"}
    ratio = issued(top_p, turns) / issued(min_p, turns)
    assert 1.5 < ratio < 2, (ratio, turns)
