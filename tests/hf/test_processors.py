"""Arguments that are logits processors: token for token as Hugging Face, in float32."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch

PROMPTS = ["The first argument", "Return a list of", "A", "If the optional parameter is"]


@pytest.fixture(scope="module")
def plain(models, batch) -> list[list[int]]:
    """Return the text of greedy decoding without any argument."""
    made = models[0].generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=None)
    return made[:, batch["input_ids"].shape[1] :].tolist()


def arguments(plain: list[list[int]], batch: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Each argument with a value that changes the text; token ids are those that would come."""
    from transformers import WatermarkingConfig

    width = batch["input_ids"].shape[1]
    first, second = plain[0][0], plain[1][1]
    return {
        "min_length": {"min_length": width + 8, "eos_token_id": [second, plain[2][3]]},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
        "bad_words_ids": {"bad_words_ids": [[first], plain[1][1:3]]},
        "suppress_tokens": {"suppress_tokens": [second, plain[3][2]]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [first, plain[2][0]]},
        "sequence_bias": {"sequence_bias": {(first,): -9.0, tuple(plain[1][:2]): 4.0}},
        "exponential_decay_length_penalty": {
            "exponential_decay_length_penalty": (3, 1.6),
            "eos_token_id": [7, 9],
        },
        "renormalize_logits": {"renormalize_logits": True},
        "remove_invalid_values": {"remove_invalid_values": True},
        "forced_bos_token_id": {"forced_bos_token_id": 77},
        "forced_eos_token_id": {"forced_eos_token_id": 7, "max_length": width + 9},
        "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
        "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
        "guidance_scale": {"guidance_scale": 1.7},
        "negative_prompt_ids": {
            "guidance_scale": 2.5,
            "negative_prompt_ids": batch["input_ids"].flip(0),
            "negative_prompt_attention_mask": batch["attention_mask"].flip(0),
        },
        "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=6.0)},
        "prefix_allowed_tokens_fn": {
            "prefix_allowed_tokens_fn": lambda row, ids: [5 + row, 90 + len(ids) % 7, 40]
        },
        "repetition_penalty": {"repetition_penalty": 1.4},
        "min_new_tokens": {"min_new_tokens": 7, "eos_token_id": [second]},
    }


NAMES = [
    "min_length", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "sequence_bias", "exponential_decay_length_penalty",
    "renormalize_logits", "remove_invalid_values", "forced_bos_token_id", "forced_eos_token_id",
    "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "guidance_scale",
    "negative_prompt_ids", "watermarking_config", "prefix_allowed_tokens_fn", "repetition_penalty",
    "min_new_tokens",
]  # fmt: skip
# These change no text where nothing else asks for it.
QUIET = {"renormalize_logits", "remove_invalid_values", "forced_bos_token_id"}


def written(model: Any, batch: dict[str, torch.Tensor], kwargs: dict[str, Any]) -> torch.Tensor:
    given = {"max_new_tokens": 12, "eos_token_id": None, **kwargs}
    if "max_length" in given:
        del given["max_new_tokens"]
    if model.__class__.__module__.startswith("transformers") and given["eos_token_id"] is None:
        given["eos_token_id"] = -1
    return model.generate(**batch, do_sample=False, **given)


@pytest.mark.parametrize("name", NAMES)
def test_each_writes_what_hugging_face_writes(models, batch, plain, name: str) -> None:
    kwargs = arguments(plain, batch)[name]
    theirs, ours = (written(model, batch, kwargs) for model in models)
    assert torch.equal(ours, theirs)
    if name not in QUIET:
        without = written(models[1], batch, {})
        assert ours.shape != without.shape or not torch.equal(ours, without)


def test_a_first_token_is_forced_after_a_prompt_of_one(models) -> None:
    kwargs = {"forced_bos_token_id": 77, "suppress_tokens": [5], "max_new_tokens": 4}
    theirs, ours = (m.generate(torch.tensor([[1]]), do_sample=False, **kwargs) for m in models)
    assert torch.equal(ours, theirs) and ours[0, 1] == 77


def write_pairs(
    models: Any, batch: Any, given: dict[str, dict[str, Any]], pairs: Any, count: int
) -> None:
    """Assert that pairs that do not ask for opposite things write what theirs write."""
    alone = {"guidance_scale", "negative_prompt_ids"}
    for one, other in pairs:
        kwargs = {"max_new_tokens": count, **given[one], **given[other]}
        if {one, other} == alone or set(given[one]) & set(given[other]) or "max_length" in kwargs:
            continue
        theirs, ours = (written(model, batch, kwargs) for model in models)
        assert torch.equal(ours, theirs), (one, other)


@pytest.mark.slow
def test_neighbours_write_what_hugging_face_writes(models, batch, plain) -> None:
    """Each argument beside the next one of the list, and beside the one after that."""
    pairs = [(one, NAMES[i - by]) for i, one in enumerate(NAMES) for by in (1, 2)]
    write_pairs(models, batch, arguments(plain, batch), pairs, 5)


@pytest.mark.nightly
def test_pairs_write_what_hugging_face_writes(models, batch, plain) -> None:
    pairs = itertools.combinations(NAMES, 2)
    write_pairs(models, batch, arguments(plain, batch), pairs, 12)


@pytest.mark.parametrize(
    "kwargs",
    [{"typical_p": 0.4}, {"epsilon_cutoff": 0.02}, {"eta_cutoff": 0.05}, {"top_h": 0.4},
     {"typical_p": 0.6, "top_k": 9, "temperature": 0.7, "renormalize_logits": True}],
    ids=str,
)  # fmt: skip
def test_filters_of_draws_keep_the_tokens_that_hugging_face_keeps(models, batch, kwargs) -> None:
    shown = {"output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 3}
    theirs, ours = (
        model.generate(**batch, do_sample=True, **{"top_k": 0, **kwargs}, **shown)
        for model in models
    )
    torch.testing.assert_close(ours.scores[0], theirs.scores[0], rtol=1e-4, atol=1e-4)
    assert ours.scores[0].isinf().any()
    width = batch["input_ids"].shape[1]
    for step, scores in enumerate(ours.scores):
        drawn = scores.gather(1, ours.sequences[:, width + step, None])
        assert drawn.isfinite().all()


def test_time_ends_a_text(models, batch) -> None:
    begin = time.perf_counter()
    made = models[1].generate(**batch, max_new_tokens=2000, max_time=0.2, eos_token_id=None)
    assert time.perf_counter() - begin < 10
    assert 0 < made.shape[1] - batch["input_ids"].shape[1] < 2000


def test_wrong_values_are_named(models, batch) -> None:
    for kwargs, message in (
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size must be a whole number of at least 0"),
        ({"min_length": 1.5}, "min_length must be a whole number of at least 0"),
        ({"bad_words_ids": []}, "bad_words_ids"),
        ({"sequence_bias": {}}, "sequence_bias"),
        ({"max_time": 0}, "max_time must be above 0"),
        ({"no_repeat_ngram_size": 2, "max_batch_size": 1}, "need all rows at a time"),
    ):
        with pytest.raises(ValueError, match=message):
            models[1].generate(**batch, max_new_tokens=2, **kwargs)
