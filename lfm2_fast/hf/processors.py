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
    from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList

    class Maker(GenerationMixin):
        """The part of a model that the processors are made by, and that they call."""

        config = model.config

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs)

    eos = torch.tensor(asked.eos_token_id, device=ids.device) if asked.eos_token_id else None
    sampling = asked.sampling
    config = GenerationConfig(
        use_cache=True,
        num_beams=1,
        do_sample=sampling.do_sample,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p or None,
        repetition_penalty=sampling.repetition_penalty,
        min_new_tokens=asked.min_new_tokens,
        max_length=ids.shape[1] + budget,
        **asked.processed,
    )
    config._eos_token_tensor = eos
    return GenerationMixin._get_logits_processor(
        Maker(),
        config,
        input_ids_seq_length=ids.shape[1],
        encoder_input_ids=ids,
        logits_processor=LogitsProcessorList(passed),
        device=ids.device,
        model_kwargs={"attention_mask": mask.long()},
        **call,
    )
