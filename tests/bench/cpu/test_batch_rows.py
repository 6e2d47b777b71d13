"""The benchmark of rows measures what it says, and writes it down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.cpu import batch_rows

pytestmark = pytest.mark.bench


def test_every_case_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.json"
    few = ["--threads", "1", "--rounds", "1", "--steps", "1", "--prefill", "70"]
    monkeypatch.setattr("sys.argv", ["batch_rows", "--size", "tiny", *few, "--out", str(out)])
    batch_rows.main()
    found = json.loads(out.read_text())
    names = {*(f"decode, rows {rows}" for rows in batch_rows.ROWS), "prefill 70"}
    for engine in batch_rows.GOALS:
        for unit in ("tokens/s", "multiply-adds/s"):
            mine = [f for f in found["figures"] if (f["engine"], f["unit"]) == (engine, unit)]
            assert {figure["name"] for figure in mine} == names
            assert all(len(figure["samples"]) == 1 for figure in mine)
        assert len(found["ratios"][engine]["2 rows over 1"]) == 3
    assert found["protocol"]["order"] and found["commit"]


def test_the_head_is_counted_once_for_each_token_with_logits(tiny: Path) -> None:
    side = batch_rows.Side("lfm2_fast", tiny, 70)
    for case in (*batch_rows.ROWS, 0):
        side.times[batch_rows.name_of(case, 70)] = [1.0]
    rates = {each.name: each.median for each in side.figures() if each.unit != "tokens/s"}
    config = side.network.config
    head = config.vocab_size * config.hidden_size
    every = sum(p.numel() for n, p in side.network.named_parameters() if n.endswith("proj.weight"))
    assert batch_rows.multiply_adds(side.network) == (every, head)
    assert rates["decode, rows 64"] == 64 * (every + head)
    assert rates["prefill 70"] == 70 * every + head


def test_ratios_are_between_the_right_cases() -> None:
    rates = {"decode, rows 1": 10.0, "decode, rows 2": 18.0, "decode, rows 64": 75.0}
    figures = [
        batch_rows.Figure(name, "lfm2_fast", unit, [rates.get(name, 100.0)] * 3)
        for name in [batch_rows.name_of(case, 512) for case in (*batch_rows.ROWS, 0)]
        for unit in ("tokens/s", "multiply-adds/s")
    ]
    found = batch_rows.ratios(figures, 512)["lfm2_fast"]
    assert found["2 rows over 1"][0] == pytest.approx(1.8)
    assert found["64 rows over prefill"][0] == pytest.approx(0.75)
