"""Real clients of Hugging Face's models, which load ours by themselves after ``register``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast
from bench import harness
from tests.adapters import IDS, make_adapter

PROMPTS = ["The first argument", "Return a list of the"]


def test_transformers_pipeline(tiny: Path, pair: Callable, caplog: Any) -> None:
    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(tiny, padding_side="left")
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


def test_an_assistant_of_the_pipeline_changes_no_text(tiny: Path) -> None:
    """The pipeline loads the assistant as transformers' class, of which ours is made."""
    from transformers import pipeline

    texts = []
    for named in ({}, {"assistant_model": str(tiny)}):
        model = lfm2_fast.load(tiny, device="cpu", dtype="float32")
        made = pipeline("text-generation", model=model, tokenizer=str(tiny), **named)
        texts.append(made("The database server", max_new_tokens=20, do_sample=False))
        assert (model.workspace._assistant is not None) == bool(named)
    assert texts[0] == texts[1]


def test_peft_gets_an_error_that_says_how_adapters_are_loaded(tiny: Path, tmp_path: Path) -> None:
    """Nothing is left half done, and the call that the message names gives PEFT's logits."""
    peft = pytest.importorskip("peft", reason="PEFT comes with the extra 'test'")
    made = make_adapter(tiny, tmp_path, target_modules=["q_proj", "out_proj"])
    model = lfm2_fast.load(tiny, device="cpu", dtype="float32")
    expected = model.generate([[1, 40, 41]], max_new_tokens=4)
    told = r"PEFT cannot change this model.*model\.load_adapter\("
    for names in (["q_proj", "v_proj"], ["out_proj"], "all-linear"):
        lora = peft.LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM")
        with pytest.raises(TypeError, match=told):
            peft.get_peft_model(model, lora)
    with pytest.raises(TypeError, match=told):
        peft.PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(model.generate([[1, 40, 41]], max_new_tokens=4), expected)
    model.load_adapter(tmp_path)
    made.check(model(IDS).logits)


def test_the_pipeline_loads_ours(tiny: Path, registered: None) -> None:
    from transformers import pipeline

    made = pipeline("text-generation", model=str(tiny), dtype=torch.float32)
    assert type(made.model) is lfm2_fast.Lfm2ForCausalLM
    (answer,) = made("The database server", max_new_tokens=5, do_sample=False)
    lfm2_fast.unregister()
    plain = pipeline("text-generation", model=str(tiny), dtype=torch.float32)
    assert [answer] == plain("The database server", max_new_tokens=5, do_sample=False)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_sentence_transformers_loads_ours(
    tiny: Path, registered: None, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of unequal lengths in one batch, the embedding taken from all tokens or the last."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    texts = [*PROMPTS, "A list.", "What does the with statement do when a file is opened twice?"]

    def embed() -> tuple[type, torch.Tensor]:
        inner = Transformer(str(tiny), model_kwargs={"dtype": torch.float32})
        pool = Pooling(inner.get_embedding_dimension(), pooling)
        client = SentenceTransformer(modules=[inner, pool], device="cpu")
        return type(inner.auto_model), client.encode(texts, convert_to_tensor=True)

    kind, ours = embed()
    assert kind is lfm2_fast.Lfm2Model
    lfm2_fast.unregister()
    kind, theirs = embed()
    assert kind.__module__.startswith("transformers.")
    assert ours.shape == theirs.shape == (len(texts), 192)
    error = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    assert error.max() < 1e-5
    assert (theirs[0] - theirs[1]).norm() > 0.1 * theirs[0].norm(), "all texts look alike"


@pytest.mark.nightly
def test_lm_evaluation_harness_loads_ours(
    tiny: Path, registered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of request, from a folder's name to the results, on questions of two rows."""
    lm_eval = pytest.importorskip(
        "lm_eval", reason="the extra 'eval' is not installed: make nightly installs it"
    )
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    from lm_eval.models.huggingface import HFLM

    questions = tmp_path / "questions.jsonl"
    rows = [
        {"question": q, "answer": a, "wrong": w}
        for q, a, w in zip(PROMPTS, (" is the name", " files"), (" tomato", " of"), strict=True)
    ]
    questions.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
    }
    until = {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}}
    choices = {"doc_to_choice": "{{[answer, wrong]}}", "doc_to_target": 0}
    tasks = [
        {**common, "task": "likelihood", "output_type": "loglikelihood"},
        {**common, "task": "rolling", "output_type": "loglikelihood_rolling"},
        {**common, "task": "choice", "output_type": "multiple_choice", **choices},
        {**common, "task": "writing", "output_type": "generate_until", **until},
    ]

    def evaluate() -> tuple[type, dict[str, list[Any]], dict[str, Any]]:
        harness = HFLM(pretrained=str(tiny), dtype="float32", device="cpu", batch_size=2)
        found = lm_eval.simple_evaluate(harness, tasks=tasks, bootstrap_iters=0, log_samples=True)
        answers = {
            task: [answer for each in samples for answer in each["filtered_resps"]]
            for task, samples in found["samples"].items()
        }
        return type(harness.model), answers, found["results"]

    kind, ours, results = evaluate()
    assert kind is lfm2_fast.Lfm2ForCausalLM
    lfm2_fast.unregister()
    kind, theirs, expected = evaluate()
    assert kind.__module__.startswith("transformers.")
    assert ours["writing"] == theirs["writing"] and all(map(len, ours["writing"]))
    assert results["choice"]["acc,none"] == expected["choice"]["acc,none"]
    for task, count in {"likelihood": 2, "choice": 4}.items():
        assert len(ours[task]) == len(theirs[task]) == count
        for (mine, greedy), (other, their_greedy) in zip(ours[task], theirs[task], strict=True):
            assert mine == pytest.approx(other, rel=2e-5) and greedy == their_greedy
    assert len(ours["rolling"]) == 2
    assert ours["rolling"] == pytest.approx(theirs["rolling"], rel=2e-5)


def test_the_harness_gave_the_numbers_of_transformers() -> None:
    """The numbers are those that ``python -m bench.harness`` saved."""
    found = json.loads(harness.OUT.read_text(encoding="utf-8"))
    assert found["protocol"]["rows"] == harness.ROWS
    compare_numbers(found["numbers"])


@pytest.mark.nightly
def test_the_harness_gives_the_numbers_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(
        "lm_eval", reason="the extra 'eval' is not installed: make nightly installs it"
    )
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    compare_numbers(harness.both(tmp_path, rows=6))


def compare_numbers(numbers: dict[str, dict[str, dict[str, float]]]) -> None:
    """Assert that both classes have the same tasks, and numbers as float32 is compared here."""
    ours, theirs = numbers["lfm2_fast"], numbers["transformers"]
    assert ours.keys() == theirs.keys() == {"likelihood", "rolling", "writing"}
    for task, told in theirs.items():
        assert ours[task].keys() == told.keys() and len(told) >= 2
        assert ours[task] == pytest.approx(told, rel=2e-5)
