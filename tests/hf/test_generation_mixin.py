"""Another transformers than those known: a clear error where its private methods are needed."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationMixin

from lfm2_fast.hf.generation_mixin import KNOWN, METHODS

NEED = {"num_beams": {"num_beams": 2}, "logits processors of arguments": {"min_length": 3}}


def generate(ours: Any, user: str) -> torch.Tensor:
    return ours.generate([[1, 40]], max_new_tokens=2, **NEED[user])


def test_the_installed_version_is_known() -> None:
    assert transformers.__version__ in KNOWN


@pytest.mark.parametrize("user", METHODS)
def test_methods_that_are_gone_or_take_other_parameters(ours, user: str) -> None:
    for name, parameters in METHODS[user].items():
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(GenerationMixin, name)
            with pytest.raises(RuntimeError, match=f"has no {name}: .*run on transf.*; install tr"):
                generate(ours, user)
        if parameters:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(GenerationMixin, name, lambda self, ids: None)
                with pytest.raises(RuntimeError, match=f"{name} takes no {parameters[0]}: {user}"):
                    generate(ours, user)
    assert generate(ours, user).shape == (1, 4)
    assert ours.generate([[1, 40]], max_new_tokens=2).shape == (1, 4)


def test_a_new_requirement_of_transformers_is_an_error(ours, monkeypatch) -> None:
    known = GenerationMixin._beam_search

    def newer(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._begin_beams(args)
        return known(self, *args, **kwargs)

    newer.__signature__ = inspect.signature(known)  # type: ignore[attr-defined]
    monkeypatch.setattr(GenerationMixin, "_beam_search", newer)
    with pytest.raises(AttributeError, match="asks its model for _begin_beams: num_beams cannot"):
        generate(ours, "num_beams")
