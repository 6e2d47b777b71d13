"""generate_batch(): the same texts as generate(), in order, for any number of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import lfm2_fast
from lfm2_fast.engine.engine import Engine
from lfm2_fast.hf import generate_batch as module

PROMPTS = ["The first argument", "Return a list of", "If the parameter is not given, the", "A"] * 5


@pytest.fixture(scope="module")
def rows(tokenizer) -> list[list[int]]:
    return tokenizer(PROMPTS).input_ids


def written(ours: Any, prompt: list[int], **kwargs: Any) -> list[int]:
    return ours.generate([prompt], **kwargs)[0, len(prompt) :].tolist()


def test_every_form_of_prompt_is_answered_in_order(ours, tokenizer, rows) -> None:
    expected = [written(ours, row, max_new_tokens=6) for row in rows[:4]]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected]
    padded = tokenizer(PROMPTS[:4], return_tensors="pt", padding=True)
    mappings = [{"prompt": row, "max_new_tokens": 6} for row in rows[:4]]
    for form in (rows[:4], map(torch.tensor, rows[:4]), iter(PROMPTS[:4]), padded, mappings):
        found = list(
            lfm2_fast.generate_batch(
                ours, form, tokenizer=tokenizer, max_batch_size=3, max_new_tokens=6
            )
        )
        assert [each.tokens for each in found] == expected
        assert [each.index for each in found] == [0, 1, 2, 3]
        assert [each.prompt for each in found] == rows[:4]
        assert [each.text for each in found] == texts
    conversation = [{"role": "user", "content": "What is a list?"}]
    (answer,) = lfm2_fast.generate_batch(
        ours, [conversation], tokenizer=tokenizer, max_new_tokens=9
    )
    ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
    assert answer.prompt == ids and answer.tokens == written(ours, ids, max_new_tokens=9)
    assert answer.finish_reason in ("stop", "length")
    (bare,) = lfm2_fast.generate_batch(ours, [[1, 2]], max_new_tokens=1)
    with pytest.raises(ValueError, match="there is no text: pass tokenizer="):
        _ = bare.text


def test_draws_are_those_of_one_call_of_generate(ours, rows) -> None:
    kwargs = {"do_sample": True, "top_k": 30, "max_new_tokens": 6, "seed": 5}
    whole = ours.generate(rows, **kwargs, num_return_sequences=2)
    found = list(
        lfm2_fast.generate_batch(ours, rows, max_batch_size=4, num_return_sequences=2, **kwargs)
    )
    made = [tokens for each in found for tokens in each.sequences]
    width = max(map(len, rows))
    for tokens, row in zip(made, whole[:, width:].tolist(), strict=True):
        assert tokens == row[: len(tokens)]
    own = [rows[0], {"prompt": rows[1], "seed": 9}, rows[1]]
    found = list(lfm2_fast.generate_batch(ours, own, **kwargs))
    alone = written(ours, rows[1], **{**kwargs, "seed": 9})
    assert found[1].tokens == alone[: len(found[1].tokens)]
    two = ours.generate(rows[:2], **kwargs)[1, max(map(len, rows[:2])) :].tolist()
    assert found[2].tokens == two[: len(found[2].tokens)] != found[1].tokens


SETTINGS: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": 3},
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
    {"suppress_tokens": [40, 300]},
    {"do_sample": True, "temperature": 0.7, "min_p": 0.1, "seed": 3},
    {"seed": None},
    {"do_sample": True, "top_k": 9, "typical_p": 0.9, "seed": 3},
    {"stop_strings": [" the"]},
    {"min_new_tokens": 7, "eos_token_id": [300, 273, 262]},
    {"min_length": 12, "eos_token_id": [300, 273, 262]},
    {"generation_config": {"repetition_penalty": 1.7}, "max_new_tokens": 4},
    {"logits_processor": [lambda ids, scores: scores.flip(-1)]},
]


def test_each_prompt_has_settings_of_its_own(ours, tokenizer, rows) -> None:
    """Beside others with other settings, each is written as alone."""
    items = [{"prompt": rows[i], **own} for i, own in enumerate(SETTINGS)]
    found = list(
        lfm2_fast.generate_batch(
            ours, items, tokenizer=tokenizer, max_batch_size=5, max_new_tokens=9
        )
    )
    for each, row, own in zip(found, rows, SETTINGS, strict=False):
        kwargs = {"max_new_tokens": 9, **own}
        if "stop_strings" in own:
            kwargs["tokenizer"] = tokenizer
        assert each.tokens == written(ours, row, **kwargs), own
    assert len(found[1].tokens) == 3 and len(found[11].tokens) == 4
    assert found[8].finish_reason == "stop"


def test_memory_does_not_grow_with_the_prompts(ours, rows, monkeypatch) -> None:
    """Prompts are read as they are needed, answers are handed out, pages are used again."""
    engines: list[Engine] = []

    class Kept(Engine):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "pages": 12})
            engines.append(self)

    monkeypatch.setattr(module, "Engine", Kept)
    read = 0

    def prompts() -> Iterator[list[int]]:
        nonlocal read
        for number in range(120):
            read += 1
            yield [1, *[(number * 7 + i) % 900 + 20 for i in range(70)]]

    ahead, pages = [], []
    answers = lfm2_fast.generate_batch(ours, prompts(), max_batch_size=4, max_new_tokens=2)
    for given, each in enumerate(answers):
        assert each.index == given
        ahead.append(read - given)
        pages.append(engines[0].cache.pool.memory.count)
    assert read == len(ahead) == 120
    assert max(ahead) <= module.AHEAD * 4 + 1
    assert max(pages) <= 12
    assert not engines[0].rows


def test_prompts_that_begin_alike_share_pages(ours, monkeypatch) -> None:
    made: list[Engine] = []
    init = Engine.__init__

    def kept(self: Engine, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(Engine, "__init__", kept)
    common = [i % 900 + 20 for i in range(130)]
    rows = [[*common, 30 + i] for i in range(6)]
    found = list(lfm2_fast.generate_batch(ours, rows, max_batch_size=2, max_new_tokens=3))
    assert made[0].statistics.prefix_hits >= 4 * 128
    assert [each.tokens for each in found] == [written(ours, r, max_new_tokens=3) for r in rows]


def test_a_reader_that_stops_ends_all(ours, rows, monkeypatch) -> None:
    closed = []
    monkeypatch.setattr(Engine, "close", lambda self: closed.append(self))
    answers = lfm2_fast.generate_batch(ours, rows, max_new_tokens=4)
    next(answers)
    answers.close()
    assert len(closed) == 1


WRONG: list[tuple[Any, str]] = [
    ("a text", "a text needs the tokenizer"),
    ([{"role": "user", "content": "a"}], "a conversation needs the tokenizer"),
    (3, "not int"),
    (b"text", "not bytes"),
    ([], "prompt has no tokens"),
    ([1, 10**7], "token 10000000 is not in this model's vocabulary"),
    ([1, 2.5], "must be token ids, got 2.5 among them"),
    (torch.zeros(2, 2).long(), r"token ids \[T\], got \(2, 2\)"),
    ({"input_ids": [1]}, "a mapping needs a 'prompt', got .'input_ids'."),
    ({"prompt": [1], "num_beams": 2}, "num_beams is not supported for one prompt: call generate"),
    ({"prompt": [1], "output_hidden_states": True}, "output_hidden_states is not supported for"),
    ({"prompt": [1], "token_healing": True}, "token_healing is not supported for one prompt"),
    ({"prompt": [1], "inputs_embeds": 1}, "inputs_embeds is not supported for one prompt"),
    ({"prompt": [1], "temperature": -1.0, "do_sample": True}, "temperature must be above 0"),
    ({"prompt": [1], "max_new_tokens": 10**7}, "10000000 new ones do not fit into"),
    ({"prompt": [1], "nonsense": 1}, "unexpected keyword argument 'nonsense'"),
    ({"prompt": [1], "stop_strings": "a"}, "stop_strings needs the tokenizer"),
    ({"prompt": [1], "seed": -1}, "seed must be from 0"),
]


def test_a_wrong_prompt_raises_at_its_turn_or_is_reported(ours, rows) -> None:
    for item, message in WRONG:
        answers = lfm2_fast.generate_batch(ours, [rows[0], item, rows[1]], max_new_tokens=2)
        assert next(answers).tokens
        with pytest.raises((ValueError, TypeError), match=f"^prompt 1: .*{message}"):
            next(answers)
    items = [rows[0], *(item for item, _ in WRONG), rows[1]]
    found = list(lfm2_fast.generate_batch(ours, items, errors="return", max_new_tokens=2))
    assert len(found) == len(WRONG) + 2
    assert [each.error is None for each in found] == [True, *[False] * len(WRONG), True]
    assert found[-1].tokens == written(ours, rows[1], max_new_tokens=2)


def test_a_prompt_that_breaks_leaves_the_others(breaking) -> None:
    broken = lfm2_fast.load(breaking(300), device="cpu", dtype="float32")
    items = [[1, 40], [1, 300], [1, 50]]
    found = list(lfm2_fast.generate_batch(broken, items, errors="return", max_new_tokens=2))
    assert [type(each.error) for each in found] == [type(None), lfm2_fast.LogitsError, type(None)]
    answers = lfm2_fast.generate_batch(broken, items, max_new_tokens=2)
    assert next(answers).index == 0
    with pytest.raises(lfm2_fast.LogitsError, match="row 1 has no token"):
        next(answers)


def test_arguments_wrong_for_all_prompts_raise_at_once(ours, tokenizer) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"max_batch_size": 0}, "max_batch_size must be at least 1"),
        ({"errors": "ignore"}, "errors must be 'raise' or 'return'"),
        ({"num_beams": 2}, "num_beams is not supported by generate_batch"),
        ({"streamer": object()}, "streamer is not supported by generate_batch"),
        ({"generation_config": {"num_beams": 2}}, "^num_beams of generation_config is not supp"),
        ({"generation_config": {"token_healing": True}}, "^token_healing of generation_config"),
        ({"output_hidden_states": True}, "output_hidden_states is not supported by generate_batch"),
        ({"generation_config": {"guidance_scale": 2.0}}, "guidance_scale of generation_config"),
        ({"top_k": -1}, "top_k must be a whole number"),
    ]
    for kwargs, message in wrong:
        with pytest.raises(ValueError, match=message):
            lfm2_fast.generate_batch(ours, [[1]], **kwargs)
    with pytest.raises(ValueError, match="got one text: put it into a list"):
        lfm2_fast.generate_batch(ours, "a text", tokenizer=tokenizer)
    with pytest.raises(TypeError, match=r"takes a model of lfm2_fast.load\(\), not Lfm2Model"):
        lfm2_fast.generate_batch(ours.model, [[1]])
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        lfm2_fast.generate_batch(ours, [[1]], nonsense=1)


def test_progress_is_shown_on_a_terminal(ours, monkeypatch) -> None:
    bars: list[Any] = []

    class Bar:
        def __init__(self, total: int | None) -> None:
            self.total, self.count, self.closed = total, 0, False
            bars.append(self)

        def update(self) -> None:
            self.count += 1

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(module, "progress_bar", Bar)
    list(lfm2_fast.generate_batch(ours, [[1], [2]], max_new_tokens=1))
    list(lfm2_fast.generate_batch(ours, iter([[1]]), max_new_tokens=1))
    list(lfm2_fast.generate_batch(ours, [[1]], max_new_tokens=1, progress=False))
    assert [(bar.total, bar.count, bar.closed) for bar in bars] == [(2, 2, True), (None, 1, True)]
