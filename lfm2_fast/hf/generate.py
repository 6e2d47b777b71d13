"""generate(): Hugging Face's call, arguments and return values, on packed rows.

Rows run at their own lengths and leave when they stop; padding exists only in what callers see.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from lfm2_fast.cache.batch import host_by_default
from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.hf.forward import check_ids
from lfm2_fast.hf.generate_loop import run_generate_loop
from lfm2_fast.hf.generation_args import (
    OF_THE_CALL,
    GenerationArgs,
    resolve_args,
    warn,
    whole_number,
)
from lfm2_fast.hf.hooks import check_generates
from lfm2_fast.hf.packing import check_cache, text_before, unpadded
from lfm2_fast.hf.pretrained import Lfm2PreTrainedModel


# Not in a caller's inference mode either: what a cache keeps must be writable outside of it.
@torch.inference_mode(False)
@torch.no_grad()
@host_by_default()
def generate(
    model: Lfm2PreTrainedModel,
    inputs: Any = None,
    generation_config: Any = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    *,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    max_batch_size: int | None = None,
    **kwargs: Any,
) -> Any:
    """Continue prompts, as Hugging Face's ``generate`` does.

    ``inputs`` (or ``input_ids``) is a tensor ``[B, T]``, a list of ids, a list of lists of unequal
    lengths, or what a tokenizer returns with ids and mask in it; None starts from the bos token.
    ``attention_mask [B, T]`` marks padding with zeros; without one it is inferred from the pad
    token, as Hugging Face does. Supported parameters, from the call, from ``generation_config``
    (transformers' object or a mapping) or from the checkpoint's own file: ``max_new_tokens``,
    ``max_length``, ``min_new_tokens``, ``do_sample``, ``temperature``, ``top_k``, ``top_p``,
    ``min_p``, ``repetition_penalty``, ``eos_token_id`` (one or several), ``pad_token_id``,
    ``bos_token_id``, ``num_return_sequences``, ``stop_strings`` (with ``tokenizer``),
    ``return_dict_in_generate`` with ``output_scores`` and ``output_logits``.

    Arguments that are logits processors in transformers (``PROCESSED`` in generation_args.py), and
    ``prefix_allowed_tokens_fn``, ``negative_prompt_ids`` and ``max_time``, run by its own classes.

    ``logits_processor`` is Hugging Face's callables over the whole batch ``(input_ids, scores)``,
    where rows that have stopped have zeros; ``stopping_criteria`` likewise, with the scores of all
    steps, or None unless ``output_scores`` is asked for. ``streamer`` gets the prompt, then every
    token, on the CPU. ``past_key_values`` is a cache of this model with one
    slot per returned row. ``inputs`` hold the whole text, of which the longest prefix that the
    cache can restore is not run again; or only what is new, with an ``attention_mask`` of more
    columns, which counts what the cache holds. It then holds all but the last token.
    ``max_batch_size`` bounds how many rows are written at a time: as one stops, the next prompt
    takes its place; the answer is in order, as ever, and progress is shown on a terminal. Callables
    and streamers, which follow all rows, need all of them at a time.
    ``seed``, else a number drawn from ``generator``, else from torch's own generator, decides
    every draw.

    Returns ids ``[B * num_return_sequences, T + new]`` on the prompts' device, the prompt first and
    rows that stopped early filled up with ``pad_token_id``; or, with ``return_dict_in_generate``,
    transformers' GenerateDecoderOnlyOutput. Raises ValueError or TypeError, naming the argument,
    for what is out of range, unknown or not supported; HookError for a hook that would never be
    called; torch.OutOfMemoryError, saying what to lower, for what does not fit; and LogitsError, a
    RuntimeError that names row, token and position, where the best logit of a row is NaN or
    infinite. A cache then holds what was run.
    """
    with ExitStack() as ending:
        if streamer is not None:
            # Whatever fails, and before the first step too: a thread may wait for the text.
            ending.callback(streamer.end)
        processors = list(logits_processor or ())
        check_generates(model)
        ids, mask, where = _prompts(model, inputs, attention_mask, kwargs)
        given = {name: kwargs.pop(name, None) for name in OF_THE_CALL}
        of_the_call = {name: value for name, value in given.items() if value is not None}
        asked = resolve_args(
            kwargs, generation_config, model.generation_defaults(), model.network.config.vocab_size
        )
        if ids is None:
            if asked.bos_token_id is None:
                raise ValueError("generate() needs input_ids: the checkpoint names no bos_token_id")
            ids = torch.tensor([[asked.bos_token_id]])
        ids = check_ids(model, ids)
        before: list[list[int]] = [[] for _ in ids]
        if mask is None:
            mask = _inferred_mask(ids, asked)
        else:
            whole, mask = mask, unpadded(ids, mask.to(ids.device), holes=True)
            if past_key_values is not None:
                check_cache(model, past_key_values, len(ids) * asked.num_return_sequences)
                copies = asked.num_return_sequences
                before = text_before(past_key_values, ids.shape[1], whole, copies)
        empty = (~mask.any(-1)).nonzero()[:, 0].tolist()
        if empty:
            raise ValueError(
                f"input_ids row {empty[0]} has no tokens; every row needs one at least"
            )
        if not (asked.processed or of_the_call):
            asked, processors = _replace_by_processors(asked, processors)
        output = run_generate_loop(
            model,
            asked,
            ids,
            mask,
            past_key_values,
            seed_of(seed, generator),
            processors=processors,
            criteria=_criteria(asked, stopping_criteria, tokenizer),
            streamer=streamer,
            most_rows=max_batch_size,
            before=before,
            of_the_call=of_the_call,
        )
        output["sequences"] = output["sequences"].to(where or model.device)
        if not asked.return_dict_in_generate:
            return output["sequences"]
        from transformers.generation import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(**output)


def _prompts(
    model: Lfm2PreTrainedModel, inputs: Any, attention_mask: Any, kwargs: dict[str, Any]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.device | None]:
    """Ids ``[B, T]``, mask and the caller's device, from whatever form the prompts came in."""
    if "input_ids" in kwargs:
        if inputs is not None:
            raise ValueError("give the prompts as inputs or as input_ids, not both")
        inputs = kwargs.pop("input_ids")
    if isinstance(inputs, Mapping) or hasattr(inputs, "input_ids"):
        if attention_mask is None:
            attention_mask = inputs.get("attention_mask")
        inputs = inputs["input_ids"]
    if inputs is None:
        return None, None, None
    mask = attention_mask
    if isinstance(mask, Sequence):
        rows = mask if mask and isinstance(mask[0], Sequence) else [mask]
        mask = _left_padded(rows, 0)[0]
    if isinstance(inputs, torch.Tensor):
        ids = inputs
    elif isinstance(inputs, str) or not isinstance(inputs, Sequence):
        raise _no_ids(inputs, "")
    elif inputs and isinstance(inputs[0], str | Mapping | torch.Tensor):
        raise _no_ids(inputs[0], "a list of ")
    elif inputs and isinstance(inputs[0], Sequence):
        ids, left = _left_padded(inputs, model.config.pad_token_id or 0)
        mask = left if mask is None else mask
    else:
        ids = torch.tensor([list(inputs)], dtype=torch.int64)
    if ids.dim() == 1:
        ids = ids[None]
    if mask is not None and mask.dim() == 1:
        mask = mask[None]
    return ids, mask, inputs.device if isinstance(inputs, torch.Tensor) else None


def _no_ids(found: Any, many: str) -> ValueError:
    """Return the error for prompts that are no token ids: text, messages, several tensors."""
    remedy = "use the checkpoint's tokenizer to make them from text"
    if isinstance(found, Mapping):
        remedy = "use the tokenizer's apply_chat_template to make them from messages"
    elif isinstance(found, torch.Tensor):
        remedy = "stack tensors of one length, or pass their tolist()"
    kind = type(found).__name__
    return ValueError(
        f"input_ids must be token ids (a tensor, or lists), got {many}{kind}; {remedy}"
    )


def _left_padded(
    rows: Sequence[Sequence[int]], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        if row:
            ids[i, -len(row) :] = torch.tensor(list(row), dtype=torch.int64)
            mask[i, -len(row) :] = 1
    return ids, mask


def _inferred_mask(ids: torch.Tensor, asked: GenerationArgs) -> torch.Tensor:
    """Hugging Face's guess: the pad token, if there is one, is padding unless it ends texts."""
    if not asked.pad_is_named or asked.pad_token_id in asked.eos_token_id:
        return unpadded(ids, None)
    try:
        return unpadded(ids, ids != asked.pad_token_id)
    except ValueError as error:
        raise ValueError(
            f"{error}; it was taken for a mask that pad_token_id={asked.pad_token_id} is padding "
            "wherever it stands: pass attention_mask"
        ) from None


def _replace_by_processors(
    asked: GenerationArgs, processors: list[Any]
) -> tuple[GenerationArgs, list[Any]]:
    """Let callers' processors take the place of those that arguments make, as Hugging Face does."""
    passed = {type(processor).__name__ for processor in processors}
    ours = {
        "RepetitionPenaltyLogitsProcessor": asked.sampling.repetition_penalty != 1.0,
        "MinNewTokensLengthLogitsProcessor": asked.min_new_tokens > 0,
    }
    replaced = [name for name, made in ours.items() if made and name in passed]
    if not replaced:
        return asked, processors
    warn(f"the {' and the '.join(replaced)} that was passed replaces the one of the arguments")
    if "RepetitionPenaltyLogitsProcessor" in replaced:
        asked = replace(asked, sampling=replace(asked.sampling, repetition_penalty=1.0))
    if "MinNewTokensLengthLogitsProcessor" in replaced:
        asked = replace(asked, min_new_tokens=0)
    return asked, sorted(processors, key=lambda each: type(each).__name__ not in replaced)


def seed_of(seed: int | None, generator: torch.Generator | None) -> int:
    """Return ``seed``, or a number drawn from ``generator``, or from torch's own generator.

    Raises ValueError for both, and for a seed out of range.
    """
    if seed is None:
        device = "cpu" if generator is None else generator.device
        return int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    if generator is not None:
        raise ValueError("give seed or generator, not both")
    found = whole_number(seed)
    if found is None:
        raise ValueError(f"seed must be a whole number, got {seed!r}")
    if not 0 <= found < 2**64:
        raise ValueError(f"seed must be from 0 to 2**64 - 1, got {seed}")
    return found


def stop_criterion(asked: GenerationArgs, tokenizer: Any) -> Any:
    """Return transformers' criterion for stop strings. Raises ValueError without a tokenizer."""
    if tokenizer is None:
        raise ValueError("stop_strings needs the tokenizer: pass tokenizer=...")
    from transformers import StopStringCriteria

    return StopStringCriteria(tokenizer, list(asked.stop_strings))


def _criteria(asked: GenerationArgs, stopping_criteria: Any, tokenizer: Any) -> list[Any]:
    criteria = list(stopping_criteria or ())
    if asked.stop_strings:
        criteria.append(stop_criterion(asked, tokenizer))
    if asked.max_time < math.inf:
        from transformers import MaxTimeCriteria

        criteria.append(MaxTimeCriteria(asked.max_time))
    return criteria
