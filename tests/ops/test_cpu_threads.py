"""OpenMP's threads of a Python thread end where its work goes on in another one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CODE = """
import json, os, threading, time, torch, lfm2_fast
from lfm2_fast.engine.async_engine import AsyncEngine
from lfm2_fast.ops.cpu_threads import release_threads

numbers = torch.zeros(2**22)
torch.set_num_threads(3)

def threads():
    return len(os.listdir("/proc/self/task"))

def ended(function):
    "Threads that work for this thread, and that have to start again after the call."
    torch.relu(numbers)
    function()
    time.sleep(0.5)
    before = threads()
    torch.relu(numbers)
    return threads() - before

def load():
    return lfm2_fast.load("lfm2_fast/tiny", device="cpu")

def write():
    torch.set_num_threads(3)  # OpenMP's number is each thread's own
    found["written elsewhere"] = ended(lambda: model.generate([[1, 2, 3]], max_new_tokens=2))

model, engines = load(), []
found = {"nothing": ended(lambda: None), "released": ended(release_threads), "loaded": ended(load)}
other = threading.Thread(target=write)
other.start()
other.join()
found["for an engine"] = ended(lambda: engines.append(AsyncEngine(lfm2_fast.Engine(model))))
engines[0].close()
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another OpenMP")
def test_no_thread_sleeps_beside_the_one_that_goes_on() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    ended = dict.fromkeys(("released", "loaded", "written elsewhere", "for an engine"), 2)
    assert json.loads(done.stdout) == {"nothing": 0, **ended}
