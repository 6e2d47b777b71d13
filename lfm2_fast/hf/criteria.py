"""Stopping criteria of ``generate``: the caller's, and transformers' own for the arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lfm2_fast.hf.generation_args import GenerationArgs, warn


def resolve_criteria(
    asked: GenerationArgs, passed: Sequence[Any], tokenizer: Any, width: int
) -> tuple[GenerationArgs, list[Any]]:
    """Return the arguments and the criteria of a call. Criteria first see ``width`` columns of ids.

    As in transformers, a criterion of its own classes that was ``passed`` takes the place of the
    argument of that kind. Lengths and, without beams, end tokens become arguments, which need no
    Python. With beams the end tokens of the arguments still decide how many beams are kept.
    """
    if not (passed or asked.stop_strings or asked.max_time < math.inf):
        return asked, []
    from transformers import (
        EosTokenCriteria,
        MaxLengthCriteria,
        MaxTimeCriteria,
        StopStringCriteria,
    )

    criteria, lengths, ends = [], [], []
    for each in passed:
        if type(each) is MaxLengthCriteria:
            lengths.append(each.max_length)
        elif type(each) is EosTokenCriteria and asked.num_beams == 1:
            ends += each.eos_token_id.tolist()
        else:
            criteria.append(each)
    if lengths:
        if asked.max_new_tokens is not None:
            warn("the MaxLengthCriteria that was passed replaces max_new_tokens")
        # It is asked after each token, so the first one is always written.
        asked = replace(asked, max_new_tokens=max(min(lengths) - width, 1))
    if ends:
        asked = replace(asked, eos_token_id=tuple(ends))
    kinds = {type(each) for each in criteria}
    if asked.stop_strings and StopStringCriteria not in kinds:
        criteria.append(stop_criterion(asked, tokenizer))
    if asked.max_time < math.inf and MaxTimeCriteria not in kinds:
        criteria.append(MaxTimeCriteria(asked.max_time))
    return asked, criteria


def stop_criterion(asked: GenerationArgs, tokenizer: Any) -> Any:
    """Return transformers' criterion for stop strings. Raises ValueError without a tokenizer."""
    if tokenizer is None:
        raise ValueError("stop_strings needs the tokenizer: pass tokenizer=...")
    from transformers import StopStringCriteria

    return StopStringCriteria(tokenizer, list(asked.stop_strings))
