"""Result files name their commit, or "unknown"."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.report import gpu_tables, results, tables


def said() -> list[str]:
    """Return the text of each report about this run, up to its versions."""
    found: dict[str, Any] = results.header("", {"threads": 1, "rounds": 1, "order": "in turns"})
    found = json.loads(json.dumps(found))
    found["gpu"] = found["machine"]["name"]
    made = {"copy_gb_s": 1.0, "matmul_tflops": 1.0, "how": {}, "skipped": {}, **found}
    texts = tables.conditions(found), gpu_tables.limits(made), gpu_tables.peers_conditions(made)
    return [text.partition("commit")[2].partition(";")[0].strip() for text in texts]


def test_a_copy_without_git_is_not_called_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.delenv("LFM2_FAST_COMMIT", raising=False)
    assert said() == ["unknown"] * 3
    monkeypatch.setenv("LFM2_FAST_COMMIT", "1234567-dirty")
    assert said() == ["1234567-dirty"] * 3


def test_changed_files_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.delenv("LFM2_FAST_COMMIT", raising=False)
    (tmp_path / "a").touch()
    who = ["-c", "user.name=a", "-c", "user.email=a"]
    for command in (["init", "-q"], ["add", "a"], [*who, "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    found = results.commit()
    assert len(found["commit"]) == 12 and found["changed_files"] == 0
    (tmp_path / "a").write_text("changed", encoding="utf-8")
    assert said() == [f"{found['commit']} with 1 files changed"] * 3
