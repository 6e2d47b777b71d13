"""Loop of ``generate``: its rows are requests of an engine, its answer is Hugging Face's.

Rows run at their own lengths and leave when they stop. Only callers see padding. If the caller's
Python needs all rows (processors, criteria, scores), a chooser replaces the sampling operation, and
all rows begin together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.cache.page_pool import CacheError
from lfm2_fast.engine.model_runner import CHUNK, ModelRunner
from lfm2_fast.hf.batch_chooser import BatchChooser
from lfm2_fast.hf.beam_search import run_beam_search
from lfm2_fast.hf.generate_call import GenerateCall
from lfm2_fast.hf.generation_args import GenerationArgs
from lfm2_fast.hf.packing import check_cache
from lfm2_fast.hf.pretrained import Lfm2PreTrainedModel
from lfm2_fast.hf.processors import logits_processors
from lfm2_fast.hf.prompts import Prompts
from lfm2_fast.hf.steps import Steps, sample_steps
from lfm2_fast.models.lfm2 import Lfm2


def run_generate_loop(
    model: Lfm2PreTrainedModel,
    asked: GenerationArgs,
    prompts: Prompts,
    cache: Cache | None,
    seed: int | None,
    *,
    processors: list[Any],
    criteria: list[Any],
    streamer: Any,
    most_rows: int | None,
    of_the_call: Mapping[str, Any],
    assistant: Lfm2 | None = None,
) -> dict[str, Any]:
    """Continue the prompts. Return the fields of Hugging Face's output.

    ``of_the_call`` has the arguments of transformers' processors that no config holds.
    ``assistant`` drafts tokens if the engine chooses them. With beams ``seed`` may be None: torch's
    own generator then draws.
    """
    rows = len(prompts) * asked.copies
    if most_rows is not None and most_rows < 1:
        raise ValueError(f"max_batch_size must be at least 1, got {most_rows}")
    needs = _Needs.of(asked, prompts, processors, criteria, of_the_call)
    at_a_time = rows if most_rows is None else min(rows, most_rows)
    if at_a_time < rows and (needs.chooser or streamer is not None or cache is not None):
        raise ValueError(
            f"max_batch_size={most_rows} is less than {rows} rows, but streamer, past_key_values, "
            "num_beams, inputs_embeds, hidden states, scores, stop_strings, max_time, "
            "stopping_criteria and logits processors, those of arguments too, need all rows at a "
            "time; leave max_batch_size out or pass fewer prompts"
        )
    negative = of_the_call.get("negative_prompt_ids")
    if negative is not None and len(negative) != rows:
        raise ValueError(
            f"negative_prompt_ids has {len(negative)} rows, but {rows} are written: repeat each "
            "for num_beams or num_return_sequences"
        )
    own, workspace = cache is None, model.workspace
    if cache is None:
        drafter = assistant is None and not needs.chooser
        cache = workspace.take(model.network, at_a_time, model.max_length, drafter=drafter)
    else:
        check_cache(model, cache, rows)
    call = GenerateCall(model, asked, prompts, cache, seed)
    try:
        output = _run(
            call, needs, processors, criteria, streamer, of_the_call, assistant, skips=own
        )
    except (torch.OutOfMemoryError, CacheError) as error:
        full = torch.OutOfMemoryError
        if not isinstance(error, full) and not isinstance(error.__cause__, full):
            raise
        held = cache.nbytes + workspace.nbytes(cache)
        raise torch.OutOfMemoryError(
            f"{at_a_time} rows of up to {call.longest + call.budget} tokens do not fit into "
            f"the device's memory (the cache and its buffers have {held / 2**20:.0f} MiB so far); "
            "lower max_batch_size, max_new_tokens, num_return_sequences, num_beams or the length "
            f"of the prompts, or load a smaller dtype or quantization ({error})"
        ) from error
    if own and not asked.return_dict_in_generate:
        workspace.give_back(model.network, cache)
    return output


@dataclass(frozen=True)
class _Needs:
    """Parts that a call needs beside an engine's own sampling."""

    beams: bool
    hidden: bool  # hidden states of every step
    steps: bool  # steps of all rows together, run here and not by an engine
    processors: bool  # transformers' processors of arguments
    chooser: bool  # Python that chooses tokens or ends rows, and so sees all rows
    seen: bool  # results of every step are seen by the caller

    @classmethod
    def of(
        cls,
        asked: GenerationArgs,
        prompts: Prompts,
        processors: list[Any],
        criteria: list[Any],
        of_the_call: Mapping[str, Any],
    ) -> _Needs:
        shown = asked.output_scores or asked.output_logits
        beams = asked.num_beams > 1 and len(prompts) > 0
        hidden = asked.output_hidden_states and asked.return_dict_in_generate
        steps = beams or hidden or prompts.embeds is not None
        # Tokens that are in the cache alone are not penalized in transformers, as they are here.
        penalized = asked.sampling.repetition_penalty != 1.0 and any(prompts.before)
        complete = bool(asked.processed or of_the_call or steps or penalized)
        return cls(
            beams=beams,
            hidden=hidden,
            steps=steps,
            processors=complete,
            chooser=bool(processors or criteria or shown or complete),
            seen=bool(shown or hidden or processors or criteria or of_the_call),
        )


def _run(
    call: GenerateCall,
    needs: _Needs,
    processors: list[Any],
    criteria: list[Any],
    streamer: Any,
    of_the_call: Mapping[str, Any],
    assistant: Lfm2 | None,
    *,
    skips: bool,
) -> dict[str, Any]:
    """Run a call by beam search, by steps of all rows, or as requests of an engine.

    With ``skips`` beams whose further steps no caller sees may stop early.
    """
    model, asked, cache = call.model, call.asked, call.cache
    workspace, chooser = model.workspace, None
    if needs.chooser:
        texts = call.texts(model.device)
        if needs.processors:
            masks = call.source.mask.to(model.device).repeat_interleave(asked.copies, 0)
            processors = logits_processors(
                model, asked, texts, masks, call.budget, processors, of_the_call
            )
        if not needs.beams:
            chooser = BatchChooser(
                model.ops,
                asked,
                texts,
                call.budget,
                processors,
                criteria,
                complete=needs.processors,
            )
    if streamer is not None:
        streamer.put(call.texts("cpu"))
    if not needs.steps:
        engine = workspace.engine(
            model.network, cache, chunk=CHUNK, chooser=chooser, assistant=assistant
        )
        return call.run(engine, streamer, chooser)
    runner = ModelRunner(model.network, cache, workspace.buffers(model.network, cache))
    steps = Steps(model, runner, call.source, asked.copies, hidden=needs.hidden)
    if needs.beams:
        return run_beam_search(
            model,
            asked,
            steps,
            texts,
            call.budget,
            processors,
            criteria,
            call.seed,
            skips=skips and not needs.seen,
        )
    assert chooser is not None and call.seed is not None
    made = sample_steps(steps, asked, call.budget, call.seed, chooser)
    output = call.run_steps(made, streamer, chooser)
    output["hidden_states"] = tuple(steps.hidden_states or ()) if needs.hidden else None
    return output
