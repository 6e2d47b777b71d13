"""Every row of docs/usage/huggingface.md on ``generate``, compared with transformers and tried.

A field of GenerationConfig or an argument of ``generate`` that is new there turns a test red.
"""

from __future__ import annotations

import inspect
import re
import warnings
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, Lfm2ForCausalLM, LogitsProcessorList

from lfm2_fast.hf.generation_names import (
    DEFAULTS,
    FILTERS,
    OF_THE_CALL,
    PROCESSED,
    REFUSED,
    SUPPORTED,
    WITHOUT_EFFECT,
)
from tests.hf.page import IDS, names, parameters, table
from tests.hf.test_processors import NAMES

GENERATE = "`generate`"
# Of the call alone; the others are fields of GenerationConfig.
CALL = {
    "inputs",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "past_key_values",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "streamer",
    "tokenizer",
    "assistant_model",
    *OF_THE_CALL,
}


def generate_arguments(kind: Any, config: Any) -> set[str]:
    """Names that ``generate`` takes, by name, out of ``**kwargs``, or as fields of its config."""
    read: set[str] = set()
    for function in (kind.generate, kind._extract_generation_mode_kwargs):
        code = inspect.getsource(inspect.unwrap(function))
        read |= set(re.findall(r'\bkwargs\.(?:pop|get)\(\s*"(\w+)"', code))
    fields = {name for name in vars(config) if not name.startswith("_")}
    return parameters(kind.generate) | parameters(kind.forward) | read | fields


def test_every_argument_of_theirs_is_listed() -> None:
    assert generate_arguments(Lfm2ForCausalLM, GenerationConfig()) <= table(GENERATE).keys()


def test_new_names_in_transformers_would_be_noticed() -> None:
    class Newer(Lfm2ForCausalLM):
        def generate(self, inputs: Any = None, new_named: Any = None, **kwargs: Any) -> Any:
            return kwargs.pop("new_popped")

        def forward(self, input_ids: Any = None, new_input: Any = None) -> Any:
            return None

    config = GenerationConfig()
    config.new_field = 1
    new = generate_arguments(Newer, config) - table(GENERATE).keys()
    assert new == {"new_named", "new_popped", "new_input", "new_field"}


def test_the_page_says_what_the_messages_say() -> None:
    told = table(GENERATE)
    for name, (_, why) in WITHOUT_EFFECT.items():
        assert told[name] == ("accepted", f"no effect here: {why}"), name
    for name, (_, why) in REFUSED.items():
        assert told[name] == ("refused", why), name
    assert names(GENERATE, "accepted") == WITHOUT_EFFECT.keys()
    assert names(GENERATE, "refused") == {*REFUSED, "kwargs"}
    assert names(GENERATE, "same") == {*CALL, *SUPPORTED, *PROCESSED}


def test_defaults_are_transformers() -> None:
    theirs = GenerationConfig._get_default_generation_params()
    for name, value in DEFAULTS.items():
        assert (theirs[name] if name in theirs else False) == value, name


@pytest.fixture(scope="module")
def plain(ours) -> torch.Tensor:
    return ours.generate(IDS, max_new_tokens=3)


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_arguments_without_effect_are_reported(ours, plain, name: str) -> None:
    """Neutral values pass in silence, others with a note; the answer is the same."""
    neutral, _ = WITHOUT_EFFECT[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in neutral:
            assert torch.equal(ours.generate(IDS, max_new_tokens=3, **{name: value}), plain)
    other = False if name == "use_cache" else "something"
    if name != "disable_compile":  # both of its values are neutral
        with pytest.warns(UserWarning, match=f"^{name}={other!r} has no effect here"):
            assert torch.equal(ours.generate(IDS, max_new_tokens=3, **{name: other}), plain)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_arguments_raise_errors_with_a_remedy(ours, plain, name: str) -> None:
    neutral, why = REFUSED[name]
    for value in neutral:
        assert torch.equal(ours.generate(IDS, max_new_tokens=3, **{name: value}), plain)
    with pytest.raises(ValueError) as raised:
        ours.generate(IDS, max_new_tokens=3, **{name: 3})
    assert str(raised.value) == f"{name}=3 is not supported by lfm2_fast: {why}"
    with pytest.raises(ValueError, match=f"^{name}=3 .*json: pass {name}=None, or "):
        ours.generation_config, before = {name: 3}, ours.generation_config
        try:
            ours.generate(IDS, max_new_tokens=3)
        finally:
            ours.generation_config = before


SAME: dict[str, dict[str, Any]] = {
    "max_new_tokens": {"max_new_tokens": 2},
    "max_length": {"max_new_tokens": None, "max_length": 9},
    "min_new_tokens": {"min_new_tokens": 3, "ends": True},
    "eos_token_id": {"ends": True},
    "pad_token_id": {"ends": True, "pad_token_id": 5},
    "bos_token_id": {"inputs": None, "bos_token_id": 40},
    "max_time": {"max_time": 1000.0},
    "stop_strings": {"stop_strings": ["the", "a"], "text": True},
    "do_sample": {"do_sample": True, "top_k": 1},
    "temperature": {"do_sample": True, "temperature": 1e-4},
    "top_k": {"do_sample": True, "top_k": 1},
    "top_p": {"do_sample": True, "top_p": 1e-4},
    "min_p": {"do_sample": True, "min_p": 1.0},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "num_return_sequences": {"num_beams": 3, "num_return_sequences": 2},
    "num_beams": {"num_beams": 3},
    "length_penalty": {"num_beams": 3, "length_penalty": -2.0, "ends": True},
    "early_stopping": {"num_beams": 3, "early_stopping": True, "ends": True},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "output_scores": {"return_dict_in_generate": True, "output_scores": True},
    "output_logits": {"return_dict_in_generate": True, "output_logits": True},
    "output_hidden_states": {"return_dict_in_generate": True, "output_hidden_states": True},
    "inputs": {},
    "input_ids": {"inputs": None, "input_ids": IDS},
    "attention_mask": {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])},
    "generation_config": {"generation_config": GenerationConfig(max_new_tokens=2)},
    "logits_processor": {"logits_processor": LogitsProcessorList([lambda ids, s: -s])},
    "stopping_criteria": {"stopping_criteria": [lambda ids, s, **_: ids[:, -1] > 5]},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda i, ids: [50 + i, 60]},
    "negative_prompt_ids": {"guidance_scale": 2.0, "negative_prompt_ids": IDS[:, :3]},
    "negative_prompt_attention_mask": {
        "guidance_scale": 2.0,
        "negative_prompt_ids": IDS[:, :3],
        "negative_prompt_attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
    },
}
# Those that have tests of their own: test_steps.py, test_continued.py, test_generate.py,
# test_speculation.py.
ELSEWHERE = {"token_healing", "inputs_embeds", "past_key_values", "streamer", "tokenizer"}
ELSEWHERE |= {"prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_model"}


def test_each_that_is_the_same_has_a_trial() -> None:
    assert SAME.keys() | ELSEWHERE == CALL | SUPPORTED
    # test_processors.py tries the filters of draws together.
    assert PROCESSED.keys() <= {*NAMES, *FILTERS}


@pytest.mark.parametrize("name", SAME)
def test_arguments_that_are_the_same(models, plain, tokenizer, name: str) -> None:
    # Of rows that have stopped ours has zeros: these see the first token.
    count = 1 if name in ("output_scores", "output_logits", "output_hidden_states") else 4
    kwargs = {"inputs": IDS, "max_new_tokens": count, "do_sample": False, **SAME[name]}
    if kwargs.pop("ends", False):
        kwargs["eos_token_id"] = [int(plain[0, 7]), int(plain[1, 6])]
    if kwargs.pop("text", False):
        kwargs["tokenizer"] = tokenizer
    found = [model.generate(**kwargs) for model in models]
    if not kwargs.get("return_dict_in_generate"):
        assert torch.equal(*found[::-1])
        return
    theirs, ours = found
    assert torch.equal(ours.sequences, theirs.sequences) and type(ours) is type(theirs)
    for part in {"scores", "logits", "hidden_states"} & {name.removeprefix("output_")}:
        for mine, other in zip(ours[part], theirs[part], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
