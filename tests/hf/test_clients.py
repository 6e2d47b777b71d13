"""Real clients of Hugging Face's models, given ours."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["The first argument", "Return a list of the"]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny, padding_side="left")


def test_transformers_pipeline(tiny: Path, tokenizer: Any, pair: Callable, caplog: Any) -> None:
    from transformers import pipeline

    theirs, ours = pair(tiny)
    conversation = [{"role": "user", "content": "What is a list?"}]
    answers = []
    with caplog.at_level(logging.WARNING):
        for model in (ours, theirs):
            client = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
            kwargs = {"max_new_tokens": 16, "do_sample": False}
            answers.append(
                (
                    client(PROMPTS, batch_size=2, **kwargs),
                    client(conversation, **kwargs),
                    client(PROMPTS[0], return_full_text=False, **kwargs),
                )
            )
    assert answers[0] == answers[1]
    assert answers[0][0][0][0]["generated_text"].startswith(PROMPTS[0])
    assert answers[0][1][0]["generated_text"][-1]["role"] == "assistant"
    assert "is not supported for text-generation" not in caplog.text


def test_lm_evaluation_harness(
    tiny: Path, tokenizer: Any, pair: Callable, tmp_path: Path, monkeypatch: Any
) -> None:
    """Both kinds of request, likelihoods and generation, through its Hugging Face wrapper."""
    lm_eval = pytest.importorskip(
        "lm_eval", reason="the harness is not installed: pip install 'lfm2-fast[eval]'"
    )
    from lm_eval.models.huggingface import HFLM

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    questions = tmp_path / "questions.jsonl"
    pairs = zip(PROMPTS, (" is the name", " files"), strict=True)
    lines = (json.dumps({"question": q, "answer": a}) for q, a in pairs)
    questions.write_text("\n".join(lines))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
    }
    tasks = [
        {"task": "likelihood", "output_type": "loglikelihood", **common},
        {
            "task": "writing",
            "output_type": "generate_until",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
            **common,
        },
    ]

    def answers(model: Any) -> dict[str, list[Any]]:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
        results = lm_eval.simple_evaluate(wrapped, tasks=tasks, bootstrap_iters=0, log_samples=True)
        return {
            task: [sample["resps"][0][0] for sample in samples]
            for task, samples in results["samples"].items()
        }

    theirs, ours = map(answers, pair(tiny))
    assert ours["writing"] == theirs["writing"]
    for mine, other in zip(ours["likelihood"], theirs["likelihood"], strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-3) and mine[1] == other[1]


def test_the_readmes_example_runs(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = readme.partition("```python\n")[2].partition("```")[0]
    for old, new in (("LiquidAI/LFM2-1.2B", tiny.as_posix()), ("=512", "=8")):
        assert old in code
        code = code.replace(old, new)
    exec(code, {})
    assert "What is C. elegans?<|im_end|>" in capsys.readouterr().out
