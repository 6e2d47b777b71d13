"""llama-bench: its calls, its answers, and runs that fail or are wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.cpu import llama_build, peers
from bench.cpu.gguf_file import KINDS
from bench.cpu.llama_bench import LlamaBench
from bench.cpu.references import Reference
from bench.gate import STEPS
from bench.worker import EngineError
from tests.bench.cpu.fakes import asked, fake_bench, fake_server


def files(folder: Path, *kinds: str) -> None:
    for kind in kinds:
        (folder / f"{folder.name}-{kind}.gguf").touch()


def the_fakes_logits(size: int) -> np.ndarray:
    """Return the fake server's logits. Its log-probabilities are these minus a constant."""
    rows = np.zeros((STEPS, size), np.float32)
    rows[1::2, 1::2] = 1
    rows[:, 1] = 2
    return rows


def test_each_case_is_one_run_of_one_test(folder: Path, tmp_path: Path) -> None:
    files(folder, "BF16")
    fake_bench(tmp_path)
    engine = LlamaBench(tmp_path, "BF16", folder, 2)
    cases = peers.CASES
    assert peers.turn(engine, cases["decode"], 0) == 100
    assert peers.turn(engine, cases["prefill 512"], 0) == 900
    assert peers.turn(engine, cases["decode after 8k"], 0) == 100
    assert engine.name == "llama.cpp BF16" and engine.versions == {"llama.cpp": "abc"}
    assert peers.why_not(engine, "decode") is None
    assert "one sequence" in str(peers.why_not(engine, "decode, batch 8"))
    same = {"-m": str(folder / "checkpoint-BF16.gguf"), "-t": "2", "-ngl": "0", "-lm": "none"}
    same |= {"-r": "1", "-o": "json"}
    assert asked(tmp_path) == [
        {**same, "-p": "0", "-n": "32", "-d": "64"},
        {**same, "-p": "512", "-n": "0", "-d": "0"},
        {**same, "-p": "0", "-n": "16", "-d": "8192"},
    ]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('sys.exit("error: unknown model architecture")', "unknown model architecture"),
        ('print("no JSON"); sys.exit()', "not one test's JSON"),
        ('print("[]"); sys.exit()', "not one test's JSON"),
        ('print("[{}]"); sys.exit()', "lacks a field: 'n_prompt'"),
        ('given["-n"] = "5"', "it ran {'n_prompt': 0"),
    ],
)
def test_a_program_that_fails_says_why(folder: Path, tmp_path: Path, body: str, said: str) -> None:
    files(folder, "BF16")
    fake_bench(tmp_path, body)
    with pytest.raises(EngineError) as caught:
        LlamaBench(tmp_path, "BF16", folder, 2).rate(64, 32)
    assert said in str(caught.value) and caught.value.engine == "llama.cpp BF16"


def test_only_what_the_server_gets_right_is_timed(folder: Path, tmp_path: Path) -> None:
    files(folder, *KINDS)
    fake_bench(tmp_path)
    fake_server(tmp_path)
    names = [f"llama.cpp {kind}" for kind in KINDS]
    right = the_fakes_logits(8)
    found, figures, skipped = peers.open_engines(names, folder, 2, tmp_path, Reference(right, 0.1))
    assert [engine.name for engine in found] == names and not skipped
    known = {(figure.engine, figure.name): figure.median for figure in figures}
    assert known["llama.cpp Q8_0", "logits"] < 1e-6
    assert known["llama.cpp Q8_0", "load"] > 0 and known["llama.cpp BF16", "memory after load"] > 0
    right = right + np.linspace(-0.3, 0.3, 8, dtype=np.float32)
    found, figures, skipped = peers.open_engines(names, folder, 2, tmp_path, Reference(right, 0.1))
    assert [engine.name for engine in found] == ["llama.cpp Q4_0"]
    assert "logits are wrong" in skipped["llama.cpp BF16"]
    assert {figure.engine for figure in figures} == {"llama.cpp Q4_0"}


def test_programs_that_are_not_built_are_left_out(folder: Path, tmp_path: Path) -> None:
    right = Reference(the_fakes_logits(8), 0.1)
    names = ["llama.cpp BF16"]
    found, _, skipped = peers.open_engines(names, folder, 2, tmp_path, right)
    assert not found and "llama-bench: run `make peers`" in skipped["llama.cpp BF16"]
    fake_bench(tmp_path)
    files(folder, "BF16")
    found, _, skipped = peers.open_engines(names, folder, 2, tmp_path, right)
    assert not found and "llama-server: run `make peers`" in skipped["llama.cpp BF16"]


def test_one_that_fails_midway_leaves_the_others(folder: Path, tmp_path: Path) -> None:
    files(folder, "BF16", "Q8_0")
    fails = 'if given["-m"].endswith("Q8_0.gguf") and given["-p"] == "512": sys.exit("it burned")'
    fake_bench(tmp_path, fails)
    engines: list[peers.Engine] = [
        LlamaBench(tmp_path, kind, folder, 2) for kind in ("BF16", "Q8_0")
    ]
    told: list[str] = []
    skipped: dict[str, str] = {}
    assert len(peers.measure(engines, "decode", 2, skipped, told.append)) == 2 and not skipped
    assert any("round 2 of 2, about" in line and "s left" in line for line in told)
    (figure,) = peers.measure(engines, "prefill 512", 2, skipped, told.append)
    assert (figure.engine, figure.samples) == ("llama.cpp BF16", [900.0, 900.0])
    ((who, why),) = skipped.items()
    assert who == "llama.cpp Q8_0, from prefill 512 on" and "it burned" in why
    assert [engine.name for engine in engines] == ["llama.cpp BF16"]
    assert peers.measure(engines, "decode, batch 8", 2, skipped, told.append) == []


@pytest.mark.slow
@pytest.mark.skipif(not llama_build.built(), reason="`make peers` has not built llama.cpp here")
def test_the_real_program_runs_every_case(folder: Path) -> None:
    pytest.importorskip("gguf")
    engine = LlamaBench(llama_build.program(""), "Q4_0", folder, 1)
    assert engine.rate(32, 4) > 0 and engine.rate(32, 0) > 0
    assert engine.versions == {
        "llama.cpp": "llama-cpp-python-" + llama_build.pinned("llama-cpp-python")
    }
