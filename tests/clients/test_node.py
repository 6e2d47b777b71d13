"""Clients for Node: OpenAI's own and the package "ai". Their scripts run as they would anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "node"
NODE = shutil.which("node")
if NODE is None or not (FOLDER / "node_modules").is_dir():
    pytest.skip("`make test-clients` installs them where Node and npm are", allow_module_level=True)


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*.mjs")))
def test_scripts(url: str, script: str) -> None:
    environment = {**os.environ, "LFM2_FAST_URL": url}
    command = [str(NODE), "--test", script]
    done = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# fail 0" in done.stdout and "# pass 0" not in done.stdout
