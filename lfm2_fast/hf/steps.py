"""Steps outside of an engine: for beams, for prompts of embeddings, and for hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lfm2_fast.cache.batch import Batch, on_device
from lfm2_fast.cache.prefix_index import common_prefix
from lfm2_fast.engine.decode import no_token
from lfm2_fast.engine.model_runner import ModelRunner
from lfm2_fast.engine.request import Request, Row
from lfm2_fast.engine.step_rows import sampling_state
from lfm2_fast.hf.batch_chooser import BatchChooser
from lfm2_fast.hf.generation_args import GenerationArgs
from lfm2_fast.hf.prompts import Prompts
from lfm2_fast.ops.sampling import SamplingParams


class Steps:
    """Rows of a cache: ``begin`` runs the prompts, then ``step`` one more token of each row.

    Rows ``i * copies`` and on are those of prompt i, in the slots of these numbers. With ``hidden``
    steps are not captured, and ``hidden_states`` keeps those of every step. These are the embedding
    and every layer's output, ``[N, T, H]``, with zeros at padding.
    """

    def __init__(
        self, model: Any, runner: ModelRunner, prompts: Prompts, copies: int, *, hidden: bool
    ) -> None:
        self.network, self.device = model.network, model.device
        self.runner, self.cache = runner, runner.cache
        self.prompts, self.copies = prompts, copies
        self.rows = range(len(prompts) * copies)
        self.hidden_states: list[tuple[torch.Tensor, ...]] | None = [] if hidden else None

    def begin(self) -> torch.Tensor:
        """Run each prompt in its first slot, fork the others, and return the logits ``[N, V]``."""
        firsts, prompts = self.rows[:: self.copies], self.prompts
        self.cache.reset(set(self.rows) - set(firsts))
        if prompts.embeds is None and self.hidden_states is None:
            rests = []
            for slot, text in zip(firsts, prompts.tokens(), strict=True):
                shared = common_prefix(text[:-1], self.cache.history[slot])
                rests.append(text[self.cache.go_back(slot, shared) :])
            logits = self.runner.prefill(rests, firsts)
        else:
            logits = self._run_prompts(firsts)
        self.cache.reorder({slot: slot - slot % self.copies for slot in self.rows})
        return logits.repeat_interleave(self.copies, 0)

    def step(self, tokens: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
        """Run one more token of each of ``rows``, and return the logits ``[len(rows), V]``."""
        if self.hidden_states is None:
            return self.runner.step(tokens, rows)
        batch = self.cache.next_batch([1] * len(rows), rows, self.device)
        x, states = self._run(on_device(tokens, torch.int64, self.device), None, batch)
        at = on_device(rows, torch.int64, self.device)
        self.hidden_states.append(tuple(self._all_rows(each, at) for each in states))
        return self.network.logits(x, batch.last_rows)

    def _run_prompts(self, firsts: Sequence[int]) -> torch.Tensor:
        """Run whole prompts, or their new tokens, in one forward pass."""
        prompts = self.prompts
        for slot, before in zip(firsts, prompts.before, strict=True):
            self.cache.go_back(slot, len(before))
        counts = prompts.mask.sum(-1).tolist()
        batch = self.cache.next_batch(counts, firsts, self.device)
        tokens = embeds = None
        if prompts.embeds is None:
            tokens = prompts.ids[prompts.mask].to(self.device)
        else:
            embeds = prompts.embeds[prompts.mask.to(self.device)]
        x, states = self._run(tokens, embeds, batch)
        if self.hidden_states is not None:
            self.hidden_states.append(tuple(self._padded(each) for each in states))
        return self.network.logits(x, batch.last_rows)

    def _run(
        self, tokens: torch.Tensor | None, embeds: torch.Tensor | None, batch: Batch
    ) -> tuple[Any, list[torch.Tensor]]:
        """Run a batch and count it in the cache. Return stream and hidden states, ``[T, H]``."""
        collected: list[torch.Tensor] | None = None if self.hidden_states is None else []
        self.cache.reserve(batch)
        x = self.network.run_blocks(tokens, batch, self.cache, embeds=embeds, collected=collected)
        self.cache.commit_batch(batch)
        if tokens is not None:
            counts = list(batch.required_host.query_lengths)
            self.cache.record_tokens(batch, (c.tolist() for c in tokens.cpu().split(counts)))
        return x, [] if collected is None else [*collected[:-1], self.network.last_norm(x)]

    def _padded(self, values: torch.Tensor) -> torch.Tensor:
        """Return packed ``values [T, H]`` of the prompts as every row's ``[N, T, H]``."""
        mask = self.prompts.mask.to(self.device)
        full = values.new_zeros(*mask.shape, values.shape[-1])
        full[mask] = values
        return full.repeat_interleave(self.copies, 0)

    def _all_rows(self, values: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Return ``values`` of the rows ``at``, with zeros for the others, ``[N, 1, H]``."""
        full = values.new_zeros(len(self.rows), 1, values.shape[-1])
        full[at, 0] = values
        return full


def sample_steps(
    steps: Steps, asked: GenerationArgs, budget: int, seed: int, chooser: BatchChooser
) -> Iterator[list[Row]]:
    """Yield all rows after each step, until every row has ended.

    A row has the same draws as in the engine. Raises LogitsError for a row without a token to
    choose.
    """
    sampling, network = SamplingParams(asked.sampling.do_sample), steps.network
    rows = [
        Row(
            id=0,
            # Only the number of these tokens is used: it gives the positions of the draws.
            request=Request([0] * len(text), sampling, asked.eos_token_id, seed=seed),
            index=number * steps.copies + copy,
            limit=budget,
            arrival=0,
            slot=number * steps.copies + copy,
        )
        for number, text in enumerate(steps.prompts.tokens())
        for copy in range(steps.copies)
    ]
    if not rows:
        return
    live, logits = rows, steps.begin()
    while live:
        tokens = chooser(live, logits, sampling_state(network, live)).tolist()
        for row, token in zip(live, tokens, strict=True):
            number = len(row.written) + 1
            if token < 0:
                raise no_token(row, number, network.dtype, processed=chooser.changes_logits)
            row.written.append(token)
            row.ended = token in row.ends or number == budget
        for row in live:
            row.ended |= chooser.ends(row)
        yield rows
        live = [row for row in live if not row.ended]
        if live:
            logits = steps.step([row.written[-1] for row in live], [row.slot for row in live])
