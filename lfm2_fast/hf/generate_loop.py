"""The loop of ``generate``: prompts are run, then rows are written token by token until they stop.

Rows run at their own lengths and leave when they stop; padding exists only in what callers see.
With logits processors, stopping criteria, scores or min_new_tokens, Python runs between steps and
all rows run at once (``run_with_hooks``). Without them, steps run back to back and prompts may wait
for a free row (``run_without_hooks``).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from lfm2_fast.cache.batch import on_device
from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.cache.prefix_index import common_prefix
from lfm2_fast.engine.decode import no_token, sampling_state
from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.model_runner import CHUNK, ModelRunner
from lfm2_fast.engine.request import Request, Row
from lfm2_fast.engine.step_buffers import MAX_STEPS
from lfm2_fast.hf.generation_args import GenerationArgs
from lfm2_fast.hf.packing import check_cache
from lfm2_fast.hf.pretrained import Lfm2PreTrainedModel
from lfm2_fast.ops.sampling import best_tokens, draw, penalize, warp


def run_generate_loop(
    model: Lfm2PreTrainedModel,
    asked: GenerationArgs,
    ids: torch.Tensor,
    mask: torch.Tensor,
    cache: Cache | None,
    seed: int,
    *,
    processors: list[Any],
    criteria: list[Any],
    streamer: Any,
    most_rows: int | None,
) -> dict[str, Any]:
    """Continue the prompts, ``ids`` and ``mask [B, T]``; the fields of Hugging Face's output."""
    rows = len(ids) * asked.num_return_sequences
    if most_rows is not None and most_rows < 1:
        raise ValueError(f"max_batch_size must be at least 1, got {most_rows}")
    shown = asked.output_scores or asked.output_logits
    outside = bool(processors or criteria or shown or asked.min_new_tokens)
    at_a_time = rows if most_rows is None else min(rows, most_rows)
    if at_a_time < rows and (outside or streamer is not None or cache is not None):
        raise ValueError(
            f"max_batch_size={most_rows} is less than {rows} rows, but streamer, past_key_values, "
            "min_new_tokens, scores, stop_strings, logits_processor and stopping_criteria need all "
            "rows at a time; leave max_batch_size out, or pass fewer prompts"
        )
    own = cache is None
    if cache is None:
        cache = model.borrow_cache(at_a_time)
    else:
        check_cache(model, cache, rows)
    loop = _GenerateLoop(model, asked, ids, mask, cache, seed, at_a_time)
    try:
        if streamer is not None:
            streamer.put(ids.repeat_interleave(asked.num_return_sequences, 0).cpu())
        if outside:
            output = loop.run_with_hooks(processors, criteria, streamer)
        else:
            output = loop.run_without_hooks(streamer)
    except torch.OutOfMemoryError as error:
        held = cache.nbytes + (0 if cache.kept is None else cache.kept.nbytes)
        raise torch.OutOfMemoryError(
            f"{at_a_time} rows of up to {loop.longest + loop.budget} tokens do not fit into "
            f"the device's memory (the cache and its buffers have {held / 2**20:.0f} MiB so far); "
            "lower max_batch_size, max_new_tokens, num_return_sequences or the length of the "
            f"prompts, or load a smaller dtype or quantization ({error})"
        ) from error
    finally:
        if streamer is not None:
            streamer.end()
    if own and not asked.return_dict_in_generate:
        model.give_back(cache)
    return output


class _GenerateLoop:
    """One call of generate: its prompts, its cache, and what has been written so far."""

    def __init__(
        self,
        model: Lfm2PreTrainedModel,
        asked: GenerationArgs,
        ids: torch.Tensor,
        mask: torch.Tensor,
        cache: Cache,
        seed: int,
        at_a_time: int,
    ) -> None:
        self.model, self.asked, self.cache, self.seed = model, asked, cache, seed
        self.copies = asked.num_return_sequences
        self.rows, self.width = len(ids) * self.copies, ids.shape[1]
        self.at_a_time = at_a_time
        self.ids = ids
        self.prompts = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        self.budget = asked.new_tokens(self.width, model.max_length)
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
        self.runner = ModelRunner(model.network, cache)

    def run_without_hooks(self, streamer: Any) -> dict[str, Any]:
        """Write without looking at any step; rows that wait take the slots of those that stop."""
        asked = self.asked
        # Who watches the tokens come gets each when it is there.
        max_steps = MAX_STEPS if streamer is None else 1
        engine = Engine(self.model.network, cache=self.cache, chunk=CHUNK, max_steps=max_steps)
        together = self.at_a_time == self.rows
        firsts: dict[int, int] = {}
        for number, request in enumerate(self._requests()):
            first = number * self.copies
            slots = range(first, first + self.copies) if together else None
            firsts[engine.add(request, slots)] = first
        written: list[list[int]] = [[] for _ in range(self.rows)]
        progress = None if together else _progress(self.rows)
        columns = _Columns(streamer, self.rows, asked.pad_token_id)
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
        longest = max(map(len, written), default=0)
        text = torch.full((self.rows, self.width + longest), asked.pad_token_id)
        text[:, : self.width] = self.ids.repeat_interleave(self.copies, 0)
        for row, tokens in enumerate(written):
            text[row, self.width :][: len(tokens)] = torch.tensor(tokens)
        return self._output(text, [], [])

    def run_with_hooks(
        self, processors: list[Any], criteria: list[Any], streamer: Any
    ) -> dict[str, Any]:
        """Write with the caller's Python between the steps, or what it wants to see of them."""
        asked, device = self.asked, self.model.device
        shown = asked.output_scores or asked.output_logits
        rows = self._rows()
        text = torch.full((self.rows, self.width + self.budget), asked.pad_token_id, device=device)
        text[:, : self.width] = self.ids.repeat_interleave(self.copies, 0)
        eos = torch.tensor(asked.eos_token_id, dtype=torch.int64, device=device)
        kept_scores: list[torch.Tensor] = []
        kept_logits: list[torch.Tensor] = []
        live = list(range(self.rows))
        written = 0
        logits = self._prefill(rows) if rows else torch.empty(0)
        state = sampling_state(self.model.network, rows)
        while live and written < self.budget:
            here = torch.tensor(live, device=device)
            if processors or shown or written < asked.min_new_tokens:
                logits = logits.float()
                scores = logits
                if state.seen is not None:
                    scores = penalize(scores, state.seen, state.repetition_penalty)
                if written < asked.min_new_tokens:
                    scores = scores.index_fill(1, eos, -torch.inf)
                if processors:
                    whole = self._whole(scores, here)
                    for processor in processors:
                        whole = processor(text[:, : self.width + written], whole)
                    scores = whole[here]
                if asked.sampling.do_sample:
                    scores = warp(scores, state)
                    tokens = draw(scores, state)
                else:
                    tokens = best_tokens(scores)
                    if processors:
                        tokens = _forced(tokens, scores, logits)
                state.record(tokens)
                if asked.output_logits:
                    kept_logits.append(self._whole(logits, here))
                if asked.output_scores:
                    kept_scores.append(self._whole(scores, here))
            else:
                tokens = self.model.ops.sample(logits, state)
            told = dict(zip(live, tokens.tolist(), strict=True))
            for place, token in told.items():
                if token < 0:
                    processed = bool(processors) or written < asked.min_new_tokens
                    dtype = self.model.dtype
                    raise no_token(rows[place], written + 1, dtype, processed=processed)
            column = self.width + written
            text[here, column] = tokens
            written += 1
            if streamer is not None:
                streamer.put(text[:, column].cpu())
            stop = torch.isin(tokens, eos)
            past = tuple(kept_scores) if asked.output_scores and criteria else None
            for criterion in criteria:
                verdict = torch.as_tensor(criterion(text[:, : column + 1], past))
                stop |= verdict.to(stop.device).expand(self.rows)[here]
            going = [row for row, end in zip(live, stop.tolist(), strict=True) if not end]
            if len(going) < len(live):
                state = state.pick([live.index(row) for row in going])
            if going and written < self.budget:
                logits = self.runner.step([told[row] for row in going], going)
            live = going
        return self._output(text[:, : self.width + written], kept_scores, kept_logits)

    def _requests(self) -> list[Request]:
        """Return a request for each prompt."""
        asked = self.asked
        return [
            Request(
                prompt,
                asked.sampling,
                asked.eos_token_id,
                self.budget,
                seed=self.seed,
                first_row=number * self.copies,
                n=self.copies,
            )
            for number, prompt in enumerate(self.prompts)
        ]

    def _rows(self) -> list[Row]:
        """Return the rows that are to be written, in their order, each in its slot."""
        return [
            Row(0, request, index, limit=self.budget, arrival=0, slot=request.first_row + index)
            for request in self._requests()
            for index in range(self.copies)
        ]

    def _prefill(self, rows: Sequence[Row]) -> torch.Tensor:
        """Run what the cache does not hold of each row's prompt, a prompt of several rows once."""
        firsts: dict[int, Row] = {}
        for row in rows:
            firsts.setdefault(row.slot // self.copies, row)
        rest = []
        for prompt, row in ((self.prompts[number], row) for number, row in firsts.items()):
            # The last token runs in any case: its logits are what comes next.
            shared = common_prefix(prompt[:-1], self.cache.history[row.slot])
            rest.append(prompt[self.cache.go_back(row.slot, shared) :])
        logits = self.runner.prefill(rest, [row.slot for row in firsts.values()])
        order = {number: place for place, number in enumerate(firsts)}
        for row in rows:
            first = firsts[row.slot // self.copies]
            if row is not first:
                self.cache.copy(first.slot, row.slot)
        if len(firsts) == len(rows):
            return logits
        at = [order[row.slot // self.copies] for row in rows]
        return logits[on_device(at, torch.int64, logits.device)]

    def _whole(self, values: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
        """``values`` of the live rows among zeros for those that have stopped."""
        whole = values.new_zeros(self.rows, values.shape[1])
        whole[here] = values
        return whole

    def _output(
        self, text: torch.Tensor, scores: list[torch.Tensor], logits: list[torch.Tensor]
    ) -> dict[str, Any]:
        return {
            "sequences": text,
            "scores": tuple(scores) if self.asked.output_scores else None,
            "logits": tuple(logits) if self.asked.output_logits else None,
            "past_key_values": self.cache,
        }


def _forced(tokens: torch.Tensor, scores: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """``tokens [B]``, but the token whose score processors made infinite where they forced one.

    As in Hugging Face's greedy decoding. The token's own logit is finite then.
    """
    best = scores.argmax(-1, keepdim=True)
    forced = (scores.gather(1, best) == torch.inf) & logits.gather(1, best).isfinite()
    return torch.where(forced, best, tokens[:, None])[:, 0]


class _Columns:
    """Hands a streamer the new tokens of all rows, column by column, as each is complete."""

    def __init__(self, streamer: Any, rows: int, pad: int) -> None:
        self.streamer, self.rows, self.pad = streamer, rows, pad
        self.ended: set[int] = set()
        self.told = 0

    def put(self, written: list[list[int]]) -> None:
        """Hand out each column in which every row that has not ended has a token."""
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


def _progress(rows: int) -> Any:
    """A bar on a terminal, if tqdm is there, which comes with transformers."""
    with suppress(ImportError):
        from tqdm.auto import tqdm

        return tqdm(total=rows, unit="row", desc="generate", disable=None)
    return None
