"""Steps: rows that are written together, a token each, on buffers that stay where they are.

On a GPU a step is one captured graph per bucket of rows (1, 2, 4, ...): the forward pass, the
choice of tokens, and the next step's inputs; of few rows, whose steps are short, a graph has
several. The host launches the next before it has read the tokens of the one before, and so never
waits for the newest. It therefore learns late that a row has ended; the device knows at once, and
the row runs on without effect. On a CPU the same steps have as many rows as are live, and are read
at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lfm2_fast.cache.batch import on_device
from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.engine.step_buffers import TOGETHER, Buffers, bucket
from lfm2_fast.hf.causal_lm import Lfm2ForCausalLM
from lfm2_fast.ops.sampling import SamplingParams, SamplingState

# Room is made for so many tokens at once, or for more that take so many bytes: when pages move,
# every graph is captured anew.
AHEAD, AHEAD_BYTES = 256, 2**26
# Rows whose steps are launched several at a time: those of more take the device longer than the
# host, and what a row that has ended runs in vain would cost the others more.
FEW = 4


@dataclass
class Row:
    """A sequence while it is written: its slot, and its tokens after the prompt, as far as read."""

    number: int
    slot: int
    start: int  # tokens of the prompt
    limit: int  # tokens to write at most
    written: list[int] = field(default_factory=list)
    asked: int = 0  # tokens to write that the device was asked for
    ended: bool = False


@dataclass
class Launch:
    """Steps under way: a place of their ``tokens [steps, B]`` on the host for every row in them.

    They are there when ``copied``, an event, has come; None if they are. ``read`` steps were read.
    """

    rows: list[tuple[Row, int]]
    tokens: torch.Tensor
    copied: Any
    read: int = 0

    def rest(self) -> list[list[int]]:
        """The tokens of each step that was not read; waits for them."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tokens[self.read :].tolist()


class Steps:
    """Rows that are written together: ``admit`` them, then ``launch`` and ``read`` until none runs.

    ``lag`` is how many launches there are before the first of them is read, ``together`` how many
    steps of few rows a launch has at most, where there is a lag.
    """

    def __init__(
        self,
        model: Lfm2ForCausalLM,
        cache: Cache,
        params: SamplingParams,
        eos: Sequence[int],
        *,
        lag: int | None = None,
        together: int = TOGETHER,
    ) -> None:
        self.model, self.cache = model, cache
        self.lag = int(model.ops.captures) if lag is None else lag
        self.together = together if self.lag else 1
        token = model.config.cache_bytes(model.dtype.itemsize) * max(cache.slots, 1)
        self.ahead = max(AHEAD, AHEAD_BYTES // max(token, 1))
        self.buffers = Buffers.of(model, cache)
        self.buffers.begin(cache, params, eos, model.config.vocab_size)
        self.eos = frozenset(eos)
        self.places: list[Row | None] = []
        self._unread: deque[Launch] = deque()

    @property
    def unread(self) -> int:
        """How many launches were not read to the end."""
        return len(self._unread)

    def admit(self, rows: Sequence[Row], logits: torch.Tensor, state: SamplingState) -> None:
        """Choose the first tokens of prompts that have run, by ``logits [B, V]``, and go on."""
        self._retire()
        buffers, device = self.buffers, self.model.device
        free = [place for place, row in enumerate(self.places) if row is None]
        places = (free + list(range(len(self.places), len(self.places) + len(rows))))[: len(rows)]
        at = on_device(places, torch.int64, device)
        chosen = self.model.ops.sample(logits, state)
        slots = on_device([row.slot for row in rows], torch.int64, device)
        # Each stands at the last token of its prompt.
        positions = on_device([row.start - 1 for row in rows], torch.int64, device)
        lengths = (positions + 1).int()
        finished, tokens = torch.zeros_like(slots, dtype=torch.bool), torch.empty_like(slots)
        inputs = (tokens, slots, positions, lengths, finished)
        self.model.ops.advance(chosen, buffers.eos, self.cache.scrap, *inputs)
        for ours, made in zip(buffers.inputs, inputs, strict=True):
            ours[at] = made
        buffers.put(places, state)
        for place, row in zip(places, rows, strict=True):
            row.asked = 1
            self.places[place : place + 1] = [row]
        self._await(list(zip(rows, range(len(rows)), strict=True)), chosen[None])

    def launch(self) -> int:
        """Launch steps of the rows that go on; how many, 0 if there are no such rows."""
        self._retire()
        self._shrink()
        going = [(row, place) for place, row in enumerate(self.places) if row is not None]
        if not going:
            return 0
        needed = max(row.start + row.asked for row, _ in going)
        most = max(row.start + row.limit - 1 for row, _ in going)
        self.cache.make_room(max(needed, min(needed + self.ahead, most, self.cache.max_length)))
        steps = self.together if len(self.places) <= FEW else 1
        # All that a launch writes is wanted, and has a place in the cache.
        if steps > min(row.limit - row.asked for row, _ in going) or (
            needed + steps - 1 > self.cache.max_length
        ):
            steps = 1
        for row, _ in going:
            self.cache.expect(row.slot, row.start + row.asked + steps - 1)
        count = bucket(len(self.places), self.cache)
        self.buffers.run(self.model, self.cache, count, choose=True, steps=steps)
        for row, _ in going:
            row.asked += steps
        self._await(going, self.buffers.written[-steps:])
        return steps

    def read(self, keep: int) -> Iterator[tuple[list[Row], list[int]]]:
        """Tokens of all launches but the last ``keep``, step by step: rows, and a token for each.

        They are the rows that were running; one that its token ends is marked as such.
        """
        while len(self._unread) > keep:
            launch = self._unread[0]
            for tokens in launch.rest():
                rows = []
                for row, column in launch.rows:
                    if row.ended:
                        continue
                    # The step has run the token before; the first step was the prompt's.
                    if row.written:
                        self.cache.note(row.slot, row.written[-1])
                    row.written.append(tokens[column])
                    row.ended = tokens[column] in self.eos or len(row.written) == row.limit
                    if row.ended:
                        # Whatever is under way, the device has gone one token on at most.
                        ran = min(row.asked - 1, len(row.written))
                        self.cache.expect(row.slot, row.start + ran)
                    rows.append(row)
                launch.read += 1
                if rows:  # steps that were under way when the last row ended have none
                    yield rows, [row.written[-1] for row in rows]
            self._unread.popleft()

    def settle(self) -> None:
        """Count what was launched and not read, so that the cache says what it holds.

        If that fails, nothing is known, and the slots are empty.
        """
        try:
            for _ in self.read(0):
                pass
        except BaseException:
            self._unread.clear()
            self.cache.reset()
            raise

    def _retire(self) -> None:
        """Empty the places of rows that have ended, or need no more than they were asked for."""
        for place, row in enumerate(self.places):
            if row is not None and (row.ended or row.asked == row.limit):
                self.places[place] = None
                if self.cache.scrap is not None:
                    self.buffers.vacate(place, place + 1, self.cache)

    def _shrink(self) -> None:
        """Move to a smaller bucket, if the rows fit into one."""
        buffers, cache = self.buffers, self.cache
        kept = [place for place, row in enumerate(self.places) if row is not None]
        if bucket(len(kept), cache) == bucket(len(self.places), cache):
            return
        if kept:
            at = on_device(kept, torch.int64, self.model.device)
            for each in buffers.inputs:
                each[: len(kept)] = each[at]
            buffers.put(range(len(kept)), buffers.state.pick(kept))
        buffers.vacate(len(kept), len(self.places), cache)
        self.places = [self.places[place] for place in kept]

    def _await(self, rows: list[tuple[Row, int]], tokens: torch.Tensor) -> None:
        """Have ``tokens [steps, B]`` copied to where the host will read them, without waiting."""
        if tokens.device.type != "cuda":
            self._unread.append(Launch(rows, tokens.clone(), None))
            return
        host = torch.empty(tokens.shape, dtype=torch.int64, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(tokens.device))
        self._unread.append(Launch(rows, host, copied))
