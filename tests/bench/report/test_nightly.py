"""The record of a nightly run tells every long proof's outcome, and counts all tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.bench

ROOT = Path(__file__).resolve().parents[3]
TESTS = """
import pytest

def test_quick(): pass

@pytest.mark.nightly
def test_long(): pass

@pytest.mark.nightly
def test_wrong(): assert False

@pytest.mark.nightly
def test_not_here(): pytest.skip("no GPU")

@pytest.fixture
def broken(): raise OSError

@pytest.mark.nightly
def test_without_its_fixture(broken): pass
"""


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.nightly), "1"])
def test_outcomes_are_recorded(tmp_path: Path, monkeypatch, workers: str) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-m 'not nightly'")
    # A folder of the mark's name marks nothing.
    tmp_path = tmp_path / "nightly"
    tmp_path.mkdir()
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = nightly\n")
    record = tmp_path / "record.json"
    plugin = ["-p", "bench.report.nightly", "--nightly-record", str(record), "-n", workers]
    call = [sys.executable, "-m", "pytest", "-q", *plugin, str(tmp_path)]
    # The caller may choose tests by it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads(record.read_text())
    assert found["outcomes"] == {"error": 1, "failed": 1, "passed": 2, "skipped": 1}
    told = {name.split("::")[1]: proof["outcome"] for name, proof in found["proofs"].items()}
    assert told == {
        "test_long": "passed",
        "test_wrong": "failed",
        "test_not_here": "skipped",
        "test_without_its_fixture": "error",
    }
    assert found["commit"] and found["seconds"] >= 0
