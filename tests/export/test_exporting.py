from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lfm2_fast.export.errors import ExportError
from lfm2_fast.export.exporting import RECORD, export
from lfm2_fast.export.vendors import OPENVINO

Written = Callable[..., dict[str, object]]


@pytest.fixture
def written(tiny: Path, environment: Path) -> Written:
    """Exports the small checkpoint by programs that stand in."""

    def call(folder: Path, type: str = "f32") -> dict[str, object]:
        notes: list[str] = []
        record = export(
            OPENVINO, str(tiny), folder, type, environment=environment, note=notes.append
        )
        return {**record, "notes": notes}

    return call


def test_an_export_is_proven_and_keeps_its_record(
    written: Written, tables: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "made" / "here"
    record = written(folder, "int8")
    notes = record.pop("notes")
    assert json.loads((folder / RECORD).read_text()) == record
    assert record["runtime"] == "openvino" and record["type"] == "int8"
    proof = record["proof"]
    assert isinstance(proof, dict) and isinstance(notes, list)
    # The table has this package's own rounding.
    assert proof["steps_error"] == pytest.approx(proof["expected_steps_error"], rel=1e-3)
    assert proof["static_shapes_error"] == 0
    assert any("32 of 32 greedy tokens" in note for note in notes)
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= {
        file.name for file in folder.iterdir()
    }
    arguments = json.loads((folder / "arguments.json").read_text())
    assert arguments[arguments.index("--weight-format") + 1] == "int8" and "--sym" in arguments
    assert [file.name for file in folder.parent.iterdir()] == ["here"]


def test_a_wrong_export_is_refused_and_leaves_nothing(
    written: Written, tables: Path, tmp_path: Path
) -> None:
    table = dict(np.load(tables / "fp32.npz"))
    table["logits"][70:] += 0.05
    np.savez(tables / "fp32.npz", **table)
    folder = tmp_path / "made" / "here"
    with pytest.raises(ExportError, match="step 6 after the prompt.*look at the caches"):
        written(folder)
    assert not list(folder.parent.iterdir())


def test_a_failing_exporter_is_quoted(written: Written, tables: Path, tmp_path: Path) -> None:
    (tables / "fp32.npz").unlink()
    with pytest.raises(ExportError, match="(?s)optimum_cli export openvino.*unsupported arch"):
        written(tmp_path / "made")


def test_arguments_are_checked_first(written: Written, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="type='q4_0' is not supported; use f32"):
        written(tmp_path / "made", "q4_0")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="is not an empty folder"):
        written(tmp_path / "full")
