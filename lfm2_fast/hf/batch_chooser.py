"""BatchChooser: the caller's logits processors over all rows of a step, and the scores kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lfm2_fast.cache.batch import on_device
from lfm2_fast.engine.request import Row
from lfm2_fast.hf.generation_args import GenerationArgs
from lfm2_fast.ops.base import Ops
from lfm2_fast.ops.sampling import SamplingState, best_tokens, draw, penalize, warp


class BatchChooser:
    """Chooses the tokens of all rows of a step as Hugging Face does.

    ``text [B, T]`` begins as the padded prompts, and gets each new token; stopped rows get padding.
    With ``complete`` the processors do everything that the arguments ask for. Without it they run
    between penalties and filters. Processors see the whole batch, with zeros for stopped rows.
    ``criteria`` are called after each step. ``scores`` and ``logits`` keep those of every step,
    ``[B, V]`` float32, if the caller wants them.
    """

    def __init__(
        self,
        ops: Ops,
        asked: GenerationArgs,
        prompts: torch.Tensor,
        budget: int,
        processors: Sequence[Any],
        criteria: Sequence[Any],
        *,
        complete: bool = False,
    ) -> None:
        self.ops, self.asked, self.processors = ops, asked, processors
        self.criteria, self.complete = criteria, complete
        self.rows, self.width = prompts.shape
        self.count = self._judged = 0
        self._verdict: list[bool] = []
        self._text = prompts.new_full((self.rows, self.width + budget), asked.pad_token_id)
        self._text[:, : self.width] = prompts
        ends = list(asked.eos_token_id)
        self._eos = on_device(ends, torch.int64, prompts.device)
        self.scores: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []

    @property
    def text(self) -> torch.Tensor:
        """Ids ``[B, T]``: the prompts and the new tokens so far."""
        return self._text[:, : self.width + self.count]

    @property
    def changes_logits(self) -> bool:
        """Return True if processors, or a minimum of new tokens, change the latest logits."""
        return bool(self.processors) or self.count <= self.asked.min_new_tokens

    def __call__(
        self, rows: Sequence[Row], logits: torch.Tensor, state: SamplingState
    ) -> torch.Tensor:
        """Return the next tokens ``[N]`` of the rows, from ``logits [N, V]``."""
        here = on_device([_place(row) for row in rows], torch.int64, logits.device)
        asked = self.asked
        kept = asked.output_scores or asked.output_logits
        if self.processors or kept or self.count < asked.min_new_tokens:
            tokens = self._choose(logits.float(), here, state)
        else:
            tokens = self.ops.sample(logits, state)
        # A row without a token has ended, but processors of other rows index by its token.
        pad = self.asked.pad_token_id
        self._text[here, self.width + self.count] = tokens.where(tokens >= 0, pad)
        self.count += 1
        return tokens

    def ends(self, row: Row) -> bool:
        """Return True if the caller's criteria end the row. They are called once a step."""
        if self.criteria and self._judged < self.count:
            scores = tuple(self.scores) if self.asked.output_scores else None
            stop = torch.zeros(self.rows, dtype=torch.bool)
            for criterion in self.criteria:
                verdict = torch.as_tensor(criterion(self.text, scores))
                stop |= verdict.to(stop.device).expand(self.rows)
            self._verdict, self._judged = stop.tolist(), self.count
        return bool(self.criteria) and self._verdict[_place(row)]

    def _choose(
        self, logits: torch.Tensor, here: torch.Tensor, state: SamplingState
    ) -> torch.Tensor:
        asked, scores = self.asked, logits
        if state.seen is not None and not self.complete:
            scores = penalize(scores, state.seen, state.repetition_penalty)
        if self.count < asked.min_new_tokens and not self.complete:
            scores = scores.index_fill(1, self._eos, -torch.inf)
        if self.processors:
            whole = self._whole(scores, here)
            for processor in self.processors:
                whole = processor(self.text, whole)
            scores = whole[here]
        if asked.sampling.do_sample:
            scores = scores if self.complete else warp(scores, state)
            tokens = draw(scores, state)
        else:
            tokens = best_tokens(scores)
            if self.processors:
                tokens = _forced(tokens, scores, logits)
        state.record(tokens)
        if asked.output_logits:
            self.logits.append(self._whole(logits, here))
        if asked.output_scores:
            self.scores.append(self._whole(scores, here))
        return tokens

    def _whole(self, values: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
        """Return ``values`` of the rows ``here``, with zeros for stopped rows."""
        whole = values.new_zeros(self.rows, values.shape[1])
        whole[here] = values
        return whole


def _place(row: Row) -> int:
    """Return the row's place in the batch."""
    return row.request.first_row + row.index


def _forced(tokens: torch.Tensor, scores: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return ``tokens [N]``, or the token whose score processors made infinite to force it.

    As in Hugging Face's greedy decoding. The token's own logit is finite then.
    """
    best = scores.argmax(-1, keepdim=True)
    forced = (scores.gather(1, best) == torch.inf) & logits.gather(1, best).isfinite()
    return torch.where(forced, best, tokens[:, None])[:, 0]
