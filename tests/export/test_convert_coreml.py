"""Program that is converted for Core ML, and its export with a stand-in for coremltools."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lfm2_fast.export.answering import open_export, read_record
from lfm2_fast.export.errors import ExportError
from lfm2_fast.export.exporting import export
from lfm2_fast.export.vendors import COREML, PROGRAMS
from tests.export.conftest import load_eager, logits_of

IDS = [1, 40, 41, 7, 17, 5, 90, 33, 2]


def test_the_program_is_the_model(random_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A prompt at once and token by token, with biases, a head of its own and unequal heads."""
    folder = random_checkpoint(conv_bias=True, tie_word_embeddings=False, head_dim=16)
    model = load_eager(folder)
    model.save_pretrained(tmp_path)
    made = runpy.run_path(str(PROGRAMS / "convert_coreml.py"))
    config = json.loads((tmp_path / "config.json").read_text())
    program = made["traced"](made["Lfm2"](config, load_file(tmp_path / "model.safetensors"), 16))
    rows = []
    for begin, end in ((0, 5), (5, 6), (6, 8), (8, 9)):
        mask = torch.full((1, 1, end - begin, end), -1e4).triu(begin + 1)
        with torch.no_grad():
            rows.append(program(torch.tensor([IDS[begin:end]], dtype=torch.int32), mask)[0])
    expected = logits_of(model, IDS)
    assert (torch.cat(rows) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.slow
def test_an_export_says_that_core_ml_did_not_run_it(
    tiny: Path, environment: Path, tmp_path: Path
) -> None:
    folder, notes = tmp_path / "made" / "here", list[str]()
    record = export(COREML, str(tiny), folder, "f16", environment=environment, note=notes.append)
    assert record["proof"]["steps_error"] <= 2 * record["proof"]["expected_steps_error"] < 0.01
    assert "Core ML, which needs macOS 15 or iOS 18, has not run it" in record["not_proven"]
    assert record["not_proven"] in notes and record["context"] == 2048
    told = json.loads((folder / "model.mlpackage" / "told.json").read_text())
    assert told == {
        "input_ids": "int32",
        "mask": "float16",
        "logits": "float16",
        "precision": "float16",
    }
    assert [each.name for each in folder.parent.iterdir()] == ["here"]
    assert read_record(str(folder)) == record
    with pytest.raises(ExportError, match="for Core ML, which an application runs"):
        open_export(str(folder), record, environment=environment, note=print)
