"""Arguments of ``generate``: from Hugging Face's many spellings to one checked object.

The first of these that has a value counts: the call, its ``generation_config``, the checkpoint's
generation_config.json, Hugging Face's defaults. An explicit None in the call switches a parameter
off. An argument of Hugging Face that is not supported is refused by name, never ignored.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lfm2_fast.hf.checked_values import Checked, in_a_line
from lfm2_fast.hf.generation_names import (
    BEAMS_ONLY,
    DEFAULTS,
    FILTERS,
    KNOWN,
    PROCESSED,
    REFUSED,
    SAMPLING_ONLY,
    WITHOUT_EFFECT,
)
from lfm2_fast.ops.sampling import SamplingParams

# More tokens than any vocabulary has. A number of more than 64 bits would not fit into a tensor.
MOST_TOP_K = 2**31


@dataclass(frozen=True)
class GenerationArgs:
    """Arguments of a call of ``generate``, checked; names and meanings are Hugging Face's."""

    sampling: SamplingParams
    processed: dict[str, Any]  # settings of transformers' logits processors
    max_time: float  # seconds; infinite without one
    max_new_tokens: int | None
    max_length: int | None
    max_length_is_given: bool  # by the call or its generation_config
    min_new_tokens: int
    num_return_sequences: int
    num_beams: int
    length_penalty: float
    early_stopping: bool | str
    stop_strings: tuple[str, ...]
    eos_token_id: tuple[int, ...]
    pad_token_id: int  # padding after a row's end, named by the caller or not
    pad_is_named: bool
    bos_token_id: int | None
    output_scores: bool
    output_logits: bool
    output_hidden_states: bool
    token_healing: bool
    return_dict_in_generate: bool
    prompt_lookup_num_tokens: int  # 0 if none are drafted
    max_matching_ngram_size: int

    @property
    def copies(self) -> int:
        """Number of rows of a prompt."""
        return max(self.num_beams, self.num_return_sequences)

    def beside_embeddings(self, count: int) -> GenerationArgs:
        """Return the arguments of a prompt with ``count`` columns that are only embeddings.

        ``min_length`` counts them, and transformers' processor does not see them.
        """
        least = self.processed.get("min_length")
        if not count or least is None:
            return self
        return replace(self, processed={**self.processed, "min_length": max(least - count, 0)})

    def new_tokens(self, width: int, limit: int) -> int:
        """Return how many tokens may follow prompts of ``width`` columns, padding included.

        Raises ValueError, which names the argument, if there are none.
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

    ``call`` has the caller's arguments. ``generation_config`` is an object of transformers, a
    mapping or None. ``defaults`` is the checkpoint's generation_config.json; its unknown keys are
    ignored. Raises TypeError for an unknown name. Raises ValueError, which names the argument, for
    a value that is out of range or not supported.
    """
    for name in call:
        if name not in KNOWN:
            raise TypeError(f"generate() got an unexpected keyword argument {name!r}")
    asked = {**_known(_as_mapping(generation_config)), **call}
    values = {**DEFAULTS, **_known(defaults), **asked}
    _refuse(values, asked)
    check = Checked(values)
    for name in ("min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"):
        check.count(name, least=0)  # in transformers any of these means none
    eos = check.tokens("eos_token_id", vocab_size)
    pad = check.tokens("pad_token_id", vocab_size) or eos
    args = GenerationArgs(
        sampling=_sampling(check),
        processed=_processed(values),
        max_time=check.number("max_time", math.inf, above=0.0),
        max_new_tokens=check.count("max_new_tokens", least=1),
        max_length=check.count("max_length", least=1),
        max_length_is_given=asked.get("max_length") is not None,
        min_new_tokens=check.count("min_new_tokens", least=0) or 0,
        num_return_sequences=check.count("num_return_sequences", least=1) or 1,
        num_beams=check.count("num_beams", least=1) or 1,
        length_penalty=check.number("length_penalty", 1.0),
        early_stopping=check.early_stopping(),
        stop_strings=check.strings("stop_strings"),
        eos_token_id=eos,
        pad_token_id=next(iter(pad), 0),
        pad_is_named=bool(pad),
        bos_token_id=next(iter(check.tokens("bos_token_id", vocab_size)), None),
        output_scores=check.flag("output_scores"),
        output_logits=check.flag("output_logits"),
        output_hidden_states=check.flag("output_hidden_states"),
        token_healing=check.flag("token_healing"),
        return_dict_in_generate=check.flag("return_dict_in_generate"),
        prompt_lookup_num_tokens=check.count("prompt_lookup_num_tokens", least=1) or 0,
        max_matching_ngram_size=check.count("max_matching_ngram_size", least=1) or 2,
    )
    _check_copies(args)
    for note in (*_idle(values, asked), *_overruled(args, call)):
        warn(note)  # from here, for its stack level
    return args


def _refuse(values: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise ValueError for a parameter of Hugging Face that is set and not supported."""
    for name, (neutral, remedy) in REFUSED.items():
        if _asks(values, name, neutral):
            stands = "it is in the checkpoint's generation_config.json"
            remedy = remedy if name in asked else f"{stands}: pass {name}=None, or {remedy}"
            raise ValueError(
                f"{name}={in_a_line(values[name])} is not supported by lfm2_fast: {remedy}"
            )


def _processed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of transformers' logits processors that have an effect."""
    return {
        name: values[name]
        for name, neutral in PROCESSED.items()
        if _asks(values, name, neutral) and (values.get("do_sample") or name not in FILTERS)
    }


def _sampling(check: Checked) -> SamplingParams:
    do_sample = check.flag("do_sample")
    return SamplingParams(
        do_sample=do_sample,
        # Callers often write greedy decoding with a temperature of 0.
        temperature=check.number("temperature", 1.0, above=0.0) if do_sample else 1.0,
        top_k=min(check.count("top_k", least=0) or 0, MOST_TOP_K),
        top_p=check.number("top_p", 1.0, low=0.0, high=1.0),
        min_p=check.number("min_p", 0.0, low=0.0, high=1.0),
        repetition_penalty=check.number("repetition_penalty", 1.0, above=0.0),
    )


def _check_copies(args: GenerationArgs) -> None:
    """Raise ValueError where a prompt would have too few continuations, or equal ones."""
    count, beams = args.num_return_sequences, args.num_beams
    if 1 < beams < count:
        raise ValueError(
            f"num_return_sequences={count} is more than num_beams={beams}: raise num_beams"
        )
    if count > 1 and not args.sampling.do_sample and beams == 1:
        raise ValueError(
            f"num_return_sequences={count} needs do_sample=True or num_beams: greedy decoding "
            f"would write the same text {count} times"
        )


def _idle(values: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    """Yield a warning of each parameter that has no effect here."""
    idle = {name: neutral for name, (neutral, _) in WITHOUT_EFFECT.items()}
    if not values.get("do_sample"):
        idle |= {name: PROCESSED[name] for name in FILTERS}
    if values.get("num_beams") in (None, 1):
        idle |= {name: (DEFAULTS[name],) for name in BEAMS_ONLY}
    for name, neutral in idle.items():
        if name in asked and _asks(values, name, neutral):
            yield f"{name}={values[name]!r} has no effect here"


def _overruled(args: GenerationArgs, call: Mapping[str, Any]) -> Iterator[str]:
    """Yield a warning of each argument of the call that another one overrules."""
    given = {name for name, value in call.items() if value is not None}
    unused = [name for name in SAMPLING_ONLY if name in given]
    if unused and not args.sampling.do_sample:
        yield f"{', '.join(unused)} without do_sample=True has no effect: decoding is greedy"
    most, least = args.max_new_tokens, args.min_new_tokens
    if most is not None and "max_length" in given:
        yield "max_new_tokens takes precedence over max_length"
    if most is not None and least > most:
        yield f"min_new_tokens={least} is more than max_new_tokens={most}"


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
    """Return the generation parameters that are set, without version notes and the like."""
    names = KNOWN - {"transformers_version"}
    return {name: value for name, value in values.items() if value is not None and name in names}


def _asks(values: Mapping[str, Any], name: str, neutral: tuple[Any, ...]) -> bool:
    """Return True if a parameter has a value with an effect."""
    value = values.get(name)
    return value is not None and value not in neutral
