"""``import lfm2_fast`` is quick, and enough to run a model where torch is all there is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lfm2_fast


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
from lfm2_fast import *
seconds = time.process_time() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))
"""
    seconds, modules, initialized = json.loads(python(code))
    assert seconds < 0.3  # 0.03 on an idle core
    assert not {"triton", "transformers", "huggingface_hub", "rich", "typer"} & set(modules)
    assert not initialized


def test_the_command_line_imports_no_torch() -> None:
    code = """
import sys
import lfm2_fast.__main__
print(lfm2_fast.__version__, sorted({"torch", "transformers", "rich"} & set(sys.modules)))
"""
    assert python(code) == f"{lfm2_fast.__version__} []\n"


def test_public_names() -> None:
    assert set(lfm2_fast.__all__) <= set(dir(lfm2_fast))
    for name in lfm2_fast.__all__:
        assert getattr(lfm2_fast, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'lfm2_fast' has no attribute 'laod'"):
        getattr(lfm2_fast, "laod")  # noqa: B009  (a type checker knows it too)
