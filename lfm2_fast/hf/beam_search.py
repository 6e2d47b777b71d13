"""Beam search: transformers' own, on rows of a cache that fork and share their pages.

Transformers' class chooses the beams, so scores, ties and ends are those of transformers. The
model's steps, and the exchange of rows after each step, are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lfm2_fast.cache.batch import on_device
from lfm2_fast.engine.decode import no_token
from lfm2_fast.engine.request import Request, Row
from lfm2_fast.hf.generation_args import GenerationArgs
from lfm2_fast.hf.generation_mixin import generation_mixin, not_known
from lfm2_fast.hf.processors import generation_config
from lfm2_fast.hf.steps import Steps

USER = "num_beams"


def run_beam_search(
    model: Any,
    asked: GenerationArgs,
    steps: Steps,
    texts: torch.Tensor,
    budget: int,
    processors: Sequence[Any],
    criteria: Sequence[Any],
    seed: int | None,
    *,
    skips: bool,
) -> dict[str, Any]:
    """Continue prompts by beam search. Return the fields of Hugging Face's output.

    ``steps`` run the rows, of which ``texts [B * num_beams, T]`` are the padded ids. Draws are
    decided by ``seed``, or by torch's own generator without one. With ``skips`` the beams of a
    prompt stop when its answers are decided, because no caller sees their further steps. Raises
    LogitsError where a row has no logits, or the beams of a prompt no finite score, and
    RuntimeError for a version of transformers that does otherwise.
    """
    from transformers import (
        EosTokenCriteria,
        LogitsProcessorList,
        MaxLengthCriteria,
        StoppingCriteriaList,
    )

    beams = Beams(asked, steps)
    if seed is not None:
        beams.generator = torch.Generator(texts.device).manual_seed(seed % 2**63)

    rules: list[Any] = [MaxLengthCriteria(texts.shape[1] + budget), *criteria]
    if asked.eos_token_id and EosTokenCriteria not in map(type, criteria):
        rules.append(EosTokenCriteria(list(asked.eos_token_id)))
    output = _search(model, beams, skips=skips)._beam_search(
        texts,
        logits_processor=LogitsProcessorList([*processors, beams.check_scores]),
        stopping_criteria=StoppingCriteriaList(rules),
        generation_config=generation_config(asked, texts, budget),
        use_cache=True,
        past_key_values=beams,
    )
    # Without end tokens, transformers pads with -1, which no tokenizer knows.
    output["sequences"] = output.sequences.where(output.sequences >= 0, asked.pad_token_id)
    return {**output, "past_key_values": steps.cache}


def _search(model: Any, beams: Beams, *, skips: bool) -> Any:
    """Return the model as transformers' beam search calls it."""
    asked, steps = beams.asked, beams.steps

    class Search(generation_mixin(USER)):  # type: ignore[misc]
        config = model.config

        def _prefill(self, *_: Any, **__: Any) -> Output:
            return beams.begin()

        def prepare_inputs_for_generation(self, ids: torch.Tensor, **_: Any) -> dict[str, Any]:
            return {"input_ids": ids}

        def __call__(self, input_ids: torch.Tensor, **_: Any) -> Output:
            return beams.step(input_ids[:, -1].tolist())

        def _update_model_kwargs_for_generation(
            self, outputs: Any, model_kwargs: dict[str, Any], **_: Any
        ) -> dict[str, Any]:
            return model_kwargs

        def _beam_search_has_unfinished_sequences(
            self, improvable: torch.Tensor, finished: torch.Tensor, *others: Any
        ) -> Any:
            if skips:
                full = finished.all(-1) & (asked.early_stopping is True)
                certain = (~improvable[:, 0] | full).tolist()
                beams.running = [row for row in steps.rows if not certain[row // asked.num_beams]]
            return super()._beam_search_has_unfinished_sequences(improvable, finished, *others)

        def __getattr__(self, name: str) -> Any:
            raise not_known(USER, name)

        def _get_top_k_continuations(
            self, accumulated_log_probs: torch.Tensor, *, do_sample: bool, **others: Any
        ) -> Any:
            if not do_sample:
                return super()._get_top_k_continuations(
                    accumulated_log_probs, do_sample=False, **others
                )
            # Transformers' draw, but with the call's own generator. Ranks let its method arrange
            # the result.
            odds, count = accumulated_log_probs.softmax(-1), others["beams_to_keep"]
            drawn = torch.multinomial(odds, count, generator=beams.generator)
            ranks = torch.full_like(odds, -torch.inf)
            ranks.scatter_(1, drawn, -torch.arange(count).expand_as(drawn).to(odds))
            _, sequences, indices = super()._get_top_k_continuations(
                ranks, do_sample=False, **others
            )
            return accumulated_log_probs.gather(1, drawn), sequences, indices

    return Search()


@dataclass
class Output:
    """Logits ``[N, 1, V]`` of every row's last token, and hidden states if they are kept."""

    logits: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None


class Beams:
    """Rows ``i * num_beams`` and on are the beams of prompt i."""

    def __init__(self, asked: GenerationArgs, steps: Steps) -> None:
        self.asked, self.steps, self.count = asked, steps, asked.num_beams
        self.generator: torch.Generator | None = None
        self.running: Sequence[int] = steps.rows
        self.number = 0

    def begin(self) -> Output:
        """Run the prompts."""
        return self._checked(self.steps.begin())

    def step(self, tokens: Sequence[int]) -> Output:
        """Run one more token of every live row. The other rows get logits of zeros."""
        running, steps = self.running, self.steps
        if len(running) == len(steps.rows):
            return self._checked(steps.step(tokens, running))
        shape = (len(steps.rows), steps.network.config.vocab_size)
        logits = torch.zeros(shape, dtype=steps.network.dtype, device=steps.device)
        if running:
            at = on_device(running, torch.int64, steps.device)
            logits[at] = steps.step([tokens[row] for row in running], running)
        return self._checked(logits)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let each row continue from the row in ``beam_idx [N]``."""
        self.steps.cache.reorder(dict(enumerate(beam_idx.tolist())))

    def check_scores(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return ``scores [N, V]``. Raises LogitsError if a prompt has no finite score."""
        best = scores.amax(-1).view(-1, self.count).amax(-1)
        stuck = (best.isnan() | (best == -torch.inf)).nonzero()[:, 0].tolist()
        firsts = [prompt * self.count for prompt in stuck]
        self._raise_for([row for row in firsts if row in self.running], processed=True)
        return scores

    def _checked(self, logits: torch.Tensor) -> Output:
        self.number += 1
        wrong = (~logits.amax(-1).isfinite()).nonzero()[:, 0].tolist()
        self._raise_for(wrong, processed=False)
        states = self.steps.hidden_states
        return Output(logits[:, None], None if states is None else states[-1])

    def _raise_for(self, rows: Sequence[int], *, processed: bool) -> None:
        """Raise LogitsError for the first of ``rows``, if there is one."""
        for place in rows:
            text = self.steps.prompts.tokens()[place // self.count]
            request = Request(text, self.asked.sampling)
            row = Row(id=0, request=request, index=place, limit=0, arrival=0)
            raise no_token(row, self.number, self.steps.network.dtype, processed=processed)
