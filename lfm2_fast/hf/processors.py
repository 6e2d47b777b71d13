"""Logits processors of ``generate``'s arguments: transformers' own classes, in its own order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lfm2_fast.hf.generation_args import GenerationArgs, warn
from lfm2_fast.hf.generation_mixin import generation_mixin


def logits_processors(
    model: Any,
    asked: GenerationArgs,
    ids: torch.Tensor,
    mask: torch.Tensor,
    budget: int,
    passed: Sequence[Any],
    call: Mapping[str, Any],
) -> list[Any]:
    """Return all processors of a call, those for its sampling parameters too.

    ``ids`` and ``mask [B, T]`` are the padded rows, ``passed`` the caller's processors. ``call``
    has the arguments that no config holds: ``prefix_allowed_tokens_fn`` and negative prompts.
    Raises the exceptions of transformers' classes for wrong values.
    """
    from transformers import LogitsProcessorList

    mixin = generation_mixin("logits processors of arguments")

    class Maker(mixin):  # type: ignore[misc,valid-type]
        """Part of a model that makes the processors, and that they call."""

        config = model.config

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs)

    return Maker()._get_logits_processor(
        generation_config(asked, ids, budget),
        input_ids_seq_length=ids.shape[1],
        encoder_input_ids=ids,
        logits_processor=LogitsProcessorList(passed),
        device=ids.device,
        model_kwargs={"attention_mask": mask.long()},
        **call,
    )


def generation_config(asked: GenerationArgs, ids: torch.Tensor, budget: int) -> Any:
    """Return a call's arguments as transformers' classes read them.

    ``ids [B, T]`` are the padded rows. At most ``budget`` new tokens follow.
    """
    from transformers import GenerationConfig

    sampling, beams = asked.sampling, asked.num_beams > 1
    made = GenerationConfig(
        use_cache=True,
        num_beams=asked.num_beams,
        do_sample=sampling.do_sample,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p or None,
        repetition_penalty=sampling.repetition_penalty,
        min_new_tokens=asked.min_new_tokens,
        max_length=ids.shape[1] + budget,
        num_return_sequences=asked.num_return_sequences,
        length_penalty=asked.length_penalty if beams else None,
        early_stopping=asked.early_stopping if beams else None,
        output_scores=asked.output_scores,
        output_logits=asked.output_logits,
        output_hidden_states=asked.output_hidden_states,
        return_dict_in_generate=True,
        **asked.processed,
    )
    eos, pad = list(asked.eos_token_id), asked.pad_token_id
    made._eos_token_tensor = torch.tensor(eos, device=ids.device) if eos else None
    made._pad_token_tensor = torch.tensor(pad, device=ids.device)
    return made


def replace_by_processors(
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
