"""Exports of the small checkpoint by the vendors' own programs, for ``make test-export`` alone.

Each exporter's environment is made in the cache at first, which downloads up to 2 GB.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import lfm2_fast
from lfm2_fast.__main__ import main
from lfm2_fast.export.errors import ExportError
from lfm2_fast.export.exporting import RECORD, export
from lfm2_fast.export.vendors import COREML, ONNX, OPENVINO, VENDORS
from lfm2_fast.text.tokenizer import TOKENIZER_FILES, load_tokenizer

PROMPT = "The database server"
CASES = [
    pytest.param(vendor.name, type, id=f"{vendor.name}-{type}")
    for vendor in (OPENVINO, ONNX, COREML)
    for type in vendor.types
]


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int | None)
    return ended.value.code or 0, *capsys.readouterr()


@pytest.mark.parametrize(("vendor", "type"), CASES)
def test_an_export_is_proven_and_writes_text(
    vendor: str, type: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "made"
    code, _, err = command(capsys, "export", vendor, tiny, folder, "--type", type)
    assert code == 0, err
    record = json.loads((folder / RECORD).read_text())
    assert record["proof"]["equal_tokens"] == 32 or type not in ("f32", "f16")
    assert ("static_shapes_error" in record["proof"]) == VENDORS[vendor].static
    if VENDORS[vendor].unproven is not None:
        assert (folder / "model.mlpackage" / "Manifest.json").is_file()
        assert record["not_proven"] == VENDORS[vendor].unproven
        return
    options = ("--raw", "--greedy", "--max-new-tokens", "24")
    code, out, err = command(capsys, "generate", folder, PROMPT, *options)
    assert code == 0, err
    if type == "f32":
        model = lfm2_fast.load(tiny, device="cpu", dtype="float32")
        tokenizer = load_tokenizer(str(tiny))
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids
        text = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert out == tokenizer.decode(text, skip_special_tokens=True) + "\n"
    code, _, err = command(capsys, "generate", folder, PROMPT, "--device", "npu")
    assert code == 2 and "no npu" in err.lower()


def test_a_head_that_the_builder_connects_wrongly_is_caught_and_mended(
    tiny: Path, tmp_path: Path, random_checkpoint: Callable[..., Path]
) -> None:
    # A feed-forward matrix with as many rows as the vocabulary is taken for the head.
    folder = random_checkpoint(vocab_size=4096, intermediate_size=4096)
    for file in TOKENIZER_FILES:
        if (tiny / file).is_file():
            shutil.copy(tiny / file, folder)
    unmended = replace(ONNX, commands=lambda *args: ONNX.commands(*args)[:1])
    notes: list[str] = []
    with pytest.raises(ExportError, match="token 0 of the prompt.*the first token is wrong"):
        export(unmended, str(folder), tmp_path / "unmended", "f32", note=notes.append)
    export(ONNX, str(folder), tmp_path / "mended", "f32", note=notes.append)
    assert any("layers.0" in note for note in notes if note.startswith("mended: "))
    assert not (tmp_path / "unmended").exists()
