"""Environment that stands in for that of OpenVINO's exporter, and exports that run here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import lfm2_fast
from lfm2_fast.export.proof import Outcome, outcome, proof_ids
from lfm2_fast.export.rounding import Rounding, round_weights
from lfm2_fast.text.tokenizer import load_tokenizer

STAND_IN = Path(__file__).parent / "stand_in"
Model = lfm2_fast.Lfm2ForCausalLM


class Here:
    """Export that runs in this process: the model itself, with its cache."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def feed(self, ids: list[int], *, restart: bool = False, every: bool = False) -> torch.Tensor:
        if restart:
            self.cache = self.model.new_cache(1)
        with torch.inference_mode():
            logits = self.model(torch.tensor([ids]), past_key_values=self.cache).logits[0]
        return logits if every else logits[-1:]


def load_eager(folder: Path) -> Model:
    return lfm2_fast.load(folder, device="cpu", dtype="float32", backend="eager")


def logits_of(model: Model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.fixture(scope="session")
def ids(tiny: Path) -> list[int]:
    return proof_ids(load_tokenizer(str(tiny)))


@pytest.fixture(scope="session")
def write_table(tiny: Path, ids: list[int]) -> Callable[..., Outcome]:
    """Writes the table of a right export of a type, or of weights that are rounded so."""

    def write(path: Path, rounding: Rounding | None = None) -> Outcome:
        model = load_eager(tiny)
        if rounding is not None:
            round_weights(model.network, rounding)
        found = outcome(Here(model), ids)
        np.savez(path, ids=np.array(found.ids), logits=found.logits.numpy())
        return found

    return write


@pytest.fixture
def tables(
    write_table: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Folder with the tables of right exports."""
    folder = tmp_path / "tables"
    folder.mkdir()
    write_table(folder / "fp32.npz")
    write_table(folder / "int8.npz", Rounding(8))
    monkeypatch.setenv("TABLES", str(folder))
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """Virtual environment whose packages stand in for OpenVINO's."""
    python = tmp_path / "environment" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={STAND_IN} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python.parents[1]
