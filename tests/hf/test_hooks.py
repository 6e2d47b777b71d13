"""Hooks on the classes that people call, and on the layers by Hugging Face's names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lfm2_fast
from lfm2_fast import HookError
from lfm2_fast.ops.select import why_not

IDS = torch.tensor([[1, 1639, 1084, 273, 573, 638, 27]])
ASK = {"max_new_tokens": 10, "eos_token_id": [], "do_sample": False}


@pytest.fixture(scope="module", params=["eager", "native"])
def models(request: pytest.FixtureRequest, tiny, pair) -> tuple[Any, lfm2_fast.Lfm2ForCausalLM]:
    if lacking := why_not(request.param, torch.device("cpu"), torch.float32):
        pytest.skip(lacking)
    return pair(tiny, backend=request.param)


@pytest.fixture(scope="module")
def ours(models) -> lfm2_fast.Lfm2ForCausalLM:
    return models[1]


def steered(model: Any, run: Callable[[Any], torch.Tensor]) -> tuple[torch.Tensor, list[float]]:
    """Run with hooks that read a layer on the host, and replace the inputs or outputs of two."""
    seen: list[float] = []
    layers = model.model.layers
    handles = [
        layers[1].register_forward_hook(lambda mod, args, out: out * 1.3),
        layers[3].register_forward_hook(lambda mod, args, out: seen.append(float(out.norm()))),
        layers[4].register_forward_pre_hook(lambda mod, args: args[0] * 0.7),
        layers[5].register_forward_pre_hook(lambda mod, args: (args[0] + 0.1,)),
    ]
    try:
        with torch.no_grad():
            return run(model), seen
    finally:
        for handle in handles:
            handle.remove()


def test_layer_hooks_do_what_hugging_faces_do(models) -> None:
    """The prompt calls the hooks once, and so does every step."""
    plain = models[1].generate(IDS, **ASK)
    (theirs, their_norms), (ours, our_norms) = (
        steered(model, lambda model: model.generate(IDS, **ASK)) for model in models
    )
    assert torch.equal(ours, theirs) and not torch.equal(ours, plain)
    assert len(our_norms) == 10
    torch.testing.assert_close(our_norms, their_norms, rtol=1e-4, atol=1e-4)
    assert torch.equal(models[1].generate(IDS, **ASK), plain)


@pytest.mark.parametrize("outside", [False, True], ids=["alone", "with a processor"])
def test_layer_hooks_see_each_row_of_a_batch(ours, outside: bool) -> None:
    """A hook sees the tokens of all rows in sequence, later those of the live rows only."""
    prompts = [[1, 40, 41, 42], [1, 50], [1, 60, 61]]
    written = ours.generate(prompts, **ASK)[:, 4:]
    ends = [int(written[0, 2]), int(written[1, 6])]
    ask = {**ASK, "eos_token_id": ends}
    if outside:
        ask["logits_processor"] = [lambda ids, scores: scores * 1.0]
    expected = ours.generate(prompts, **ask)
    seen: list[int] = []
    handle = ours.model.layers[0].register_forward_hook(
        lambda mod, args, out: seen.append(len(out))
    )
    try:
        assert torch.equal(ours.generate(prompts, **ask), expected)
    finally:
        handle.remove()
    rows = expected[:, 4:]
    lengths = []
    for row in rows.tolist():
        at = [step for step, token in enumerate(row) if token in ends]
        lengths.append(at[0] + 1 if at else len(row))
    # A row's last token is chosen, and not run.
    steps = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert seen == [9, *steps]


def test_layer_hooks_in_forward(models) -> None:
    (theirs, _), (ours, seen) = (
        steered(model, lambda model: model(IDS).logits) for model in models
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(seen) == 1 and not torch.equal(models[1](IDS).logits, ours)


def test_the_layers_go_by_hugging_faces_names(ours) -> None:
    assert ours.model is ours.model and ours.model.layers is ours.network.layers
    assert ours.get_submodule("model.layers.3") is ours.network.layers[3]
    assert ours.model.embed_tokens is ours.get_input_embeddings()
    assert ours.model.embedding_norm is ours.network.embedding_norm


def test_hooks_on_the_model_are_called_by_forward_and_refused_by_generate(ours) -> None:
    seen: list[Any] = []
    handle = ours.register_forward_hook(lambda mod, args, out: seen.append(out.logits.shape))
    try:
        ours(IDS)
        with pytest.raises(HookError, match="forward hook or a forward of its own, which generate"):
            ours.generate(IDS)
    finally:
        handle.remove()
    assert seen == [(1, 7, ours.config.vocab_size)]
    ours.generate(IDS, max_new_tokens=1)


def test_a_forward_that_was_set_is_called_by_forward_and_refused_by_generate(ours) -> None:
    """accelerate's hooks do this; they restore the old forward at the end."""
    before, calls = ours.forward, []

    @functools.wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return before(*args, **kwargs)

    ours.forward = forward
    try:
        ours(IDS)
        with pytest.raises(HookError, match="a forward of its own, which generate"):
            ours.generate(IDS)
    finally:
        ours.forward = before
    assert calls == [1]
    ours.generate(IDS, max_new_tokens=1)
    assert "forward" not in ours.__dict__


def test_hooks_on_the_model_without_head_are_called_by_itself_alone(ours) -> None:
    seen: list[Any] = []
    handle = ours.model.register_forward_hook(lambda mod, args, out: seen.append(1))
    try:
        ours.model(IDS)
        assert seen == [1]
        for call in (ours, ours.generate):
            with pytest.raises(HookError, match=r"^model\.model has a hook"):
                call(IDS)
    finally:
        handle.remove()
    ours(IDS)


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("way", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_are_refused(ours, base: bool, way: str) -> None:
    handle = getattr(ours.model if base else ours, way)(lambda *_: None)
    try:
        for call in (ours.forward, ours.generate):
            with pytest.raises(HookError):
                call(IDS)
    finally:
        handle.remove()


def test_hooks_stay_when_the_vocabulary_grows(tiny) -> None:
    model = lfm2_fast.load(tiny, device="cpu", dtype="float32")
    seen: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    model.resize_token_embeddings(model.network.config.vocab_size + 3)
    model(IDS)
    assert seen == [1]


@pytest.mark.parametrize("name", ["lm_head", "model", "layers", "embed_tokens", "embedding_norm"])
def test_parts_that_a_property_shows_cannot_be_set(ours, name: str) -> None:
    owner = ours if name in ("lm_head", "model") else ours.model
    with pytest.raises(AttributeError, match=f"^{name} cannot be replaced"):
        setattr(owner, name, nn.ModuleList())
    owner.value_head = nn.Linear(2, 2)
    assert isinstance(owner._modules.pop("value_head"), nn.Linear)
