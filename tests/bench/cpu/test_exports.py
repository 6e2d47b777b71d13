"""Exports timed in their runtimes beside this package: who takes turns, and what is kept."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.cpu import exports
from bench.report import tables
from lfm2_fast.export.exporting import RECORD


class Silent:
    """Runtime that does nothing but keep what it is asked."""

    fed: list[tuple[str, int, bool]] = []

    def __init__(self, python: Path, name: str, path: Path, *, context: int) -> None:
        self.name, self.pid = name, os.getpid()
        self.facts = {"runtime": f"{name}-runtime 1.2.3", "device": "CPU"}

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        self.fed.append((self.name, 0, False))

    def feed(self, ids: list[int], *, restart: bool) -> None:
        self.fed.append((self.name, len(ids), restart))


@pytest.fixture
def made(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Result file of two exports, with prompts of 5 tokens."""
    monkeypatch.setattr(exports, "Runtime", Silent)
    monkeypatch.setattr(exports, "vendor_python", lambda *given: Path(sys.executable))
    monkeypatch.setattr(Silent, "fed", [])
    out, command = tmp_path / "exports-tiny.json", ["exports", str(tiny)]
    for runtime, type in (("onnx", "int4"), ("openvino", "int8")):
        folder = tmp_path / runtime
        folder.mkdir()
        (folder / RECORD).write_text(json.dumps({"runtime": runtime, "type": type}), "utf-8")
        command += ["--export", str(folder)]
    command += ["--prompt", "5", "--steps", "3", "--rounds", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(out)])
    exports.main()
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def test_every_engine_has_a_figure_of_every_round(made: dict[str, Any]) -> None:
    engines = [*(name for name, _ in exports.OURS), "onnx int4", "openvino int8"]
    for case in ("prefill, 5 tokens", "decode, 1 row"):
        figures = [row for row in made["figures"] if row["name"] == case]
        assert [row["engine"] for row in figures] == engines
        assert all(len(row["samples"]) == 2 and min(row["samples"]) > 0 for row in figures)
    # Prompts are new texts; a turn before those that count; the processes end.
    own = [fed[1:] for fed in Silent.fed if fed[0] == "onnx"]
    turn = [(5, True), *[(1, False)] * 3]
    assert own == [*3 * turn, (0, False)]


def test_the_conditions_name_the_runtimes(made: dict[str, Any]) -> None:
    text = tables.conditions(made)
    assert "onnx-runtime 1.2.3" in text and "openvino-runtime 1.2.3" in text


def test_a_folder_without_a_record_is_not_an_export(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is not an export"), exports.exported(tmp_path, None, 8):
        pass
