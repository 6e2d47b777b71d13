"""The tables of docs/usage/huggingface.md against transformers' own classes and our code.

A name that is new in the installed transformers or torch turns a test red: it must be added there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast
from lfm2_fast.hf import forward, load_args
from lfm2_fast.hf.surface import REFUSED_NAMES
from tests.hf.page import keywords_read, names, parameters, table

LOAD, FORWARD, SAVE = "`from_pretrained`", "`forward`", "`save_pretrained`"
METHODS, TORCH = "Methods and attributes", "Methods of torch's `Module`"


def load_arguments(*kinds: Any) -> set[str]:
    """Names that the classes' ``from_pretrained`` take, by name or out of ``**kwargs``."""
    functions = [kind.from_pretrained.__func__ for kind in kinds]
    return set().union(*(parameters(f) | keywords_read(f) for f in functions)) - {"cls"}


def forward_arguments(*kinds: Any) -> set[str]:
    """Names that the classes' ``forward`` take, and those that ``**kwargs`` hand on."""
    from transformers.utils import TransformersKwargs

    found = {*TransformersKwargs.__annotations__, "return_dict"}
    for kind in kinds:
        found |= parameters(kind.forward)
        found |= {f"output_{name}" for name in kind._can_record_outputs}
    loss = parameters(kinds[0](tiny_config()).loss_function)
    return found | loss - {"logits", "vocab_size"}


def tiny_config() -> Any:
    from transformers import Lfm2Config

    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return Lfm2Config(**sizes, num_attention_heads=1, num_key_value_heads=1)


def save_arguments(kind: Any) -> set[str]:
    return parameters(kind.save_pretrained) | keywords_read(kind.save_pretrained)


def public_names(model: Any) -> set[str]:
    """Names of the class and of what its ``__init__`` sets, but for those of torch's Module."""
    theirs = {name for name in dir(model) if not name.startswith("_")}
    return theirs - (set(dir(torch.nn.Module())) - {"forward"})


def test_every_argument_of_theirs_is_listed() -> None:
    from transformers import AutoModelForCausalLM, Lfm2ForCausalLM, Lfm2Model

    # "proxies" and others are read by the Auto classes alone.
    assert load_arguments(Lfm2ForCausalLM, AutoModelForCausalLM) <= table(LOAD).keys()
    assert forward_arguments(Lfm2ForCausalLM, Lfm2Model) <= table(FORWARD).keys()
    assert save_arguments(Lfm2ForCausalLM) <= table(SAVE).keys()


def test_every_public_name_of_theirs_is_listed() -> None:
    from transformers import Lfm2ForCausalLM

    model = Lfm2ForCausalLM(tiny_config())
    listed = table(METHODS).keys() | table(TORCH).keys()
    assert public_names(model) <= listed and public_names(model.model) <= listed
    # transformers puts a method of its own there.
    of_torch = {name for name in dir(torch.nn.Module()) if not name.startswith("_")}
    of_torch -= {"smart_apply"}
    assert of_torch == table(TORCH).keys() and not table(METHODS).keys() & of_torch - {"forward"}


def test_new_names_in_transformers_would_be_noticed() -> None:
    """Each way in which an argument or a name can come is tried with one more of them."""
    from transformers import Lfm2ForCausalLM

    class Newer(Lfm2ForCausalLM):
        new_attribute = 1
        _can_record_outputs = {**Lfm2ForCausalLM._can_record_outputs, "new_states": None}

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.new_of_instance = 1

        @classmethod
        def from_pretrained(cls, *args: Any, new_named: int = 1, **kwargs: Any) -> Any:
            listed = ["new_listed"]
            kept = {name: kwargs.pop(name) for name in listed if name in kwargs}
            for name in ("new_looped",):
                kwargs.pop(name, None)
            if "new_tested" in kwargs or kwargs.get("new_got") or kwargs["new_indexed"]:
                return kwargs.pop("new_popped"), kept

        def forward(self, input_ids: Any = None, new_input: Any = None, **kwargs: Any) -> Any:
            return None

        def save_pretrained(self, folder: Any, new_option: Any = None, **kwargs: Any) -> Any:
            return kwargs.pop("new_pushed")

        def new_method(self) -> None:
            return None

    ways = ("named", "listed", "looped", "tested", "got", "indexed", "popped")
    assert load_arguments(Newer) == {"args", "kwargs", *(f"new_{way}" for way in ways)}
    assert {"new_input", "output_new_states"} == forward_arguments(Newer) - table(FORWARD).keys()
    assert {"new_option", "new_pushed"} < save_arguments(Newer)
    new = public_names(Newer(tiny_config())) - table(METHODS).keys()
    assert new == {"new_attribute", "new_of_instance", "new_method"}

    def unreadable(**kwargs: Any) -> Any:
        return [kwargs.pop(name) for name in sorted(kwargs)]

    with pytest.raises(AssertionError, match="a name unknown here"):
        keywords_read(unreadable)


@pytest.mark.parametrize(
    ("title", "accepted", "refused"),
    [
        (LOAD, load_args.ACCEPTED, {k: why for k, (_, why) in load_args.REFUSED.items()}),
        (SAVE, load_args.SAVE_ACCEPTED, {k: why for k, (_, why) in load_args.SAVE_REFUSED.items()}),
        (FORWARD, forward.NO_EFFECT, {"output_attentions": forward.NO_ATTENTIONS}),
        (METHODS, {}, REFUSED_NAMES),
    ],
    ids=["load", "save", "forward", "methods"],
)
def test_the_page_says_what_the_messages_say(
    title: str, accepted: dict[str, str], refused: dict[str, str]
) -> None:
    """Other refused names are not arguments of the calls."""
    told = table(title)
    for name, why in accepted.items():
        assert told[name] == ("accepted", f"no effect here: {why}"), name
    for name, why in refused.items():
        assert told[name] == ("refused", why), name
    beside = {"model_args", "kwargs", "push_to_hub"} - refused.keys()
    assert names(title, "refused") - beside == refused.keys()
    if title != METHODS:
        assert names(title, "accepted") == accepted.keys()
    assert {word for word, _ in told.values()} <= {"same", "accepted", "refused"}


def positional(function: Callable[..., Any]) -> list[inspect.Parameter]:
    found = inspect.signature(inspect.unwrap(function)).parameters.values()
    return [each for each in found if each.kind is each.POSITIONAL_OR_KEYWORD]


def test_arguments_by_position_are_theirs_with_their_defaults() -> None:
    import transformers

    for kind in ("Lfm2ForCausalLM", "Lfm2Model"):
        theirs, ours = getattr(transformers, kind), getattr(lfm2_fast, kind)
        for method in ("forward", "save_pretrained"):
            their_list = positional(getattr(theirs, method))
            mine = positional(getattr(ours, method))
            assert len(mine) > 6
            for mine_, their in zip(mine, their_list, strict=False):
                assert (mine_.name, mine_.default) == (their.name, their.default)
            assert len(mine) <= len(their_list)


def test_refused_arguments_raise_errors_with_a_remedy(tiny: Path) -> None:
    model = lfm2_fast.load(tiny, device="cpu")
    for name, advice in REFUSED_NAMES.items():
        for each in (model, model.model):
            with pytest.raises(AttributeError) as raised:
                getattr(each, name)
            assert str(raised.value) == f"{name} is not supported by lfm2_fast: {advice}"
    with pytest.raises(AttributeError, match="'Lfm2ForCausalLM' object has no attribute 'laod'"):
        _ = model.laod
