"""One format beside llama.cpp: which file is read, and that nothing wrong is timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.cpu import beside_llama
from bench.gate import STEPS
from bench.worker import EngineError
from tests.bench.cpu.fakes import fake_bench, fake_server

SIZE = 12


class Ours:
    """An engine of this package that notes what it is asked, and gives ``made``."""

    made = np.zeros((STEPS, SIZE), np.float32)
    calls: list[Any]

    def __init__(self, name: str) -> None:
        self.name, Ours.calls = name, [name]

    def ask(self, request: str, **arguments: Any) -> None:
        self.calls.append((request, arguments["folder"]))

    def logits(self, tokens: list[int], steps: int) -> np.ndarray:
        return self.made

    def close(self) -> None:
        self.calls.append("closed")


@pytest.fixture
def right(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The fake server's logits, beside its programs and a file of kind Q4_K_M."""
    (folder / "checkpoint-Q4_K_M.gguf").touch()
    fake_bench(tmp_path)
    fake_server(tmp_path)
    monkeypatch.setattr(beside_llama, "Remote", Ours)
    rows = np.zeros((STEPS, SIZE), np.float32)
    rows[1::2, 1::2] = 1
    rows[:, 1] = 2
    return rows


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_the_file_is_read_unless_the_checkpoint_is_quantized(
    quantization, right, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that is added to all logits of a row means nothing."""
    monkeypatch.setattr(Ours, "made", right + 5)
    ours, theirs = beside_llama.open_pair(folder, "Q4_K_M", quantization, 1, tmp_path, SIZE)
    source = folder if quantization else folder / "checkpoint-Q4_K_M.gguf"
    name = "lfm2_fast int4" if quantization else "lfm2_fast"
    assert Ours.calls == [name, ("load", str(source))]
    assert ours.name == f"lfm2_fast {quantization or 'Q4_K_M'}"
    assert theirs.name == "llama.cpp Q4_K_M"


def test_other_logits_are_not_timed(
    right, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ours, "made", np.roll(right, 1, axis=1))
    with pytest.raises(EngineError, match="its logits are wrong"):
        beside_llama.open_pair(folder, "Q4_K_M", None, 1, tmp_path, SIZE)
    assert Ours.calls[-1] == "closed"
