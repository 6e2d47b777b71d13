"""``bench/gpu/test_gpu.sh`` reports failures in every case: on a CPU, with stand-ins."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "bench" / "gpu" / "test_gpu.sh"
# Without what the script asks of torch and of pytest's plug-ins.
PYTHON = f'#!/bin/sh\n[ "$1" = -c ] && exit 1\nexec {sys.executable} "$@"\n'
# The alarm is what tells ``timeout``, which started pytest, that the time is up.
HANGS = """
import os, signal, time

def test_fails():
    assert "what was found" == "what was not"

def test_hangs():
    os.kill(os.getppid(), signal.SIGALRM)
    time.sleep(60)
"""


def test_a_part_at_its_limit_tells_its_failures(tmp_path: Path) -> None:
    """The later parts run too, and find CUDA's tools."""
    script = tmp_path / "bench" / "gpu" / "test_gpu.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, script)
    for name in re.findall(r"tests/\w+/test_\w+\.py", script.read_text(encoding="utf-8")):
        assert (SCRIPT.parents[2] / name).is_file(), name
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "tests" / "kernels" / "test_rope.py").write_text(HANGS, encoding="utf-8")
    sanitizer = "#!/bin/sh\necho looked with $2\n"
    tools = {"python": PYTHON, "cuda/bin/compute-sanitizer": sanitizer}
    for name, text in tools.items():
        tool = tmp_path / name
        tool.parent.mkdir(parents=True, exist_ok=True)
        tool.write_text(text, encoding="utf-8")
        tool.chmod(0o755)
    env = {
        "PATH": "/usr/bin:/bin",
        "PYTHON": str(tmp_path / "python"),
        "OUT": str(tmp_path / "out"),
        "CUDA_HOME": str(tmp_path / "cuda"),
        "LFM2_FAST_COMMIT": "1234567-dirty",
    }
    done = subprocess.run(
        ["bash", script],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        # As it is for what a shell runs in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert done.returncode == 124
    assert (
        "FAILED tests/kernels/test_rope.py::test_fails" in done.stdout and "1 failed" in done.stdout
    )
    assert "looked with memcheck" in done.stdout and "looked with racecheck" in done.stdout
    assert done.stdout.startswith("commit 1234567-dirty\n")
    (report,) = (tmp_path / "out").iterdir()
    assert report.read_text(encoding="utf-8") == done.stdout
