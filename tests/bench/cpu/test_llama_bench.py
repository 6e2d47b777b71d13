"""A given llama-bench: what it is asked, what it answers, what becomes of one that fails."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.cpu import peers
from bench.cpu.llama_bench import LlamaBench
from bench.cpu.llama_cpp import read_safetensors, write_gguf
from bench.report import tables
from bench.worker import EngineError

# Answers like llama-bench, and writes down what it was asked.
PROGRAM = """#!{python}
import json, sys
from pathlib import Path

given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
here = Path(__file__)
with open(here.with_name("asked"), "a") as file:
    file.write(json.dumps(given) + "\\n")
{body}
ran = {{"n_prompt": int(given["-p"]), "n_gen": int(given["-n"])}}
ran["n_depth"] = int(given.get("-d", 0))
rate = 100.0 if ran["n_gen"] else 900.0
found = {{"build_commit": "abc", "build_number": 7, "n_threads": int(given["-t"]), **ran}}
print(json.dumps([{{**found, "samples_ns": [1], "samples_ts": [rate]}}]))
"""


@pytest.fixture
def folder(tmp_path: Path, tiny: Path) -> Path:
    made = tmp_path / "checkpoint"
    made.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny / name, made / name)
    return made


def program(folder: Path, body: str = "", name: str = "llama-bench") -> Path:
    path = folder / name
    path.write_text(PROGRAM.format(python=sys.executable, body=body), encoding="utf-8")
    path.chmod(0o755)
    return path


def asked(tool: Path) -> list[dict[str, str]]:
    lines = tool.with_name("asked").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_each_case_is_one_run_of_one_test(folder: Path, tmp_path: Path) -> None:
    (folder / "BF16.gguf").touch()
    tool = program(tmp_path)
    engine = LlamaBench(tool, "BF16", folder, 2)
    assert engine.name == "llama-bench BF16" and engine.versions == {"llama-bench": "7 (abc)"}
    cases = peers.CASES
    assert peers.turn(engine, cases["decode"], 0) == 100
    assert peers.turn(engine, cases["prefill 512"], 0) == 900
    assert peers.turn(engine, cases["decode after 8k"], 0) == 100
    assert peers.why_not(engine, "decode") is None
    assert "one sequence" in str(peers.why_not(engine, "decode, batch 8"))
    found = asked(tool)[1:]
    same = {"-m": str(folder / "BF16.gguf"), "-t": "2", "-ngl": "0", "-mmp": "0"}
    same |= {"-r": "1", "-o": "json"}
    assert found == [
        {**same, "-p": "0", "-n": "32", "-d": "64"},
        {**same, "-p": "512", "-n": "0"},
        {**same, "-p": "0", "-n": "16", "-d": "8192"},
    ]


def test_another_spelling_of_an_option_is_tried(folder: Path, tmp_path: Path) -> None:
    (folder / "BF16.gguf").touch()
    tool = program(tmp_path, 'if "-mmp" in given: sys.exit("unknown argument -mmp")')
    engine = LlamaBench(tool, "BF16", folder, 2)
    assert engine.unmapped == ["-lm", "none"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('sys.exit("error: unknown model architecture")', "unknown model architecture"),
        ('print("no JSON"); sys.exit()', "not one test's JSON"),
        ('print("[]"); sys.exit()', "not one test's JSON"),
        ('given["-n"] = "5"', "it ran {'n_prompt': 0"),
    ],
)
def test_a_program_that_fails_is_left_out_with_its_reason(
    folder: Path, tmp_path: Path, body: str, said: str
) -> None:
    for kind in ("BF16", "Q8_0", "Q4_0"):
        (folder / f"{kind}.gguf").touch()
    found, skipped, ungated = peers.open_llama_bench(program(tmp_path, body), folder, 2, ())
    assert found == [] and ungated == {}
    assert list(skipped) == ["llama-bench BF16", "llama-bench Q8_0", "llama-bench Q4_0"]
    assert all(said in why for why in skipped.values()), skipped


def test_a_missing_program_is_left_out(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="there is no program"):
        LlamaBench(tmp_path / "nothing", "BF16", folder, 2)


def test_files_are_made_by_the_quantiser_beside_it(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    tool = program(tmp_path)
    quantiser = '#!/bin/sh\ncp "$1" "$2"; echo "$3" >> "$(dirname "$0")/made"\n'
    beside = tmp_path / "llama-quantize"
    beside.write_text(quantiser, encoding="utf-8")
    beside.chmod(0o755)
    found, skipped, ungated = peers.open_llama_bench(tool, folder, 2, {"llama.cpp Q8_0"})
    assert [engine.kind for engine in found] == ["BF16", "Q8_0", "Q4_0"] and not skipped
    assert (tmp_path / "made").read_text(encoding="utf-8").split() == ["Q8_0", "Q4_0"]
    assert "were right in llama-cpp-python" in ungated["llama-bench Q8_0"]
    assert "seen by nobody" in ungated["llama-bench BF16"]
    assert not list(folder.glob("*.partial"))


def test_without_a_quantiser_4_bits_are_left_out(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    found, skipped, _ = peers.open_llama_bench(program(tmp_path), folder, 2, ())
    assert [engine.kind for engine in found] == ["BF16", "Q8_0"]
    assert "llama-quantize" in skipped["llama-bench Q4_0"]


def test_8_bits_by_the_package_gguf(tiny: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    write_gguf(tiny, tmp_path / "x.gguf", "Q8_0")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    matrix = found["token_embd.weight"]
    assert matrix.tensor_type == gguf.GGMLQuantizationType.Q8_0
    wide = gguf.quants.dequantize(matrix.data, matrix.tensor_type)
    bits = read_safetensors(tiny / "model.safetensors")["model.embed_tokens.weight"]
    exact = (bits.astype(np.uint32) << 16).view(np.float32)
    assert np.abs(wide - exact).max() <= np.abs(exact).max() / 127
    assert found["blk.0.shortconv.conv.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_one_that_fails_midway_leaves_the_others(folder: Path, tmp_path: Path) -> None:
    for kind in ("BF16", "Q8_0"):
        (folder / f"{kind}.gguf").touch()
    fails = 'if given["-m"].endswith("Q8_0.gguf") and given["-p"] == "512": sys.exit("it burned")'
    tool = program(tmp_path, fails)
    engines: list[peers.Engine] = [LlamaBench(tool, kind, folder, 2) for kind in ("BF16", "Q8_0")]
    told: list[str] = []
    skipped: dict[str, str] = {}
    assert len(peers.measure(engines, "decode", 2, skipped, told.append)) == 2 and not skipped
    assert any("round 2 of 2, about" in line and "s left" in line for line in told)
    (figure,) = peers.measure(engines, "prefill 512", 2, skipped, told.append)
    assert (figure.engine, figure.samples) == ("llama-bench BF16", [900.0, 900.0])
    ((who, why),) = skipped.items()
    assert who == "llama-bench Q8_0, from prefill 512 on" and "it burned" in why
    assert [engine.name for engine in engines] == ["llama-bench BF16"]
    assert peers.measure(engines, "decode, batch 8", 2, skipped, told.append) == []


def test_the_report_says_what_was_not_checked() -> None:
    found = {
        "when": "2020-01-01",
        "machine": {"name": "a CPU", "features": ""},
        "versions": {},
        "protocol": {"threads": 2, "rounds": 2, "order": "in turns"},
        "commit": "0",
        "changed_files": 0,
        "skipped": {"x": "why"},
        "ungated": {"llama-bench BF16": "it shows no logits"},
    }
    told = tables.conditions(found)
    assert told.endswith(
        "Left out: x (why). llama-bench BF16 is timed unchecked: it shows no logits."
    )
