"""The benchmark of grammars measures steps with and without one, and writes them down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.cpu import grammar_cost

pytestmark = pytest.mark.bench


def test_both_sides_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    out = tmp_path / "grammar.json"
    few = ["--threads", "1", "--rounds", "2", "--steps", "3"]
    monkeypatch.setattr("sys.argv", ["grammar_cost", "--size", "tiny", *few, "--out", str(out)])
    grammar_cost.main()
    found = json.loads(out.read_text())
    named = {(f["name"], f["engine"]) for f in found["figures"]}
    assert len(named) == 2 * len(grammar_cost.ROWS)
    assert all(len(f["samples"]) == 2 and min(f["samples"]) > 0 for f in found["figures"])
    assert found["ratios"].keys() == {"1 rows", "16 rows"} and found["commit"]


def test_a_vocabulary_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_cost, "MADE", tmp_path)
    sources = tmp_path / "stdlib" / "some"
    sources.mkdir(parents=True)
    (sources / "file.py").write_text("def hello(name):\n    return f'hello {name}'\n" * 9)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "stdlib"))
    tokenizer = grammar_cost.trained_tokenizer(270)
    (file,) = tmp_path.glob("*.json")
    made = file.stat().st_mtime_ns
    assert len(tokenizer) == len(grammar_cost.trained_tokenizer(270)) == 270
    assert file.stat().st_mtime_ns == made
    ids = tokenizer("def hello(é)").input_ids
    assert tokenizer.decode(ids) == "def hello(é)" and len(ids) < 12
