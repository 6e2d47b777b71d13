"""The serving benchmark measures what it says, and writes it down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lfm2_fast
from bench.cpu import serving

pytestmark = pytest.mark.bench


def test_every_figure_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "serving.json"
    few = ["--threads", "1", "--requests", "3", "--prompt", "9", "--new", "4"]
    few += ["--rounds", "1", "--long", "300"]
    monkeypatch.setattr("sys.argv", ["serving", "--size", "tiny", *few, "--out", str(out)])
    serving.main()
    found = json.loads(out.read_text())
    assert found["protocol"]["requests"] == 3 and found["commit"]
    assert 0 < found["own time, 64 rows"]["share"] < 1
    assert found["first token"]["hit over miss"] < 1
    assert len(found["output tokens/s"]["engine"]) == 1
    assert found["waits"]["longest"] >= found["waits"]["median"] > 0


def test_a_known_beginning_is_not_run_again(tiny: Path) -> None:
    model = lfm2_fast.load(tiny, device="cpu", dtype="float32")
    found = serving.first_token(model, 1088, 1024, 3)
    assert min(found["miss"]) > 2 * max(found["hit"])
