"""Texts of an export: as the model writes them, through the command too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lfm2_fast.__main__ import main
from lfm2_fast.export.answering import open_export, read_record
from lfm2_fast.export.exporting import RECORD
from lfm2_fast.text.tokenizer import load_tokenizer
from tests.export.conftest import load_eager, logits_of

PROMPT = "The first argument"


@pytest.fixture(scope="module")
def make_export(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, str]]:
    """Writes an export that knows one text of the model, and returns it with that text."""

    def make(**arguments: object) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp("export")
        for file in tiny.iterdir():
            if file.suffix in (".json", ".jinja"):
                shutil.copy(file, folder)
        model, tokenizer = load_eager(tiny), load_tokenizer(str(tiny))
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids
        torch.manual_seed(4)
        text = model.generate(ids, max_new_tokens=12, **arguments)[0]
        np.savez(folder / "table.npz", ids=text.numpy(), logits=logits_of(model, text.tolist()))
        (folder / "openvino_model.xml").touch()
        (folder / RECORD).write_text(json.dumps({"runtime": "openvino", "type": "f32"}))
        new = text[ids.shape[1] :]
        return folder, tokenizer.decode(new, skip_special_tokens=True)

    return make


Drawn = {"do_sample": True, "temperature": 0.8, "top_k": 30, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({}, "--greedy"),
        (Drawn, "--temperature 0.8 --top-k 30 --repetition-penalty 1.1 --seed 4"),
    ],
    ids=["greedy", "drawn"],
)
def test_the_command_writes_the_models_text(
    make_export: Callable[..., tuple[Path, str]],
    environment: Path,
    arguments: dict[str, object],
    options: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, text = make_export(**arguments)
    given = [f"--environment={environment}", "--max-new-tokens=12", "--raw", *options.split()]
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(folder), PROMPT, *given])
    out, err = capsys.readouterr()
    assert not ended.value.code, err
    assert out == text + "\n"
    assert "f32 weights, on Stand-in CPU with openvino" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--device npu", "OpenVINO finds CPU here, and no NPU"),
        ("--device cuda", "device='cuda' does not run an export; use auto, cpu, gpu, npu"),
        ("--dtype bfloat16", "--dtype has no effect on an export"),
        ("--max-length 9000", "max_length=9000 is not from 1 to 2048"),
    ],
)
def test_wrong_options_say_what_was_found(
    make_export: Callable[..., tuple[Path, str]],
    environment: Path,
    options: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = make_export()
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(folder), "hi", f"--environment={environment}", *options.split()])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_limits_end_a_text(make_export: Callable[..., tuple[Path, str]], environment: Path) -> None:
    folder, text = make_export()
    record = read_record(str(folder))
    assert record is not None and read_record(str(folder.parent)) is None
    opened = open_export(str(folder), record, max_length=9, environment=environment, note=print)
    ids = opened.tokenizer(PROMPT).input_ids
    with opened.runtime:
        arguments = {"max_new_tokens": 12, "arguments": {}}
        answer = opened.stream_answer(ids, print, **arguments)
        assert answer.end == "the context is full" and text.startswith(answer.text)
        assert answer.timing.tokens == 9 - len(ids)
        word = text.split()[0]
        answer = opened.stream_answer(
            ids, print, max_new_tokens=12, arguments={"stop_strings": [word]}
        )
        assert answer.text.endswith(word) and not answer.end
        answer = opened.stream_answer(ids, print, stopped=lambda: True, **arguments)
        assert answer.stopped and answer.timing.tokens == 1
        with pytest.raises(ValueError, match="10 tokens fill the context of 9"):
            opened.stream_answer([1] * 10, print, **arguments)


def test_a_static_shape_has_room_for_half_a_prompt(
    make_export: Callable[..., tuple[Path, str]],
    environment: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A longer prompt is refused before the runtime sees it, and the remedy it names works."""
    monkeypatch.setenv("STAND_IN_DEVICES", "CPU NPU")
    folder, text = make_export()
    record = read_record(str(folder))
    assert record is not None
    ids = load_tokenizer(str(folder))(PROMPT).input_ids
    for length, fits in ((2 * len(ids) - 1, False), (2 * len(ids), True)):
        options = {"max_length": length, "environment": environment, "note": print}
        opened = open_export(str(folder), record, device="npu", **options)
        with opened.runtime:
            assert opened.runtime.facts["device"] == "Stand-in NPU"
            if fits:
                answer = opened.stream_answer(ids, print, max_new_tokens=2, arguments={})
                assert text.startswith(answer.text) and answer.timing.tokens == 2
                continue
            told = f"prompt has {len(ids)} tokens.* room for {length // 2} .*max_length={length}"
            with pytest.raises(ValueError, match=f"{told}.*--max-length {2 * len(ids)}, or"):
                opened.stream_answer(ids, print, max_new_tokens=2, arguments={})
