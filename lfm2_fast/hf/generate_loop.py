"""Loop of ``generate``: its rows are requests of an engine, its answer is Hugging Face's.

Rows run at their own lengths and leave when they stop. Only callers see padding. If the caller's
Python needs all rows (processors, criteria, scores), a chooser replaces the sampling operation, and
all rows begin together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch

from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.cache.page_pool import CacheError
from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.model_runner import CHUNK, ModelRunner
from lfm2_fast.engine.request import Request, Row
from lfm2_fast.hf.batch_chooser import BatchChooser
from lfm2_fast.hf.beam_search import run_beam_search
from lfm2_fast.hf.generation_args import GenerationArgs, warn
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

    ``of_the_call`` has what transformers' processors take beside the arguments. ``assistant``
    drafts tokens where the engine chooses them. ``seed`` may be
    None with beams: torch's own generator draws then.
    """
    rows = len(prompts) * asked.copies
    if most_rows is not None and most_rows < 1:
        raise ValueError(f"max_batch_size must be at least 1, got {most_rows}")
    shown, beams = asked.output_scores or asked.output_logits, asked.num_beams > 1 and rows > 0
    hidden = asked.output_hidden_states and asked.return_dict_in_generate
    by_steps = beams or hidden or prompts.embeds is not None
    # Tokens that are in the cache alone are not penalized in transformers, as they are here.
    penalized = asked.sampling.repetition_penalty != 1.0 and any(prompts.before)
    complete = bool(asked.processed or of_the_call or by_steps or penalized)
    outside = bool(processors or criteria or shown or complete)
    at_a_time = rows if most_rows is None else min(rows, most_rows)
    if at_a_time < rows and (outside or streamer is not None or cache is not None):
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
        cache = workspace.take(model.network, at_a_time, model.max_length)
    else:
        check_cache(model, cache, rows)
    call = _Call(model, asked, prompts, cache, seed)
    watched = bool(shown or hidden or processors or criteria or of_the_call or not own)
    chooser = None
    try:
        if outside:
            texts = call.texts(model.device)
            if complete:
                masks = prompts.mask.repeat_interleave(asked.copies, 0)
                processors = logits_processors(
                    model, asked, texts, masks, call.budget, processors, of_the_call
                )
            if not beams:
                chooser = BatchChooser(
                    model.ops, asked, texts, call.budget, processors, criteria, complete=complete
                )
        if streamer is not None:
            streamer.put(call.texts("cpu"))
        if by_steps:
            runner = ModelRunner(model.network, cache, workspace.buffers(model.network, cache))
            steps = Steps(model, runner, prompts, asked.copies, hidden=hidden)
        if beams:
            output = run_beam_search(
                model,
                asked,
                steps,
                texts,
                call.budget,
                processors,
                criteria,
                seed,
                skips=not watched,
            )
        elif by_steps:
            assert chooser is not None and seed is not None
            made = sample_steps(steps, asked, call.budget, seed, chooser)
            output = call.run_steps(made, streamer, chooser)
            output["hidden_states"] = None if not hidden else tuple(steps.hidden_states or ())
        else:
            engine = workspace.engine(
                model.network, cache, chunk=CHUNK, chooser=chooser, assistant=assistant
            )
            output = call.run(engine, streamer, chooser)
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


class _Call:
    """One call of generate: its prompts and their requests."""

    def __init__(
        self,
        model: Lfm2PreTrainedModel,
        asked: GenerationArgs,
        prompts: Prompts,
        cache: Cache,
        seed: int | None,
    ) -> None:
        self.asked, self.cache, self.seed, self.ids = asked, cache, seed, prompts.ids
        self.copies = asked.copies
        self.rows, self.width = len(prompts) * self.copies, prompts.ids.shape[1]
        self.prompts = prompts.tokens()
        if any(cache.lengths):
            self._warn_of_lost_context()
        self.budget = asked.new_tokens(prompts.width, model.max_length)
        self.longest = max(map(len, self.prompts), default=0)
        needed = self.longest + self.budget
        if needed > model.max_length:
            raise ValueError(
                f"a prompt of {self.longest} tokens and {self.budget} new ones do not fit into the "
                f"context of {model.max_length}; lower max_new_tokens (or load with a larger "
                "max_length, if the model allows it)"
            )
        if needed > cache.max_length:
            raise ValueError(
                f"past_key_values has a max_length of {cache.max_length}, but a prompt of "
                f"{self.longest} tokens and {self.budget} new ones need {needed}"
            )

    def _warn_of_lost_context(self) -> None:
        """Warn if a filled cache shares no beginning with the prompt, and so is of no use."""
        for number, prompt in enumerate(self.prompts):
            held = self.cache.history[number * self.copies]
            if held and held[0] != prompt[0]:
                warn(
                    f"past_key_values holds {len(held)} tokens with which the prompt of row "
                    f"{number} does not begin: they are dropped; to go on from them, pass the "
                    "whole text, or an attention_mask that counts them too"
                )
                return

    def texts(self, device: torch.device | str) -> torch.Tensor:
        """Return the padded prompt of every row ``[B, T]``."""
        return self.ids.repeat_interleave(self.copies, 0).to(device)

    def run(self, engine: Engine, streamer: Any, chooser: BatchChooser | None) -> dict[str, Any]:
        """Run every request to its end. Return the fields of Hugging Face's output."""
        together = engine.max_rows == self.rows
        firsts: dict[int, int] = {}
        for number, request in enumerate(self._requests(streamer is not None, chooser)):
            first = number * self.copies
            slots = range(first, first + self.copies) if together else None
            firsts[engine.add(request, slots)] = first
        written: list[list[int]] = [[] for _ in range(self.rows)]
        columns = _Columns(streamer, self.rows, self.asked.pad_token_id)
        progress = None if together else progress_bar(self.rows)
        try:
            while engine.busy:
                for event in engine.step():
                    if event.error is not None:
                        raise event.error
                    row = firsts[event.id] + event.index
                    if event.token is not None:
                        written[row].append(event.token)
                    if event.finish_reason is not None:
                        columns.ended.add(row)
                        if progress is not None:
                            progress.update()
                columns.put(written)
        finally:
            if progress is not None:
                progress.close()
            engine.abandon()
        return self._output(written, chooser)

    def run_steps(
        self, steps: Iterator[list[Row]], streamer: Any, chooser: BatchChooser
    ) -> dict[str, Any]:
        """Run steps to the end of every row. Return the fields of Hugging Face's output."""
        columns = _Columns(streamer, self.rows, self.asked.pad_token_id)
        written: list[list[int]] = [[] for _ in range(self.rows)]
        for rows in steps:
            columns.ended.update(row.index for row in rows if row.ended)
            written = [row.written for row in rows]
            columns.put(written)
        return self._output(written, chooser)

    def _requests(self, stream: bool, chooser: BatchChooser | None) -> Iterator[Request]:
        """Make a request of each prompt."""
        asked = self.asked
        assert self.seed is not None
        for number, prompt in enumerate(self.prompts):
            yield Request(
                prompt,
                asked.sampling,
                asked.eos_token_id,
                self.budget,
                # A chooser does this itself, before the processors.
                min_tokens=min(asked.min_new_tokens, self.budget) if chooser is None else 0,
                seed=self.seed,
                first_row=number * self.copies,
                n=self.copies,
                stream=stream,
                prompt_lookup=asked.prompt_lookup_num_tokens,
                lookup_ngram=asked.max_matching_ngram_size,
            )

    def _output(self, written: list[list[int]], chooser: BatchChooser | None) -> dict[str, Any]:
        longest = max(map(len, written), default=0)
        text = torch.full((self.rows, self.width + longest), self.asked.pad_token_id)
        text[:, : self.width] = self.texts("cpu")
        for row, tokens in enumerate(written):
            text[row, self.width :][: len(tokens)] = torch.tensor(tokens)
        asked, made = self.asked, chooser
        return {
            "sequences": text,
            "scores": tuple(made.scores) if made is not None and asked.output_scores else None,
            "logits": tuple(made.logits) if made is not None and asked.output_logits else None,
            "past_key_values": self.cache,
        }


class _Columns:
    """Gives a streamer the new tokens of all rows, one complete column after another."""

    def __init__(self, streamer: Any, rows: int, pad: int) -> None:
        self.streamer, self.rows, self.pad = streamer, rows, pad
        self.ended: set[int] = set()
        self.told = 0

    def put(self, written: list[list[int]]) -> None:
        """Send each column in which every row that has not ended has a token."""
        if self.streamer is None:
            return
        while any(len(tokens) > self.told for tokens in written):
            column = [self.pad] * self.rows
            for row, tokens in enumerate(written):
                if len(tokens) > self.told:
                    column[row] = tokens[self.told]
                elif row not in self.ended:
                    return
            self.told += 1
            self.streamer.put(torch.tensor(column))


def progress_bar(rows: int | None) -> Any:
    """Return a bar on a terminal, if tqdm is there, which comes with transformers."""
    with suppress(ImportError):
        from tqdm.auto import tqdm

        return tqdm(total=rows, unit="row", desc="generate", disable=None)
    return None
