"""The arguments of ``generate``: from Hugging Face's many spellings to one checked object.

A value comes from the call, else from the ``generation_config`` of the call, else from the
checkpoint's generation_config.json, else from Hugging Face's defaults; an explicit None in the call
switches a parameter off. What Hugging Face knows and this package does not is refused by name,
never ignored.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lfm2_fast.ops.sampling import SamplingParams

# Hugging Face's defaults, where they are not None.
DEFAULTS: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "num_return_sequences": 1,
    "output_scores": False,
    "output_logits": False,
    "return_dict_in_generate": False,
}
SUPPORTED = {
    *DEFAULTS,
    "min_p",
    "max_length",
    "max_new_tokens",
    "min_new_tokens",
    "stop_strings",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "max_time",
}
# What a call alone may have: functions and tensors, for transformers' logits processors.
OF_THE_CALL = ("prefix_allowed_tokens_fn", "negative_prompt_ids", "negative_prompt_attention_mask")
# What transformers' logits processors do, each with the values that ask for nothing.
PROCESSED: dict[str, tuple[Any, ...]] = {
    "min_length": (0,),
    "typical_p": (1.0,),
    "top_h": (),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "renormalize_logits": (False,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "remove_invalid_values": (False,),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": (),
    "guidance_scale": (1, 1.0),
    "watermarking_config": (),
}
# What else Hugging Face's call takes, each with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "early_stopping": (False,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (),
    "dola_layers": (),
    "use_cache": (True,),
    "use_mtp": (False,),
    "cache_implementation": (),
    "cache_config": (),
    "max_cache_len": (),
    "length_penalty": (1.0,),
    "diversity_penalty": (0.0,),
    "force_words_ids": (),
    "constraints": (),
    "token_healing": (False,),
    "low_memory": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "decoder_start_token_id": (),
    "prompt_lookup_num_tokens": (),
    "prefill_chunk_size": (),
    "compile_config": (),
    "disable_compile": (False, True),
    "assistant_model": (),
    "assistant_tokenizer": (),
    "synced_gpus": (False,),
    "use_model_defaults": (),
    "custom_generate": (),
    "inputs_embeds": (),
    "position_ids": (),
    "token_type_ids": (),
    "labels": (),
    "trust_remote_code": (False,),
}
SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p")
KNOWN = {*SUPPORTED, *PROCESSED, *UNSUPPORTED}
# Of UNSUPPORTED, what changes no token that is written here: how memory is used, or a setting of
# beams where there are none.
WITHOUT_EFFECT = {
    "use_cache",
    "early_stopping",
    "length_penalty",
    "diversity_penalty",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "low_memory",
    "prefill_chunk_size",
    "compile_config",
    "disable_compile",
}
# Of PROCESSED, filters of drawn tokens: greedy decoding does not ask for them.
FILTERS = {"typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"}


@dataclass(frozen=True)
class GenerationArgs:
    """Arguments of a call of ``generate``, checked; names and meanings are Hugging Face's."""

    sampling: SamplingParams
    processed: dict[str, Any]  # what transformers' logits processors are to do
    max_time: float  # seconds; infinite without one
    max_new_tokens: int | None
    max_length: int | None
    max_length_is_given: bool  # by the call or its generation_config
    min_new_tokens: int
    num_return_sequences: int
    stop_strings: tuple[str, ...]
    eos_token_id: tuple[int, ...]
    pad_token_id: int  # what fills up rows, named or not
    pad_is_named: bool
    bos_token_id: int | None
    output_scores: bool
    output_logits: bool
    return_dict_in_generate: bool

    def new_tokens(self, width: int, limit: int) -> int:
        """Return how many tokens may follow prompts of ``width`` columns, padding included.

        Raises ValueError, naming the argument, when that is none.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return min(20, max(limit - width, 1))
        most = self.max_length if self.max_length_is_given else min(self.max_length, limit)
        if most <= width:
            raise ValueError(
                f"max_length={most} leaves nothing to write: the prompt has {width} "
                "tokens; set max_new_tokens instead"
            )
        return most - width


def resolve_args(
    call: Mapping[str, Any], generation_config: Any, defaults: Mapping[str, Any], vocab_size: int
) -> GenerationArgs:
    """Merge and check the arguments of one call.

    ``call`` holds what the caller wrote, ``generation_config`` an object of transformers or a
    mapping, or None; ``defaults`` is what the checkpoint's generation_config.json says, whose
    unknown keys are left alone. Raises TypeError for an unknown name and ValueError for
    a value that is out of range or not supported, naming it.
    """
    given = {name for name, value in call.items() if value is not None}
    for name in call:
        if name not in KNOWN:
            raise TypeError(f"generate() got an unexpected keyword argument {name!r}")
    values = {
        **DEFAULTS,
        **_known(defaults),
        **_known(_as_mapping(generation_config)),
        **call,
    }
    asked = {**_known(_as_mapping(generation_config)), **call}
    processed = {}
    for name, neutral in (*UNSUPPORTED.items(), *PROCESSED.items()):
        value = values.get(name)
        if value is None or value in neutral:
            continue
        if name in WITHOUT_EFFECT or (name in FILTERS and not values.get("do_sample")):
            if name in asked:
                warn(f"{name}={value!r} has no effect here")
            continue
        if name in PROCESSED:
            processed[name] = value
            continue
        if name in asked:
            remedy = "leave it out"
        else:
            remedy = f"it stands in the checkpoint's generation_config.json: pass {name}=None"
        raise ValueError(
            f"{name}={_in_a_line(value)} is not supported by lfm2_fast; {remedy}, or use Hugging "
            "Face's model for it"
        )
    check = _Check(values)
    do_sample = check.flag("do_sample")
    sampling = SamplingParams(
        do_sample=do_sample,
        # Greedy decoding is often written with a temperature of 0 beside it.
        temperature=check.number("temperature", 1.0, above=0.0) if do_sample else 1.0,
        top_k=check.count("top_k", least=0) or 0,
        top_p=check.number("top_p", 1.0, low=0.0, high=1.0),
        min_p=check.number("min_p", 0.0, low=0.0, high=1.0),
        repetition_penalty=check.number("repetition_penalty", 1.0, above=0.0),
    )
    if not sampling.do_sample:
        unused = [name for name in SAMPLING_ONLY if name in given]
        if unused:
            warn(f"{', '.join(unused)} without do_sample=True has no effect: decoding is greedy")
    for name in ("min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"):
        check.count(name, least=0)  # transformers takes any for none
    eos = check.tokens("eos_token_id", vocab_size)
    pad = check.tokens("pad_token_id", vocab_size) or eos
    max_new_tokens = check.count("max_new_tokens", least=1)
    max_length = check.count("max_length", least=1)
    if max_new_tokens is not None and "max_length" in given:
        warn("max_new_tokens takes precedence over max_length")
    min_new_tokens = check.count("min_new_tokens", least=0) or 0
    if max_new_tokens is not None and min_new_tokens > max_new_tokens:
        raise ValueError(
            f"min_new_tokens={min_new_tokens} is more than max_new_tokens={max_new_tokens}"
        )
    count = check.count("num_return_sequences", least=1) or 1
    if count > 1 and not sampling.do_sample:
        raise ValueError(
            f"num_return_sequences={count} needs do_sample=True: greedy decoding would write "
            f"the same text {count} times"
        )
    return GenerationArgs(
        sampling=sampling,
        processed=processed,
        max_time=check.number("max_time", math.inf, above=0.0),
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        max_length_is_given=asked.get("max_length") is not None,
        min_new_tokens=min_new_tokens,
        num_return_sequences=count,
        stop_strings=check.strings("stop_strings"),
        eos_token_id=eos,
        pad_token_id=next(iter(pad), 0),
        pad_is_named=bool(pad),
        bos_token_id=next(iter(check.tokens("bos_token_id", vocab_size)), None),
        output_scores=check.flag("output_scores"),
        output_logits=check.flag("output_logits"),
        return_dict_in_generate=check.flag("return_dict_in_generate"),
    )


def warn(message: str) -> None:
    """Warn at the caller of ``model.generate``: the stack level skips our own frames."""
    warnings.warn(message, stacklevel=9)


def _as_mapping(generation_config: Any) -> Mapping[str, Any]:
    if generation_config is None:
        return {}
    if isinstance(generation_config, Mapping):
        return generation_config
    if hasattr(generation_config, "to_dict"):
        return generation_config.to_dict()
    raise ValueError(
        "generation_config must be transformers' GenerationConfig or a mapping, not "
        f"{type(generation_config).__name__}"
    )


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """The generation parameters that are set; version notes and the like are no parameters."""
    return {name: value for name, value in values.items() if value is not None and name in KNOWN}


def _in_a_line(value: Any) -> str:
    """Return ``repr(value)``, or its class's name where that is no short line, as a model's."""
    shown = repr(value)
    return shown if len(shown) < 80 and "\n" not in shown else f"<{type(value).__name__}>"


def whole_number(value: Any) -> int | None:
    """Return ``value`` as an int, of whatever integer type; None if it is none."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


class _Check:
    """Reads values of the right type and range, or raises ValueError by name."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
        return bool(value)

    def number(
        self,
        name: str,
        neutral: float,
        *,
        above: float = -math.inf,
        low: float = -math.inf,
        high: float = math.inf,
    ) -> float:
        value = self.values.get(name)
        if value is None:
            return neutral
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ValueError(f"{name} must be a number, got {value!r}")
        if not (value > above and low <= value <= high):
            span = f"above {above:g}" if above > -math.inf else f"from {low:g} to {high:g}"
            hint = "; for greedy decoding use do_sample=False" if name == "temperature" else ""
            raise ValueError(f"{name} must be {span}, got {value!r}{hint}")
        return float(value)

    def count(self, name: str, *, least: int) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        found = whole_number(value)
        if found is None or found < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        return found

    def tokens(self, name: str, vocab_size: int) -> tuple[int, ...]:
        value = self.values.get(name)
        if value is None:
            return ()
        found = value.tolist() if hasattr(value, "tolist") else value
        tokens = list(map(whole_number, found if isinstance(found, Sequence) else [found]))
        for token in tokens:
            if token is None or not 0 <= token < vocab_size:
                hint = "; None is for no such token" if token == -1 else ""
                raise ValueError(
                    f"{name} must be token ids from 0 to {vocab_size - 1}, got {value!r}{hint}"
                )
        return tuple(token for token in tokens if token is not None)

    def strings(self, name: str) -> tuple[str, ...]:
        value = self.values.get(name)
        found = (value,) if isinstance(value, str) else tuple(value or ())
        if not all(isinstance(text, str) and text for text in found):
            raise ValueError(f"{name} must be a string or a list of strings, got {value!r}")
        return found
