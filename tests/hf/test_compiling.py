"""torch.compile on the model: accepted, and without effect."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import lfm2_fast

IDS = torch.tensor([[1, 1639, 1084, 273, 573, 638, 27]])
ASK = {"max_new_tokens": 8, "eos_token_id": []}
# The compiler takes longer to import than three seconds.
pytestmark = pytest.mark.slow


@pytest.fixture(params=["eager", "auto"])
def model(request: pytest.FixtureRequest, tiny) -> Iterator[lfm2_fast.Lfm2ForCausalLM]:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield lfm2_fast.load(tiny, device="cpu", dtype="float32", backend=request.param)
    torch._dynamo.reset()


def graphs() -> int:
    """Return how many graphs torch.compile has made."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def whole(model: Any) -> tuple[Any, Any]:
    made = torch.compile(model)
    return made, made


def in_place(model: Any) -> tuple[Any, Any]:
    model.compile(fullgraph=True)
    return model, model


def forward_alone(model: Any) -> tuple[Any, Any]:
    return torch.compile(model.forward), model


def forward_set(model: Any) -> tuple[Any, Any]:
    model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    return model, model


def generate_set(model: Any) -> tuple[Any, Any]:
    model.generate = torch.compile(model.generate, fullgraph=True)
    return model, model


def generate_alone(model: Any) -> tuple[Any, Any]:
    class Caller:
        generate = staticmethod(torch.compile(model.generate))

    return model, Caller


def layers(model: Any) -> tuple[Any, Any]:
    model.network.compile()
    for layer in model.model.layers:
        layer.compile(fullgraph=True)
    return model, model


WAYS = (whole, in_place, forward_alone, forward_set, generate_set, generate_alone, layers)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_compiling_changes_nothing(model, way: Callable[[Any], tuple[Any, Any]]) -> None:
    logits, text = model(IDS).logits, model.generate(IDS, **ASK)
    caller, writer = way(model)
    for _ in range(2):
        assert torch.equal(caller(IDS).logits, logits)
        assert torch.equal(writer.generate(IDS, **ASK), text)
    assert graphs() == 0, "time went into compiling"


def test_the_model_without_head(model) -> None:
    expected = model.model(IDS).last_hidden_state
    assert torch.equal(torch.compile(model.model)(IDS).last_hidden_state, expected)
    assert graphs() == 0


def test_within_a_callers_compiled_code(model) -> None:
    expected = model(IDS).logits * 2

    @torch.compile(backend="eager")
    def doubled(ids: torch.Tensor) -> torch.Tensor:
        return model(ids).logits * 2

    assert torch.equal(doubled(IDS), expected)
    assert graphs() == 1, "the multiplication alone is the caller's"


@pytest.mark.parametrize("compiled", [lambda model: model, lambda model: model.forward])
def test_one_graph_of_all_is_refused_with_the_reason(model, compiled) -> None:
    with pytest.raises(Exception, match="lfm2_fast runs its own kernels: leave fullgraph=True out"):
        torch.compile(compiled(model), fullgraph=True)(IDS)


def test_hooks_are_followed_by_compiled_models_too(model) -> None:
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    model.model.layers[2].register_forward_hook(lambda mod, args, out: seen.append(len(out)))
    torch.compile(model, backend="eager")(IDS)
    assert sorted(seen) == [1, 7]


def test_methods_keep_their_signature_and_copies_their_own(model) -> None:
    assert "labels" in inspect.signature(model.forward).parameters
    model.forward = torch.compile(model.forward)
    copied = copy.deepcopy(model)
    assert copied.forward.__self__ is copied
