"""The serving benchmark measures what it says, and writes it down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lfm2_fast
from bench.cpu import llama_build, serving
from bench.worker import EngineError
from tests.bench.cpu.fakes import fake_server

pytestmark = pytest.mark.bench

FEW = ["--threads", "1", "--requests", "3", "--prompt", "9", "--new", "4"]
FEW += ["--rounds", "1", "--long", "300"]


def test_every_figure_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "serving.json"
    monkeypatch.setattr(serving, "program", lambda name: tmp_path / name)
    monkeypatch.setattr("sys.argv", ["serving", "--size", "tiny", *FEW, "--out", str(out)])
    serving.main()
    assert "llama-server is left out: `make peers`" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["protocol"]["requests"] == 3 and found["commit"]
    assert 0 < found["own time, 64 rows"]["share"] < 1
    assert found["first token"]["hit over miss"] < 1
    assert {name: len(rates) for name, rates in found["output tokens/s"].items()} == {"engine": 1}
    assert found["waits"]["longest"] >= found["waits"]["median"] > 0


def test_a_known_beginning_is_not_run_again(tiny: Path) -> None:
    model = lfm2_fast.load(tiny, device="cpu", dtype="float32")
    found = serving.first_token(model, 1088, 1024, 3)
    assert min(found["miss"]) > 2 * max(found["hit"])


def test_sides_take_turns_back_and_forth() -> None:
    order: list[str] = []

    def side(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    told: list[tuple[str, dict[str, list[float]]]] = []
    sides = {"engine": lambda: side("engine", 2.0), "other": lambda: side("other", 4.0)}
    found = serving.interleave(sides, 100, 3, lambda *what: told.append(what))
    assert found == {"engine": [50.0] * 3, "other": [25.0] * 3}
    assert order == ["engine", "other", "other", "engine", "engine", "other"]
    assert [name for name, _ in told] == ["output tokens/s"] * 3


@pytest.mark.parametrize(("ours", "reached"), [(310.0, "aim"), (250.0, "must"), (230.0, "no")])
def test_8_bits_are_judged_against_the_server(ours: float, reached: str) -> None:
    found = serving.verdict([ours] * 2, [100.0] * 2, "llama-server Q8_0")
    assert found["reached"] == reached and found["value"] == ours / 100
    assert set(serving.verdict([ours], [100.0], "llama-server BF16")) == {"value", "low", "high"}


def test_a_server_with_another_model_is_not_timed(folder: Path, tmp_path: Path) -> None:
    (folder / "checkpoint-BF16.gguf").touch()
    path = fake_server(tmp_path)
    with pytest.raises(EngineError, match="logits are wrong"):
        serving.llama_server(path, folder, 1, 40, "BF16")


@pytest.mark.slow
@pytest.mark.skipif(not llama_build.built(), reason="`make peers` has not built llama.cpp here")
def test_the_real_server_takes_turns_with_the_engine(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    out = tmp_path / "serving.json"
    monkeypatch.setattr(serving, "checkpoint", lambda size: folder)
    given = [*FEW, "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["serving", "--size", "tiny", *given])
    serving.main()
    found = json.loads(out.read_text())
    assert {name: len(rates) for name, rates in found["output tokens/s"].items()} == {
        "engine": 1,
        "llama-server BF16": 1,
    }
    assert found["engine over llama-server BF16"]["value"] > 0
