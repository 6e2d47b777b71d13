"""GGUF files of llama.cpp's own tools: logits and tokens are llama.cpp's within its rounding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.cpu import gguf_llama, gguf_loss, llama_build
from bench.cpu.gguf_llama import OUT, Found, compare, files_of, prompts_of, wrong

RIGHT = Found({}, 1.0, 1.0, 1.0, 1.0, 1.0, [48], [], 1.0)


def test_rules_are_broken_by_what_rounding_does_not_explain() -> None:
    assert wrong(RIGHT) is None
    for change, words in (
        ({"ours": 1.3}, "an error is more than 1.2 times 1"),
        ({"llama": 1.3}, "an error is more than 1.2 times 1"),
        ({"apart": 1.8}, "1.8 apart, more than their errors"),
        ({"gaps": [0.1, -1.1]}, "whose logits are 1.1 apart"),
    ):
        assert words in (wrong(Found(**{**vars(RIGHT), **change})) or "")


def test_committed_results_keep_the_rules() -> None:
    found = json.loads(OUT.read_text(encoding="utf-8"))
    assert found["files"]["real"].keys() == set(gguf_llama.KINDS)
    for shape, kinds in found["files"].items():
        for kind, numbers in kinds.items():
            assert wrong(Found(**numbers)) is None, (shape, kind)


def test_committed_loss_of_4_bits_is_llama_cpps() -> None:
    kinds = json.loads(gguf_loss.OUT.read_text(encoding="utf-8"))["kinds"]
    ours, theirs = kinds["ours, float32 beside"], kinds["llama.cpp's Q4_0, run by it"]
    assert ours["kl"] <= theirs["kl"] + theirs["kl_error"]
    assert ours["loss"] <= 1.025 * ours["reference_loss"]
    assert ours["loss"] <= 1.02 * theirs["loss"]


@pytest.mark.nightly
@pytest.mark.skipif(not llama_build.built(), reason="`make peers` has not built llama.cpp here")
@pytest.mark.parametrize("shape", ["real", "random"])
def test_logits_are_llama_cpps_within_its_rounding(tiny: Path, tmp_path: Path, shape: str) -> None:
    torch.set_num_threads(1)
    folder = tiny if shape == "real" else gguf_llama.random_checkpoint(tmp_path / "random")
    made = tmp_path / "made"
    made.mkdir()
    prompts = prompts_of(folder)
    for kind, path in files_of(folder, made, gguf_llama.KEPT):
        found = compare(path, prompts)
        assert wrong(found) is None, kind
        if kind in ("F16", "BF16"):
            # llama.cpp rounds activations. Where its token is another, the exact one is ours.
            assert min(found.gaps, default=1.0) > 0, kind
        if (shape, kind) == ("real", "F16"):
            assert found.written == [gguf_llama.WRITTEN] * gguf_llama.PROMPTS
