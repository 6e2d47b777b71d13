"""Beam search against Hugging Face's on trained weights, in float32, and beams as forked rows."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast
from lfm2_fast.cache.page_memory import PageMemory
from lfm2_fast.engine.model_runner import ModelRunner
from tests.hf.page import same
from tests.hf.test_processors import NAMES, arguments

PROMPTS = ["The first argument", "If the optional parameter is not given, the default is", "A"]
WANTED = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


CASES: dict[str, dict[str, Any]] = {
    "plain": {"num_beams": 3, "max_new_tokens": 12},
    "several": {"num_beams": 4, "num_return_sequences": 3, "ends": True},
    "early": {"num_beams": 3, "num_return_sequences": 2, "early_stopping": True, "ends": True},
    "never": {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0, "ends": True},
    "short": {"num_beams": 3, "length_penalty": -1.5, "ends": True},
    "max_length": {"num_beams": 2, "max_length": 20, "ends": True},
    "min_new_tokens": {"num_beams": 2, "min_new_tokens": 9, "ends": True},
    "processors": {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "guidance": {"num_beams": 2, "guidance_scale": 1.5, "max_new_tokens": 8},
    "bias": {"num_beams": 2, "renormalize_logits": True, "sequence_bias": [[[300], 3.0]]},
    "sampled": {"num_beams": 3, "num_return_sequences": 3, "do_sample": True, "top_k": 20},
}


@pytest.mark.parametrize("case", CASES)
def test_beams_equal_hugging_faces(models, batch, ends, case: str) -> None:
    """Sequences, their scores, their beams, and the scores of each step are compared."""
    kwargs = {"max_new_tokens": 12, "do_sample": False, **CASES[case]}
    if kwargs.pop("ends", False):
        kwargs["eos_token_id"] = ends
    if "max_length" in kwargs:
        del kwargs["max_new_tokens"]
    found = []
    for model in models:
        torch.manual_seed(4)
        found.append(model.generate(**batch, **kwargs, **WANTED))
    theirs, ours = found
    assert type(ours) is type(theirs)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.beam_indices, theirs.beam_indices)
    assert same(ours.sequences_scores, theirs.sequences_scores)
    assert same(ours.logits, theirs.logits)
    for mine, other in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    parts = [
        model.compute_transition_scores(each.sequences, each.scores, each.beam_indices)
        for model, each in zip(models, found, strict=True)
    ]
    assert same(parts[1], parts[0])
    torch.manual_seed(4)
    assert torch.equal(models[1].generate(**batch, **kwargs), ours.sequences)


@pytest.mark.parametrize("name", NAMES)
def test_each_processor_does_with_beams_what_hugging_faces_does(models, batch, name: str) -> None:
    """The text and its beams are compared."""
    plain = models[1].generate(**batch, max_new_tokens=8, eos_token_id=None)
    new = plain[:, batch["input_ids"].shape[1] :].tolist()
    kwargs = {"max_new_tokens": 8, "num_beams": 2, "do_sample": False, **WANTED}
    kwargs |= arguments([*new, new[0]], batch)[name]
    if "max_length" in kwargs:
        del kwargs["max_new_tokens"]
    for part in {"negative_prompt_ids", "negative_prompt_attention_mask"} & kwargs.keys():
        kwargs[part] = kwargs[part].repeat_interleave(2, 0)
    theirs, ours = (model.generate(**batch, **kwargs) for model in models)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.beam_indices, theirs.beam_indices)
    assert same(ours.sequences_scores, theirs.sequences_scores)


def test_negative_prompts_are_of_all_rows(ours, batch) -> None:
    kwargs = {"guidance_scale": 2.0, "negative_prompt_ids": batch["input_ids"]}
    for more in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        with pytest.raises(ValueError, match="negative_prompt_ids has 3 rows, but 6 are written"):
            ours.generate(**batch, **kwargs, **more, max_new_tokens=2)


def test_criteria_and_stop_strings_end_beams(models, tokenizer, batch) -> None:
    def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return ids[:, -1] % 7 == 0

    kwargs = {"num_beams": 3, "max_new_tokens": 12, "do_sample": False, "num_return_sequences": 2}
    for more in ({"stopping_criteria": [stop]}, {"stop_strings": " the", "tokenizer": tokenizer}):
        theirs, ours = (model.generate(**batch, **kwargs, **more) for model in models)
        assert torch.equal(ours, theirs)


def test_allowed_tokens_are_asked_by_prompt(models, batch) -> None:
    def allowed(prompt: int, ids: torch.Tensor) -> list[int]:
        assert prompt < len(PROMPTS)
        return list(range(100 * prompt + 20, 100 * prompt + 60))

    kwargs = {"num_beams": 3, "max_new_tokens": 6, "prefix_allowed_tokens_fn": allowed}
    theirs, ours = (model.generate(**batch, **kwargs, do_sample=False) for model in models)
    assert torch.equal(ours, theirs)
    assert (ours[2, -6:] >= 220).all()


def test_seeds_repeat_and_differ(ours, batch) -> None:
    def sample(**kwargs: Any) -> torch.Tensor:
        return ours.generate(
            **batch, num_beams=3, do_sample=True, temperature=3.0, max_new_tokens=8, **kwargs
        )

    before = torch.get_rng_state()
    first = sample(seed=5)
    assert torch.equal(torch.get_rng_state(), before), "a seed leaves torch's generator alone"
    assert torch.equal(sample(seed=5), first)
    assert not torch.equal(sample(seed=6), first)
    made = [sample(generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*made) and not torch.equal(made[0], first)


def test_beams_continue_from_a_callers_cache(ours, tokenizer, monkeypatch) -> None:
    """The cache has a row for each beam. The part of a prompt in the first beam's row does not run
    again.
    """
    ids = tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    kwargs = {"num_beams": 3, "max_new_tokens": 6}
    whole = ours.generate(ids, **kwargs)
    cache, ran = ours.new_cache(3), []
    run = ModelRunner.prefill

    def counted(self: ModelRunner, prompts: Any, slots: Any) -> torch.Tensor:
        ran.extend(map(len, prompts))
        return run(self, prompts, slots)

    monkeypatch.setattr(ModelRunner, "prefill", counted)
    for new in (ids.shape[1], 1):
        assert torch.equal(ours.generate(ids, past_key_values=cache, **kwargs), whole)
        # Steps come this way too where none is captured, a token at a time.
        assert ran[0] == new and set(ran[1:]) <= {1}
        ran.clear()
    assert cache.lengths == [ids.shape[1] + 5] * 3
    assert all(cache.history[slot][: ids.shape[1]] == ids[0].tolist() for slot in range(3))
    ours(ids[:, :4].repeat(3, 1), past_key_values=(cache := ours.new_cache(3)))
    mask = torch.ones_like(ids)
    rest = ours.generate(ids[:, 4:], attention_mask=mask, past_key_values=cache, **kwargs)
    assert torch.equal(rest, whole[:, 4:])
    with pytest.raises(ValueError, match="holds 1 sequences, but 3 rows"):
        ours.generate(ids, past_key_values=ours.new_cache(1), **kwargs)


def test_beams_of_decided_prompts_cost_nothing(models, batch, ends, monkeypatch) -> None:
    """Unless the caller sees their steps; the answers are the same."""
    theirs, ours = models
    counts: list[int] = []
    step = ModelRunner.step

    def counted(self: ModelRunner, tokens: Any, slots: Any) -> torch.Tensor:
        counts.append(len(slots))
        return step(self, tokens, slots)

    monkeypatch.setattr(ModelRunner, "step", counted)
    kwargs = {"num_beams": 3, "max_new_tokens": 16, "eos_token_id": ends, "early_stopping": True}
    made = ours.generate(**batch, **kwargs)
    assert torch.equal(made, theirs.generate(**batch, **kwargs, do_sample=False))
    assert counts[0] == 9 and counts[-1] in (3, 6) and counts == sorted(counts, reverse=True)
    for watched in (
        {"stopping_criteria": [lambda ids, scores, **_: ids[:, -1] < 0]},
        {"logits_processor": [lambda ids, scores: scores]},
        {"past_key_values": ours.new_cache(9)},
        {"return_dict_in_generate": True, "output_scores": True},
    ):
        counts.clear()
        again = ours.generate(**batch, **kwargs, **watched)
        assert torch.equal(again if torch.is_tensor(again) else again.sequences, made)
        assert set(counts) == {9}


@pytest.mark.nightly
def test_any_arguments_give_what_hugging_face_gives(models, tiny: Path, tokenizer) -> None:
    """Prompts from the held-out text and arguments of beams and processors are random."""
    words, chance = (tiny / "heldout.txt").read_text(encoding="utf-8").split(), random.Random(3)
    for number in range(200):
        starts = [chance.randrange(3000) for _ in range(chance.randint(1, 3))]
        texts = [" ".join(words[s : s + chance.choice([1, 2, 5, 12, 70])]) for s in starts]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        kwargs: dict[str, Any] = {
            "max_new_tokens": chance.choice([3, 9, 17]),
            "num_beams": chance.choice([2, 3, 5]),
            "num_return_sequences": chance.choice([1, 2]),
            "early_stopping": chance.choice([False, True, "never"]),
            "length_penalty": chance.choice([1.0, 0.0, 2.0, -1.0]),
            "eos_token_id": chance.sample([7, 13, 278, 273, 300, 29, 27, 15], chance.randint(1, 3)),
            "do_sample": chance.random() < 0.25,
        }
        for name, value in {
            "repetition_penalty": 1.2,
            "no_repeat_ngram_size": 2,
            "min_new_tokens": 3,
            "renormalize_logits": True,
            "exponential_decay_length_penalty": (2, 1.3),
        }.items():
            if chance.random() < 0.25:
                kwargs[name] = value
        found = []
        for model in models:
            torch.manual_seed(number)
            found.append(model.generate(**batch, **kwargs))
        assert torch.equal(*found[::-1]), (texts, kwargs)


def test_beams_share_the_pages_of_their_prompt(ours, monkeypatch) -> None:
    """The full pages of a prompt exist once, and steps copy no full page."""
    copied = []
    copy = PageMemory.copy
    monkeypatch.setattr(
        PageMemory, "copy", lambda self, *where: (copied.append(where[2]), copy(self, *where))
    )
    ids = torch.arange(150)[None] % 90 + 5
    cache = ours.new_cache(4)
    ours.generate(ids, num_beams=4, max_new_tokens=8, past_key_values=cache)
    held = [cache.pages(slot) for slot in range(4)]
    assert all(pages[:2] == held[0][:2] for pages in held)
    assert len({pages[2] for pages in held}) == 4
    assert cache.pool.used == 2 + 4
    assert max(copied) < 64


def test_beams_on_every_backend_and_across_pages(tiny: Path, pair: Callable) -> None:
    """Texts cross into new pages while beams fork."""
    theirs, plain = pair(tiny, backend="eager")
    ids = torch.cat([torch.tensor([[1]]), torch.arange(58)[None] % 90 + 5], 1)
    kwargs = {"num_beams": 4, "max_new_tokens": 14, "num_return_sequences": 4, "do_sample": False}
    expected = theirs.generate(ids, **kwargs, eos_token_id=None)
    for model in (plain, lfm2_fast.load(tiny, device="cpu", dtype="float32")):
        assert torch.equal(model.generate(ids, **kwargs, eos_token_id=None), expected)


def test_hooks_on_layers_are_called_in_each_step(ours, batch) -> None:
    kwargs = {"num_beams": 2, "max_new_tokens": 5, "eos_token_id": None}
    expected, seen = ours.generate(**batch, **kwargs), []
    hook = ours.model.layers[2].register_forward_hook(lambda mod, args, out: seen.append(len(out)))
    try:
        assert torch.equal(ours.generate(**batch, **kwargs), expected)
    finally:
        hook.remove()
    assert seen == [int(batch["attention_mask"].sum()), *[6] * 4]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 0}, "num_beams must be a whole number of at least 1"),
        ({"num_beams": 2, "num_return_sequences": 3}, "=3 is more than num_beams=2"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping must be True, False or 'nev"),
        ({"num_beams": 2, "length_penalty": "long"}, "length_penalty must be a number"),
        ({"num_beams": 2, "num_beam_groups": 2}, "num_beam_groups=2 is not supported.*num_beams,"),
        ({"num_beams": 2, "constraints": [1]}, "constraints=.* is not supp.*prefix_allowed_tokens"),
        ({"num_beams": 2, "max_batch_size": 1}, "max_batch_size=1 is less than 6 rows.*num_beams"),
        ({"num_beams": 2, "max_new_tokens": 10**6}, "do not fit into the context"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_arguments_are_named(ours, batch, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.generate(**batch, **{"max_new_tokens": 2, **kwargs})


def test_a_streamer_cannot_follow_beams(ours, tokenizer) -> None:
    from transformers import TextStreamer

    with pytest.raises(ValueError, match="streamer cannot follow num_beams=2"):
        ours.generate([[1, 2]], num_beams=2, streamer=TextStreamer(tokenizer), max_new_tokens=2)


def test_settings_of_beams_without_beams_are_reported(ours) -> None:
    with pytest.warns(UserWarning, match="length_penalty=2.0 has no effect here"):
        ours.generate([[1, 2]], max_new_tokens=1, length_penalty=2.0)


def test_nan_scores_are_reported(breaking: Callable[..., Path], ours) -> None:
    """The error names the row without logits, or the prompt without a score."""
    broken = lfm2_fast.load(breaking(300), device="cpu", dtype="float32")
    with pytest.raises(lfm2_fast.LogitsError, match="^row 2 has no token.* new token 1, at pos"):
        broken.generate([[1, 40], [1, 300]], num_beams=2, max_new_tokens=3)
    cut = lambda ids, scores: scores.index_fill(0, torch.tensor([2, 3]), -torch.inf)  # noqa: E731
    with pytest.raises(lfm2_fast.LogitsError, match="^row 2 .*logits processors leave no token"):
        ours.generate([[1, 40], [1, 50]], num_beams=2, max_new_tokens=3, logits_processor=[cut])
