"""Prompts of embeddings, hidden states of every step, and healed tokens: as Hugging Face's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

PROMPTS = ["The first argument", "If the optional parameter is not given, the", "A"]


def embedded(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    embeds = model.get_input_embeddings()(batch["input_ids"])
    return {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "length": {"max_new_tokens": None, "max_length": 22},
    "penalty": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "least": {"min_new_tokens": 9},
    "min_length": {"min_length": 20},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:Passing `")
def test_embeddings_write_what_hugging_face_writes(models, batch, ends, way: str) -> None:
    """The new tokens alone, or after the ids that were given beside the embeddings."""
    kwargs = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": ends, **WAYS[way]}
    for given in ({}, {"input_ids": batch["input_ids"]}, {"input_ids": batch["input_ids"][:, :2]}):
        found = [model.generate(**embedded(model, batch), **given, **kwargs) for model in models]
        assert torch.equal(*found[::-1]), given
    assert found[0].shape[1] > 2


def test_embeddings_write_what_their_ids_write(ours, batch) -> None:
    """Draws too: they stand at the same positions."""
    width = batch["input_ids"].shape[1]
    kwargs = {"max_new_tokens": 10, "do_sample": True, "top_k": 20, "seed": 3, "eos_token_id": None}
    expected = ours.generate(**batch, **kwargs)
    cache = ours.new_cache(3)
    found = ours.generate(**embedded(ours, batch), **kwargs, past_key_values=cache)
    assert torch.equal(found, expected[:, width:])
    lengths = (batch["attention_mask"].sum(1) + 9).tolist()
    assert cache.lengths == lengths and cache.history == [[], [], []]
    with pytest.raises(ValueError, match="past_key_values must be empty beside inputs_embeds"):
        ours.generate(**embedded(ours, batch), past_key_values=cache, max_new_tokens=2)
    several = ours.generate(**embedded(ours, batch), **kwargs, num_return_sequences=2)
    again = ours.generate(**batch, **kwargs, num_return_sequences=2)
    assert torch.equal(several, again[:, width:])


def test_wrong_embeddings_are_named(ours, batch) -> None:
    embeds = embedded(ours, batch)["inputs_embeds"]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"inputs_embeds": embeds[..., :5]}, r"numbers of shape \[batch, tokens, 192\]"),
        ({"inputs_embeds": embeds, "input_ids": [[1]]}, "inputs_embeds has 3 rows, input_ids 1"),
        (
            {"inputs_embeds": embeds, "attention_mask": torch.zeros(embeds.shape[:2])},
            "inputs_embeds row 0 has no tokens",
        ),
        ({"inputs_embeds": embeds, "max_batch_size": 1}, "1 is less than 3 rows.*inputs_embeds"),
        ({"inputs_embeds": embeds, "token_healing": True}, "token_healing cannot replace ids"),
        ({"inputs_embeds": embeds, "guidance_scale": 2.0}, "guidance_scale needs input_ids or"),
    ]
    for kwargs, message in wrong:
        with pytest.raises(ValueError, match=message):
            ours.generate(max_new_tokens=2, **kwargs)


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"num_beams": 2},
        {"embeds": True},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    ],
)
def test_hidden_states_equal_hugging_faces(models, batch, ends, way: dict[str, Any]) -> None:
    """All steps and layers are compared. Rows without a token have zeros."""
    kwargs = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": ends, **way}
    kwargs |= {"return_dict_in_generate": True, "output_hidden_states": True}
    by_embeds, found = kwargs.pop("embeds", False), []
    for model in models:
        given = embedded(model, batch) if by_embeds else batch
        found.append(model.generate(**given, **kwargs))
    theirs, ours = found
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.hidden_states) == len(theirs.hidden_states) > 5
    copies = kwargs.get("num_beams", kwargs.get("num_return_sequences", 1))
    prompt = batch["attention_mask"].bool().repeat_interleave(copies, 0)
    lived = torch.ones(len(prompt), 1, dtype=torch.bool)
    for step, (mine, other) in enumerate(
        zip(ours.hidden_states, theirs.hidden_states, strict=True)
    ):
        where = lived if step else prompt
        for layer, (a, b) in enumerate(zip(mine, other, strict=True)):
            assert a.shape == b.shape, (step, layer)
            torch.testing.assert_close(a[where], b[where], rtol=1e-4, atol=1e-4)
            assert not a[~where].any()
        if "num_beams" not in kwargs:
            new = ours.sequences[:, -len(ours.hidden_states) :][:, step]
            lived = lived & ~torch.isin(new, torch.tensor(ends))[:, None]
    assert "num_beams" in kwargs or not lived.all(), "no row stopped: the test shows nothing"


def test_hidden_states_change_no_draw_and_go_on_from_a_cache(ours, batch) -> None:
    kwargs = {"max_new_tokens": 6, "do_sample": True, "seed": 8, "return_dict_in_generate": True}
    plain = ours.generate(**batch, **kwargs)
    assert plain.hidden_states is None
    told = ours.generate(**batch, **kwargs, output_hidden_states=True)
    assert torch.equal(told.sequences, plain.sequences)
    more = torch.tensor([[50, 60]] * 3)
    whole = torch.cat([batch["input_ids"], more], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], 1)
    kwargs |= {"output_hidden_states": True, "attention_mask": mask}
    first = ours.generate(whole, **kwargs)
    cache = ours(**batch, use_cache=True).past_key_values
    rest = ours.generate(more, past_key_values=cache, **kwargs)
    assert torch.equal(rest.sequences, first.sequences[:, whole.shape[1] - 2 :])
    for a, b in zip(rest.hidden_states[0], first.hidden_states[0], strict=True):
        torch.testing.assert_close(a, b[:, -2:], rtol=1e-4, atol=1e-4)


def test_a_streamer_follows_steps(ours, tokenizer, batch) -> None:
    class Puts:
        def __init__(self) -> None:
            self.tokens: list[list[int]] = []
            self.ended = False

        def put(self, tokens: torch.Tensor) -> None:
            self.tokens.append(tokens.tolist())

        def end(self) -> None:
            self.ended = True

    streamer = Puts()
    made = ours.generate(**embedded(ours, batch), max_new_tokens=5, streamer=streamer)
    assert streamer.ended and torch.tensor(streamer.tokens[1:]).T.tolist() == made.tolist()


@pytest.mark.parametrize("texts", [["The with state"], ["The first argu", "Return a li"]])
def test_tokens_are_healed_as_hugging_face_does(models, tokenizer, texts: list[str]) -> None:
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    kwargs = {"token_healing": True, "tokenizer": tokenizer, "max_new_tokens": 8}
    theirs, ours = (model.generate(**batch, **kwargs, do_sample=False) for model in models)
    assert torch.equal(ours, theirs)
    plain = models[1].generate(**batch, max_new_tokens=8)
    assert ours.tolist() != plain.tolist()
    with pytest.raises(ValueError, match="token_healing needs the tokenizer"):
        models[1].generate(**batch, token_healing=True, max_new_tokens=2)
