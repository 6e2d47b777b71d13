"""Criteria of transformers' own classes, which take the place of arguments as in its generate()."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

PROMPTS = ["The first argument", "Return a list of"]


@pytest.mark.parametrize("beams", [1, 2])
def test_a_criterion_that_is_passed_replaces_its_argument(
    models, tokenizer, batch, ends, beams: int
) -> None:
    """Shorter or longer texts, other ends."""
    width = batch["input_ids"].shape[1]
    # Of beams, transformers keeps room for the argument's tokens alone.
    length = MaxLengthCriteria(width + (24 if beams == 1 else 4))
    cases: list[dict[str, Any]] = [
        {"stopping_criteria": [length], "eos_token_id": None},
        {"stopping_criteria": [EosTokenCriteria(ends)], "max_new_tokens": 9},
        {"stopping_criteria": [StopStringCriteria(tokenizer, [" a"])], "stop_strings": " the"},
        {"stopping_criteria": [MaxTimeCriteria(1e9)], "max_time": 1e-9, "max_new_tokens": 5},
    ]
    for kwargs in cases:
        kwargs |= {"do_sample": False, "num_beams": beams}
        if "stop_strings" in kwargs:
            kwargs["tokenizer"] = tokenizer
        expected = models[0].generate(**batch, **kwargs)
        assert torch.equal(models[1].generate(**batch, **kwargs), expected), kwargs


def test_of_several_lengths_the_shortest_counts(models, batch) -> None:
    width = batch["input_ids"].shape[1]
    criteria = [MaxLengthCriteria(width + 9), MaxLengthCriteria(width + 7)]
    kwargs = {"stopping_criteria": criteria, "max_new_tokens": 3, "eos_token_id": None}
    expected = models[0].generate(**batch, **kwargs, do_sample=False)
    with pytest.warns(UserWarning, match="MaxLengthCriteria .* replaces max_new_tokens"):
        found = models[1].generate(**batch, **kwargs)
    assert torch.equal(found, expected) and found.shape[1] == width + 7


def test_a_wrong_list_of_callables_is_named(ours) -> None:
    for name in ("logits_processor", "stopping_criteria"):
        for wrong in (MaxLengthCriteria(9), [3], "text"):
            with pytest.raises(TypeError, match=f"^{name} must be a list of callables, got "):
                ours.generate([[1, 2]], max_new_tokens=2, **{name: wrong})
