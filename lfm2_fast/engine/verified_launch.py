"""VerifiedLaunch: a step that runs drafted tokens too, and the tokens that it turns out to write.

A row's last token and its draft run as rows of one step, each with the bits of a step of its own.
So the step knows the token that plain decoding chooses behind each of them. A drafted token stands
if it is that token, and then the choice behind it counts. Choices are made in the order of the
text: penalties, constraints, hooks and draws see the written tokens, and no draft.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lfm2_fast.cache.batch import on_device, together_on_device
from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.engine.launch import Written, note
from lfm2_fast.engine.logits import adjusted, requested_log_probs
from lfm2_fast.engine.request import LogProbs, Row
from lfm2_fast.engine.step_buffers import StepBuffers, bucket
from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.models.stream_ring import StreamRing


@dataclass
class Drafted:
    """Row of a verified step, its place among the rows that decode, and its draft.

    ``first`` is where its tokens stand in the step, and ``accepted`` counts those of the draft that
    were written.
    """

    row: Row
    place: int
    draft: Sequence[int]
    first: int = 0
    accepted: int = 0


class VerifiedLaunch:
    """Running step of ``drafted``; ``rows`` are its rows and places, as in a Launch.

    ``late`` is that of ``StepBuffers.run_steps``. ``took`` is its time beside that of a plain step,
    drafting included, as far as it is known.
    """

    def __init__(
        self,
        model: Lfm2,
        buffers: StepBuffers,
        drafted: Sequence[Drafted],
        late: StreamRing | None = None,
    ) -> None:
        self.rows = [(each.row, each.place) for each in drafted]
        self.drafted, self.took = drafted, 1.0
        self._model, self._buffers, self._late = model, buffers, late
        self._open, self._depth = list(drafted), 0
        self._chosen: list[int] | None = None

    def run(self, cache: Cache, size: int) -> int:
        """Run the step, of at most ``size`` tokens; return the tokens that it has.

        The cache must have room for all of them.
        """
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        for each in self.drafted:
            row, each.first = each.row, len(tokens)
            count = 1 + len(each.draft)
            tokens += [row.written[-1], *each.draft]
            slots += [row.slot] * count
            positions += range(row.length - 1, row.length - 1 + count)
            cache.overwrite(row.slot, row.length - 1 + count)
        self._own = own = self._buffers.of_drafts(self._model, cache, size)
        own.load_rows(tokens, slots, positions, cache)
        greedy = not any(row.needs_logits or _draws(row) for row, _ in self.rows)
        size = bucket(len(tokens), cache)
        adapted = own.adapted(self._model, slots)
        own.run_steps(
            self._model,
            cache,
            size,
            choose=greedy,
            verified=True,
            adapted=adapted,
            late=self._late,
        )
        if greedy:
            self._chosen = own.written[-1, : len(tokens)].tolist()
        return size

    def steps(self, cache: Cache) -> Iterator[Written]:
        """Yield the written tokens, one of each row at a time, as ``Launch.steps`` does."""
        while True:
            # The caller may have ended rows after their last tokens.
            self._open = [each for each in self._open if not each.row.ended]
            if not self._open:
                break
            chosen, log_probs = self._choose()
            going, rows = [], []
            for each, token in zip(self._open, chosen, strict=True):
                row = each.row
                cache.commit_token(row.slot, row.written[-1])
                note(row, token)
                row.launched = len(row.written)
                rows.append(row)
                if self._depth < len(each.draft) and each.draft[self._depth] == token:
                    each.accepted += 1
                    going.append(each)
            self._open, self._depth = going, self._depth + 1
            yield rows, chosen, log_probs
        self._go_on()

    def _choose(self) -> tuple[list[int], dict[Row, LogProbs]]:
        """Choose the next token of each open row, after the tokens that it has written."""
        if self._chosen is not None:
            return [self._chosen[each.first + self._depth] for each in self._open], {}
        own, buffers = self._own, self._buffers
        assert own.logits is not None
        device = own.logits.device
        at = on_device([each.first + self._depth for each in self._open], torch.int64, device)
        logits = own.logits[at]
        places = [each.place for each in self._open]
        numbered = [(each.row, number) for number, each in enumerate(self._open)]
        state = buffers.state.pick(places)
        state.positions = on_device([row.length for row, _ in numbered], torch.int64, device)
        chosen = self._model.ops.sample(adjusted(logits, numbered), state)
        if buffers.state.seen is not None:
            buffers.state.seen[on_device(places, torch.int64, device), chosen.clamp(min=0)] = True
        tokens = chosen.tolist()
        return tokens, requested_log_probs(numbered, tokens, logits)

    def _go_on(self) -> None:
        """Let the rows that go on stand at the last tokens of their texts."""
        live = [(row, place) for row, place in self.rows if not row.ended]
        if not live:
            return
        inputs, device = self._buffers.inputs, self._buffers.eos.device
        at, lengths, tokens = together_on_device(
            device,
            ([place for _, place in live], torch.int64),
            ([row.length for row, _ in live], torch.int64),
            ([row.written[-1] for row, _ in live], torch.int64),
        )
        inputs.tokens[at] = tokens
        inputs.positions[at] = lengths - 1
        inputs.lengths[at] = lengths.int()
        self._buffers.state.positions[at] = lengths


def _draws(row: Row) -> bool:
    """Return True if a row does not take the most likely token of the unchanged logits."""
    sampling = row.request.sampling
    return sampling.do_sample or sampling.repetition_penalty != 1.0
