"""The probe runs: on a CPU with a small model, whose figures say nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.gpu import isolated, probe, steps

CONFIG = Path(__file__).resolve().parents[3] / "lfm2_fast" / "tiny" / "config.json"


def test_every_figure_has_its_prediction_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, few in (("STEPS", 4), ("TURN_STEPS", 4), ("WARM", 3)):
        monkeypatch.setattr(steps, name, few)
    monkeypatch.setattr(probe, "RACES", probe.RACES[2:3])
    monkeypatch.setattr(probe, "isolated", isolated.measure)  # here, where constants are few
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    config |= {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    small, out = tmp_path / "small.json", tmp_path / "probe.json"
    small.write_text(json.dumps(config), encoding="utf-8")
    probe.main(["--device", "cpu", "--config", str(small), "--out", str(out)])
    found = json.loads(out.read_text(encoding="utf-8"))
    parts = ("race", "rows", "int8", "sampling", "first token", "threads")
    for part in parts:
        assert found[part]["small"]["found"] and found[part]["small"]["predicted"], part
    assert found["race"]["small"]["found"] == {
        "3 rows from 120": {"plain": True, "again": [True, True, True]}
    }
    answers = found["threads"]["small"]["found"].values()
    assert len({tuple(answer["tokens"]) for answer in answers}) == 1
    assert all(answer["stream_stays"] for answer in answers)
