"""A server of the small checkpoint in another process, whose environment has no clients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """URL of the server, without a path."""
    python = os.environ.get("LFM2_FAST_PYTHON", sys.executable)
    command = [python, "-m", "lfm2_fast", "serve", "lfm2_fast/tiny", "--port", "0"]
    command += ["--device", "cpu", "--dtype", "float32", "--api-key", "secret"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("ready at http://"), line
            yield line.split()[-1]
        finally:
            process.terminate()
    assert process.returncode == 0
