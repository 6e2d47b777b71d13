"""``import lfm2_fast`` is quick, and enough to run a model where torch is all there is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def python(code: str, *args: str | Path) -> str:
    """What ``code`` prints, run by a fresh interpreter that must succeed."""
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE)
    assert done.returncode == 0
    return done.stdout


def test_runs_without_triton_and_transformers(tiny: Path) -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(["triton", "transformers", "tokenizers", "rich", "typer"]))
import torch, lfm2_fast
model = lfm2_fast.load(sys.argv[1], device="cpu")
ids = torch.tensor([[1, 2, 3]])
assert model(ids).logits.isfinite().all()
print(model.generate(ids, max_new_tokens=4).tolist())
"""
    (row,) = json.loads(python(code, tiny))
    assert row[:3] == [1, 2, 3]
    assert 1 <= len(row[3:]) <= 4


def test_import_adds_little_to_torchs() -> None:
    code = """
import json, sys, time, torch
before, start = set(sys.modules), time.process_time()
import lfm2_fast
seconds = time.process_time() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))
"""
    seconds, modules, initialized = json.loads(python(code))
    assert seconds < 0.3  # 0.03 on an idle core
    assert not {"triton", "transformers", "huggingface_hub", "rich", "typer"} & set(modules)
    assert not initialized
