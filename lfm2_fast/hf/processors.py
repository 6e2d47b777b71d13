"""Logits processors of ``generate``'s arguments: transformers' own classes, in its own order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lfm2_fast.hf.generation_args import GenerationArgs


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
    Raises what transformers' classes raise for values that they do not take.
    """
    from transformers import GenerationMixin, LogitsProcessorList

    class Maker(GenerationMixin):
        """The part of a model that the processors are made by, and that they call."""

        config = model.config

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs)

    return GenerationMixin._get_logits_processor(
        Maker(),
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

    ``ids [B, T]`` are the padded rows, which ``budget`` new tokens follow at most.
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
