"""``forward`` against Hugging Face's, for every argument and pairs of them, in float32."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast

IDS = torch.randint(8, 307, (3, 11), generator=torch.Generator().manual_seed(3))
LEFT = torch.ones(3, 11, dtype=torch.int64)
LEFT[1, :4] = 0
RIGHT = LEFT.flip(1)
SHIFTED = (LEFT.cumsum(-1) - 1).clamp(min=0)


# Not with conv_bias: in Hugging Face's class the bias of in_proj then leaks out of left padding.
@pytest.fixture(scope="module", params=[{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
def models(request, random_checkpoint, pair) -> tuple[Any, lfm2_fast.Lfm2ForCausalLM]:
    return pair(random_checkpoint(**request.param))


def same(ours: torch.Tensor, theirs: torch.Tensor, shown: torch.Tensor | None = None) -> None:
    """Equal within 2e-5 of the largest, at the tokens that ``shown [B, T]`` marks."""
    assert ours.shape == theirs.shape
    if shown is not None:
        ours, theirs = ours[shown], theirs[shown]
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < 2e-5, f"relative error {error:.1e}"


def labels() -> torch.Tensor:
    found = IDS.clone()
    found[0, 3:6] = -100
    return found


# Each names arguments for both classes; "embeds" replaces the ids by their rows.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "embeds": {"embeds": True},
    "left padding": {"attention_mask": LEFT},
    "right padding": {"attention_mask": RIGHT},
    "positions": {"position_ids": torch.arange(11)[None]},
    "positions of the mask": {"attention_mask": LEFT, "position_ids": SHIFTED},
    "labels": {"labels": labels()},
    "labels of more batches": {"labels": labels(), "num_items_in_batch": 77},
    "last two": {"logits_to_keep": 2},
    "columns": {"logits_to_keep": torch.tensor([1, 4, 10])},
    "hidden states": {"output_hidden_states": True},
    "no cache": {"use_cache": False},
    "tuple": {"return_dict": False},
}
PAIRS = [
    (a, b)
    for a, b in itertools.combinations_with_replacement(ARGUMENTS, 2)
    if not any(
        name in ARGUMENTS[b] and ARGUMENTS[a][name] is not ARGUMENTS[b][name]
        for name in ARGUMENTS[a]
    )
    and not {"labels", "logits_to_keep"} <= {*ARGUMENTS[a], *ARGUMENTS[b]}
]


@pytest.mark.parametrize("names", PAIRS, ids=" and ".join)
def test_arguments_mean_what_hugging_faces_do(models, names: tuple[str, str]) -> None:
    arguments = {**ARGUMENTS[names[0]], **ARGUMENTS[names[1]]}
    answers = []
    for model in models:
        given = {k: v for k, v in arguments.items() if k != "embeds"}
        if "embeds" in arguments:
            given["inputs_embeds"] = model.get_input_embeddings()(IDS).detach()
        else:
            given["input_ids"] = IDS
        with torch.no_grad():
            answers.append(model(**given))
    theirs, ours = answers
    if arguments.get("return_dict") is False:
        assert isinstance(ours, tuple) and len(ours) == len(theirs)
        return
    assert list(ours) == list(theirs)
    mask = arguments.get("attention_mask", torch.ones_like(IDS)).bool()
    keep = arguments.get("logits_to_keep", 0)
    columns = keep if isinstance(keep, torch.Tensor) else torch.arange(11)[-keep:]
    same(ours.logits, theirs.logits, mask[:, columns])
    if "labels" in arguments and bool(mask.all()):
        assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=2e-5)
    if arguments.get("output_hidden_states"):
        assert len(ours.hidden_states) == len(theirs.hidden_states)
        for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            same(a, b, mask)


@pytest.mark.parametrize("tokens", [1, 11], ids=["few", "many"])
def test_the_base_model_gives_hidden_states(models, tokens: int) -> None:
    """The base model is ``.model`` of the whole model, or its own class."""
    theirs, ours = models
    ids = IDS[:, :tokens]
    with torch.no_grad():
        expected = theirs.model(ids, output_hidden_states=True)
    alone = lfm2_fast.Lfm2Model.from_pretrained(ours.name_or_path, dtype="float32")
    for model in (ours.model, alone):
        found = model(ids, output_hidden_states=True)
        same(found.last_hidden_state, expected.last_hidden_state)
        assert list(found) == list(expected)
        assert found.hidden_states[-1] is not None
        same(found.hidden_states[2], expected.hidden_states[2])
        assert found.past_key_values.get_seq_length() == tokens
    assert alone.get_output_embeddings() is None


def test_packed_rows_are_the_sequences_alone(models) -> None:
    """Packing is by restarting positions, also of several rows, and by ``cu_seq_lens_q``."""
    _, ours = models
    parts = [IDS[:1, :4], IDS[:1, 4:5], IDS[:1, 5:]]
    expected = torch.cat([ours(part).logits for part in parts], 1)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    bounds = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    for given in (
        {"position_ids": positions},
        {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 6, "max_length_k": 6},
    ):
        found = ours(IDS[:1], **given)
        same(found.logits, expected)
        assert found.past_key_values is None
    both = torch.cat([positions, torch.arange(11)[None]])
    found = ours(IDS[:2], position_ids=both).logits
    same(found, torch.cat([expected, ours(IDS[1:2]).logits]))


def test_a_cache_goes_on_at_the_positions_that_follow(models) -> None:
    theirs, ours = models
    with torch.no_grad():
        expected = theirs(IDS).logits[:, 6:]
    cache = ours(IDS[:, :6]).past_key_values
    found = ours(IDS[:, 6:], past_key_values=cache, position_ids=torch.arange(6, 11)[None])
    same(found.logits, expected)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({}, "exactly one of input_ids and inputs_embeds"),
    "both": ({"input_ids": IDS, "inputs_embeds": torch.zeros(3, 11, 96)}, "exactly one"),
    "embeds": ({"inputs_embeds": torch.zeros(3, 11, 95)}, r"inputs_embeds must .* 96\]"),
    "positions": ({"input_ids": IDS, "position_ids": 2 * torch.arange(11)[None]}, "position_ids"),
    "late": ({"input_ids": IDS, "position_ids": 5 + torch.arange(11)[None]}, "position_ids"),
    "shape": ({"input_ids": IDS, "position_ids": torch.arange(10)[None]}, "position_ids has shape"),
    "bounds": ({"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([0, 4])}, "cu_seq_lens_q"),
    "rows": ({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 11])}, "a single row|3 rows"),
    "attentions": ({"input_ids": IDS, "output_attentions": True}, "output_attentions=True"),
    "labels": ({"input_ids": IDS, "labels": IDS, "logits_to_keep": 1}, "logits_to_keep"),
    "not causal": ({"input_ids": IDS, "is_causal": False}, "is_causal"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG.keys())
def test_impossible_arguments_are_named(models, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models[1](**given)


def test_an_unknown_argument_is_named(models) -> None:
    with pytest.raises(TypeError, match="'attention_maks'"):
        models[1](IDS, attention_maks=LEFT)


def test_packed_rows_take_no_cache(models) -> None:
    _, ours = models
    bounds = torch.tensor([0, 4, 11])
    with pytest.raises(ValueError, match="neither attention_mask nor past_key_values"):
        ours(IDS[:1], cu_seq_lens_q=bounds, past_key_values=ours.new_cache(2))


def test_training_is_refused_with_what_to_do(tiny: Path, pair: Callable[..., Any]) -> None:
    _, ours = pair(tiny)
    assert ours.eval() is ours and not ours.training
    with pytest.raises(RuntimeError, match="for inference"):
        ours.train()
    loss = ours(IDS[:, :5] % 300 + 8, labels=IDS[:, :5] % 300 + 8).loss
    with pytest.raises(RuntimeError, match=r"backward\(\).*for inference"):
        loss.backward()
    with torch.no_grad():
        assert not ours(IDS[:, :5], labels=IDS[:, :5]).loss.requires_grad
