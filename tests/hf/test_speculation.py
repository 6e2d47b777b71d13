"""Drafts in generate: transformers' arguments, and the texts that are written without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lfm2_fast
from lfm2_fast.engine.draft_length import StepCosts
from lfm2_fast.engine.prompt_lookup import PromptLookup
from lfm2_fast.engine.speculation import Speculation
from tests.batches import text

PROMPTS = [text(30) * 2, text(17, 2) * 3, text(5, 3)]


@pytest.fixture(scope="module")
def model(tiny) -> lfm2_fast.Lfm2ForCausalLM:
    return lfm2_fast.load(tiny, device="cpu", dtype="float32")


@pytest.fixture
def made(monkeypatch) -> list[Speculation]:
    """Each Speculation of the test. Drafts are made at any cost, and lookups always."""
    found: list[Speculation] = []
    begin = Speculation.__init__

    def noted(self: Speculation, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        found.append(self)

    monkeypatch.setattr(Speculation, "__init__", noted)
    monkeypatch.setattr(PromptLookup, "find", lambda self: (len(self._text) // 2, 4))
    monkeypatch.setattr(StepCosts, "of", lambda self, tokens: 1.0 + 0.01 * tokens)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True, "seed": 3, "top_k": 5, "num_return_sequences": 2},
        {"repetition_penalty": 1.2, "min_new_tokens": 9, "eos_token_id": [5, 9]},
        {"max_batch_size": 2},
    ],
    ids=["greedy", "drawn", "penalty", "queue"],
)
def test_texts_are_those_without_drafts(model, made, settings: dict[str, Any]) -> None:
    plain = model.generate(PROMPTS, max_new_tokens=24, **settings)
    assert not made[0].drafted
    for drafts in (
        {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 3},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": model},
    ):
        made.clear()
        found = model.generate(PROMPTS, max_new_tokens=24, **settings, **drafts)
        assert torch.equal(found, plain)
        assert made[0].drafted > 10
        assert made[0].accepted > (20 if "assistant_model" in drafts else -1)


def test_each_prompt_of_a_batch_may_have_its_own(model, made) -> None:
    plain = [each.tokens for each in lfm2_fast.generate_batch(model, PROMPTS, max_new_tokens=20)]
    made.clear()
    given = [{"prompt": each, "prompt_lookup_num_tokens": 4} for each in PROMPTS[:2]]
    found = lfm2_fast.generate_batch(model, [*given, PROMPTS[2]], max_new_tokens=20)
    assert [each.tokens for each in found] == plain and made[0].drafted


def test_callers_python_sees_each_step_of_the_text(model, made) -> None:
    """Criteria and processors run between plain steps, so that they see no draft."""
    lengths: list[int] = []

    def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        lengths.append(ids.shape[1])
        return torch.zeros(len(ids), dtype=torch.bool)

    model.generate(
        [PROMPTS[0]], max_new_tokens=8, stopping_criteria=[stop], prompt_lookup_num_tokens=5
    )
    assert lengths == list(range(61, 69)) and not made
