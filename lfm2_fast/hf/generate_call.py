"""One call of ``generate``: requests of its prompts, and its tokens as Hugging Face gives them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.request import Request, Row
from lfm2_fast.hf.batch_chooser import BatchChooser
from lfm2_fast.hf.generation_args import GenerationArgs, warn
from lfm2_fast.hf.pretrained import Lfm2PreTrainedModel
from lfm2_fast.hf.prompts import Prompts


class GenerateCall:
    """One call of generate: its prompts, their requests, and the answer.

    ``seed`` may be None if torch's own generator draws. Raises ValueError if the prompts and new
    tokens do not fit into the model's context or the cache.
    """

    def __init__(
        self,
        model: Lfm2PreTrainedModel,
        asked: GenerationArgs,
        prompts: Prompts,
        cache: Cache,
        seed: int | None,
    ) -> None:
        self.model, self.source = model, prompts
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
        columns = Columns(streamer, self.rows, self.asked.pad_token_id)
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
        columns = Columns(streamer, self.rows, self.asked.pad_token_id)
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


class Columns:
    """Gives a streamer the new tokens of all rows, one complete column after another."""

    def __init__(self, streamer: Any, rows: int, pad: int) -> None:
        self.streamer, self.rows, self.pad = streamer, rows, pad
        self.ended: set[int] = set()
        self.sent = 0

    def put(self, written: list[list[int]]) -> None:
        """Send each column in which every row that has not ended has a token."""
        if self.streamer is None:
            return
        while any(len(tokens) > self.sent for tokens in written):
            column = [self.pad] * self.rows
            for row, tokens in enumerate(written):
                if len(tokens) > self.sent:
                    column[row] = tokens[self.sent]
                elif row not in self.ended:
                    return
            self.sent += 1
            self.streamer.put(torch.tensor(column))


def progress_bar(rows: int | None) -> Any:
    """Return a bar on a terminal, if tqdm is there, which comes with transformers."""
    with suppress(ImportError):
        from tqdm.auto import tqdm

        return tqdm(total=rows, unit="row", desc="generate", disable=None)
    return None
