from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from lfm2_fast.export import environment
from lfm2_fast.export.environment import cached_environment, run, vendor_python
from lfm2_fast.export.errors import ExportError

NEEDED = ("optimum.intel", "nncf", "openvino")


def test_a_given_environment_is_used_as_it_is(environment: Path, tmp_path: Path) -> None:
    python = vendor_python("openvino", NEEDED, environment, print)
    assert python == environment / "bin" / "python"
    with pytest.raises(ExportError, match="cannot import torch_of_tomorrow: install .*openvino"):
        vendor_python("openvino", ("torch_of_tomorrow",), environment, print)
    with pytest.raises(ExportError, match="has no bin/python"):
        vendor_python("openvino", NEEDED, tmp_path, print)


def test_one_is_made_once(
    tmp_path: Path, environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls: list[list[str]] = []

    def call(command: Any, note: Any, **_: Any) -> None:
        words = [str(word) for word in command]
        calls.append(words)
        if words[1:3] == ["-m", "venv"]:
            environment.rename(words[-1])
        note("Installing things")

    monkeypatch.setattr("lfm2_fast.export.environment.run", call)
    notes: list[str] = []
    made = vendor_python("openvino", NEEDED, None, notes.append)
    assert made == cached_environment("openvino") / "bin" / "python" and made.is_file()
    assert calls[0][:3] == [sys.executable, "-m", "venv"]
    installs = [words for words in calls if "pip" in words]
    assert [words[-3:-1] for words in installs] == [
        ["off", "-r"],
        ["--no-deps", "-r"],
    ]
    assert notes[0].startswith("making the environment for openvino")
    assert calls[-1][-3:] == list(NEEDED)
    count = len(calls)
    assert vendor_python("openvino", NEEDED, None, print) == made and len(calls) == count


def test_one_that_cannot_be_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls: list[list[str]] = []

    def call(command: Any, note: Any, **_: Any) -> None:
        calls.append([str(word) for word in command])
        if len(calls) == 2:
            raise ExportError("no matching distribution found for nncf")

    monkeypatch.setattr("lfm2_fast.export.environment.run", call)
    with pytest.raises(ExportError, match="(?s)make one yourself with 'pip install.*--environment"):
        vendor_python("openvino", NEEDED, None, print)
    assert not list(cached_environment("openvino").parent.iterdir())


def test_every_exporter_has_its_pins() -> None:
    for name, package in (
        ("openvino", "transformers"),
        ("onnx", "transformers"),
        ("coreml", "coremltools"),
    ):
        (pinned, *_) = environment._files(name)
        assert "torch==" in pinned.read_text() and f"{package}==" in pinned.read_text()


def test_a_failing_program_is_quoted() -> None:
    code = "print('\\n'.join(f'line {n}' for n in range(50))); raise SystemExit(3)"
    with pytest.raises(ExportError, match="(?s)ended with code 3: .*line 49") as failed:
        run([sys.executable, "-c", code], print)
    assert "line 30" not in str(failed.value)
    notes: list[str] = []
    code = "print('Collecting torch'); print('others')"
    run([sys.executable, "-c", code], notes.append, shown=("Collecting ",))
    assert notes == ["Collecting torch"]
    with pytest.raises(ExportError, match="cannot be started"):
        run(["/nowhere/python"], print)
