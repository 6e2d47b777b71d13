"""Sampling of a checkpoint: by its name, by its own file, by options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lfm2_fast.hf.generation_args import resolve_args
from lfm2_fast.ops.sampling import SamplingParams
from lfm2_fast.text.presets import PRESETS, described, preset_of, sampling

NAMES = {
    "LiquidAI/LFM2-350M": "lfm2",
    "LiquidAI/LFM2-2.6B-Exp": "lfm2",
    "LiquidAI/LFM2-2.6B-Transcript": "lfm2",
    "LiquidAI/LFM2-8B-A1B": "lfm2",
    "LiquidAI/LFM2-350M-Extract": "greedy",
    "LiquidAI/LFM2-350M-PII-Extract-JP": "greedy",
    "LiquidAI/LFM2-350M-ENJP-MT": "greedy",
    "LiquidAI/LFM2-350M-Math": "lfm2-math",
    "LiquidAI/LFM2-1.2B-Tool": "greedy",
    "LiquidAI/LFM2-1.2B-RAG": "greedy",
    "LiquidAI/LFM2-VL-450M": "lfm2-vl",
    "LiquidAI/LFM2.5-350M": "lfm2.5",
    "LiquidAI/LFM2.5-350M-Base": "base",
    "LiquidAI/LFM2.5-1.2B-Instruct": "lfm2.5",
    "LiquidAI/LFM2.5-1.2B-Thinking": "lfm2.5-thinking",
    "LiquidAI/LFM2.5-1.2B-JP": "lfm2",
    "LiquidAI/LFM2.5-2.6B": "lfm2.5-large",
    "LiquidAI/LFM2.5-8B-A1B": "lfm2.5-large",
    "hub/models--LiquidAI--LFM2.5-1.2B-Instruct/snapshots/0123": "lfm2.5",
    "lfm2.5-1.2b-thinking/": "lfm2.5-thinking",
    "runs/lfm2-1.2b-mine/checkpoint-500": "lfm2",
    "lfm2_fast/tiny": None,
    "lfm2-fast/checkpoint-500": None,
    "meta-llama/Llama-3.2-1B": None,
}


@pytest.mark.parametrize(("name", "preset"), NAMES.items())
def test_names(name: str, preset: str | None) -> None:
    assert preset_of(name) == preset
    assert preset is None or preset in PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_override_the_files_arguments_of_generate(preset: str) -> None:
    file = {"do_sample": True, "temperature": 2.0, "top_k": 3, "top_p": 0.4, "min_p": 0.5}
    arguments, words = sampling("any", preset=preset, file=file)
    asked = resolve_args(arguments, None, file, vocab_size=10).sampling
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert asked.do_sample == (preset != "greedy")
    for name, value in {**neutral, "repetition_penalty": 1.0, **PRESETS[preset]}.items():
        assert getattr(asked, name) == value
    assert words.endswith(f"(preset {preset})")


@pytest.mark.parametrize(
    ("name", "file", "given", "words"),
    [
        pytest.param(
            "LFM2-1.2B",
            {"eos_token_id": 7},
            {"temperature": None},
            "temperature 0.3, min_p 0.15, repetition_penalty 1.05 (preset lfm2)",
            id="by-name",
        ),
        pytest.param("mine", {}, {}, "greedy (no preset fits the name)", id="no-name"),
        pytest.param(
            "LFM2-1.2B",
            {"do_sample": True, "temperature": 0.5},
            {},
            "temperature 0.5, top_k 50 (the checkpoint's generation_config.json)",
            id="file-over-name",
        ),
        pytest.param(
            "mine",
            {"temperature": 0.3, "top_k": 9, "min_p": 0.15},
            {},
            "greedy (the checkpoint's generation_config.json)",
            id="file-without-do-sample",
        ),
        pytest.param(
            "mine",
            {"temperature": 0.3, "top_k": 9, "min_p": 0.15},
            {"do_sample": True, "top_p": 0.9},
            "temperature 0.3, top_k 9, top_p 0.9, min_p 0.15 "
            "(the checkpoint's generation_config.json; changed by options)",
            id="option-over-file",
        ),
        pytest.param(
            "LFM2-1.2B",
            {},
            {"temperature": 0.7, "min_p": 0.0},
            "temperature 0.7, repetition_penalty 1.05 (preset lfm2; changed by options)",
            id="option-over-preset",
        ),
        pytest.param(
            "LFM2-1.2B",
            {},
            {"temperature": 0.0},
            "greedy, repetition_penalty 1.05 (preset lfm2; changed by options)",
            id="temperature-0-is-greedy",
        ),
        pytest.param(
            "mine", {}, {"top_k": 40}, "top_k 40 (as the options say)", id="a-filter-samples"
        ),
        pytest.param(
            "mine", {}, {"do_sample": True}, "temperature 1 (as the options say)", id="do-sample"
        ),
        pytest.param(
            "LFM2-1.2B-Tool",
            {},
            {"temperature": 0.2},
            "temperature 0.2 (preset greedy; changed by options)",
            id="greedy-overridden",
        ),
    ],
)
def test_sampling(name: str, file: dict[str, Any], given: dict[str, Any], words: str) -> None:
    arguments, said = sampling(name, file=file, given=given)
    assert said == words
    holds = resolve_args(arguments, None, file, vocab_size=10).sampling
    assert said.startswith(f"{described(holds)} (")


@pytest.mark.parametrize(
    ("preset", "given", "message"),
    [
        ("lfm3", {}, "there is no preset 'lfm3'; choose one of lfm2,"),
        (None, {"do_sample": False, "top_p": 0.9}, "top_p has no effect on greedy decoding"),
        (None, {"temperature": 0, "top_k": 4}, "top_k has no effect on greedy decoding"),
        (None, {"temperature": 0, "do_sample": True}, "temperature 0 is greedy decoding"),
    ],
)
def test_contradictions_are_named(preset: str | None, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampling("any", preset=preset, given=given)


def test_the_documentation_lists_the_presets() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "usage" / "generate.md"
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| `")]
    listed = {name.strip("| `"): values.strip("| ") for name, values, *_ in rows}
    assert listed == {
        name: described(SamplingParams(do_sample=bool(values), **values))
        for name, values in PRESETS.items()
    }
