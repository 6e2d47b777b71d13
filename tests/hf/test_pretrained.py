"""Copies of models, deep and pickled: the same answers, and nothing in common with the model."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lfm2_fast
from lfm2_fast.ops.select import why_not

IDS = torch.tensor([[1, 1639, 1084, 273, 573, 638, 27]])


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": saved,
    "twice": lambda model: copy.deepcopy(saved(model)),
}


def answers(model: Any) -> list[torch.Tensor]:
    if isinstance(model, lfm2_fast.Lfm2Model):
        return [model(IDS).last_hidden_state]
    found = model.model(IDS).last_hidden_state, model(IDS).logits
    return [*found, model.generate(IDS, max_new_tokens=4, eos_token_id=[])]


CASES = [
    *((name, "native", lfm2_fast.Lfm2ForCausalLM, None) for name in COPIES),
    ("twice", "eager", lfm2_fast.Lfm2ForCausalLM, "int8"),
    ("twice", "eager", lfm2_fast.Lfm2Model, None),
    ("twice", "native", lfm2_fast.Lfm2Model, "int8"),
]


@pytest.mark.parametrize(("way", "backend", "kind", "quantization"), CASES)
def test_a_copy_answers_as_the_model(tiny, way, backend, kind, quantization) -> None:
    if lacking := why_not(backend, torch.device("cpu"), torch.float32):
        pytest.skip(lacking)
    model = kind.from_pretrained(tiny, dtype="float32", backend=backend, quantization=quantization)
    expected = answers(model)
    made = COPIES[way](model)
    assert type(made) is kind and made.ops.name == backend
    assert made.num_parameters() == model.num_parameters()
    assert made.get_memory_footprint() == model.get_memory_footprint(), "the head has its own"
    assert all(map(torch.equal, answers(made), expected))
    with torch.no_grad():
        for parameter in made.network.parameters():
            parameter.zero_()
    assert not answers(made)[0].any()
    assert all(map(torch.equal, answers(model), expected)), "the model changed with its copy"


def test_a_copy_has_its_own_tied_head(tiny) -> None:
    model = lfm2_fast.load(tiny, device="cpu")
    assert model.model is not None  # made once, and copied with the model
    made = copy.deepcopy(model)
    assert made.network.lm_head.weight is made.network.embed_tokens.weight
    assert made.model.network is made.network and made.model is not model.model


def test_a_copy_takes_no_cache_that_waits(tiny) -> None:
    model = lfm2_fast.load(tiny, device="cpu", backend="eager")
    model.workspace._idle = [model.new_cache(1)]
    for copied in COPIES.values():
        assert len(copied(model).workspace) == 0
    assert len(model.workspace) == 1


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:overflow")
def test_a_copy_of_a_model_with_kernels(random_checkpoint, quick_interpreter) -> None:
    """The operations keep counters by cache, which a copy cannot have."""
    if why_not("triton", torch.device("cpu"), torch.float32):
        pytest.skip("Triton's interpreter is off")
    kinds = ["conv", "full_attention"]
    folder = random_checkpoint(num_hidden_layers=2, layer_types=kinds, num_attention_heads=2)
    model = lfm2_fast.load(folder, device="cpu", dtype="float32", backend="triton")
    ids = torch.tensor([[1, 40, 41]])
    expected = model.generate(ids, max_new_tokens=2, eos_token_id=[])
    made = COPIES["twice"](model)
    assert made.ops.name == "triton" and made.ops is not model.ops
    assert torch.equal(made.generate(ids, max_new_tokens=2, eos_token_id=[]), expected)
