"""Decode: requests that are written together, a token each, on buffers that stay where they are.

On a GPU a step is one captured graph per bucket of rows (1, 2, 4, ...): the forward pass, the
choice of tokens, and the next step's inputs. Steps of few rows are short, so one graph has several.
The host launches a step before it has read the tokens of the step before, and so never waits for
the newest. It learns late that a request has ended. The device knows at once, and the row runs on
without effect. On a CPU, and where layers have hooks, the same steps have as many rows as are live,
and are read at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lfm2_fast.cache.batch import DecodeInputs, on_device
from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.engine.step_buffers import MAX_STEPS, StepBuffers, bucket
from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.ops.sampling import SamplingParams, SamplingState

# Tokens for which room is made at once, or more if they take fewer bytes than this: when pages
# move, every graph is captured anew.
AHEAD, AHEAD_BYTES = 256, 2**26
# Largest batch for which one launch covers several steps. A larger batch keeps the device busy
# without that, and the wasted steps of a finished row would slow the others.
MULTI_STEP_ROWS = 4
# Divided by a lower temperature, ordinary logits are infinite in float32.
LEAST_TEMPERATURE = 1e-35


class LogitsError(RuntimeError):
    """Logits are NaN or infinite: no token can be chosen by them, or no loss computed."""


@dataclass
class Request:
    """A sequence that is being written: its slot, and its new tokens, as far as read.

    NO_TOKEN is the last of them where there was none to choose.
    """

    number: int
    slot: int
    start: int  # tokens of the prompt
    limit: int  # tokens to write at most
    written: list[int] = field(default_factory=list)
    launched: int = 0  # tokens whose steps were launched
    ended: bool = False


def why_not_finite(dtype: torch.dtype) -> str:
    """Return what makes numbers of a model of ``dtype`` NaN or infinite, and what to do."""
    if dtype == torch.float16:
        return "numbers outgrow float16, or weights are broken; load with dtype float32 or bfloat16"
    return "weights are broken; look for NaN and infinity in the checkpoint's tensors"


def no_token(
    row: Request,
    number: int,
    dtype: torch.dtype,
    params: SamplingParams,
    *,
    processed: bool = False,
) -> LogitsError:
    """Return the error of a row that has no token to choose as its new token ``number``, from 1 on.

    ``processed`` says that logits processors had a hand in its logits. The position that the error
    names is that of the token in the row's text, from 0 on and without padding.
    """
    why = why_not_finite(dtype)
    if params.do_sample and params.temperature < LEAST_TEMPERATURE:
        why = f"temperature={params.temperature} makes them infinite; decode greedily instead"
    if processed:
        why = f"logits processors leave no token a finite score, or {why}"
    return LogitsError(
        f"row {row.number} has no token to choose as its new token {number}, at position "
        f"{row.start + number - 1}: the best of its logits is NaN or infinite ({why})"
    )


@dataclass
class Launch:
    """Steps under way: ``tokens [steps, B]`` on the host, and a column of them for each request.

    The tokens are there when the event ``copied`` has come, or at once if it is None. ``read``
    counts the steps that were read.
    """

    rows: list[tuple[Request, int]]
    tokens: torch.Tensor
    copied: Any
    read: int = 0

    def unread_tokens(self) -> list[list[int]]:
        """Wait for the tokens of the steps that were not read, and return them step by step."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tokens[self.read :].tolist()


class DecodeLoop:
    """Requests that are written together: ``admit`` them, then ``launch`` and ``read`` until done.

    ``lag`` counts the launches before the first of them is read. ``max_steps`` bounds the steps of
    few rows in one launch, where there is a lag. Layers with hooks are called for the steps and
    rows of the text alone: such steps are not captured, and nothing runs ahead or fills a bucket.
    """

    def __init__(
        self,
        model: Lfm2,
        cache: Cache,
        params: SamplingParams,
        eos: Sequence[int],
        *,
        lag: int | None = None,
        max_steps: int = MAX_STEPS,
    ) -> None:
        self.model, self.cache, self.params = model, cache, params
        self.hooked = model.has_hooked_layers
        self.lag = int(model.ops.captures) if lag is None else lag
        if self.hooked:
            self.lag = 0
        self.max_steps = max_steps if self.lag else 1
        token = model.config.cache_bytes(model.dtype.itemsize) * max(cache.slots, 1)
        self.ahead = max(AHEAD, AHEAD_BYTES // max(token, 1))
        self.buffers = StepBuffers.of(model, cache)
        self.buffers.begin(cache, params, eos, model.config.vocab_size)
        self.eos = frozenset(eos)
        self.places: list[Request | None] = []
        self._unread: deque[Launch] = deque()

    @property
    def unread(self) -> int:
        """How many launches were not read to the end."""
        return len(self._unread)

    def admit(self, rows: Sequence[Request], logits: torch.Tensor, state: SamplingState) -> None:
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
        inputs = DecodeInputs(tokens, slots, positions, lengths, finished)
        written = torch.empty_like(chosen)
        self.model.ops.advance(chosen, buffers.eos, self.cache.dummy_slot, inputs, written)
        for ours, made in zip(buffers.inputs, inputs, strict=True):
            ours[at] = made
        buffers.set_sampling(places, state)
        for place, row in zip(places, rows, strict=True):
            row.launched = 1
            self.places[place : place + 1] = [row]
        self._copy_to_host(list(zip(rows, range(len(rows)), strict=True)), written[None])

    def launch(self) -> int:
        """Launch steps of the rows that go on; how many, 0 if there are no such rows."""
        self._retire()
        self._shrink()
        going = [(row, place) for place, row in enumerate(self.places) if row is not None]
        if not going:
            return 0
        needed = max(row.start + row.launched for row, _ in going)
        most = max(row.start + row.limit - 1 for row, _ in going)
        self.cache.make_room(max(needed, min(needed + self.ahead, most, self.cache.max_length)))
        steps = self.max_steps if len(self.places) <= MULTI_STEP_ROWS else 1
        # All that a launch writes is wanted, and has a place in the cache.
        if steps > min(row.limit - row.launched for row, _ in going) or (
            needed + steps - 1 > self.cache.max_length
        ):
            steps = 1
        for row, _ in going:
            self.cache.expect_length(row.slot, row.start + row.launched + steps - 1)
        count = self._rows_of_step(len(self.places))
        self.buffers.run_steps(
            self.model, self.cache, count, choose=True, steps=steps, hooked=self.hooked
        )
        for row, _ in going:
            row.launched += steps
        self._copy_to_host(going, self.buffers.written[-steps:])
        return steps

    def read(self, keep: int) -> Iterator[tuple[list[Request], list[int]]]:
        """Tokens of all launches but the last ``keep``, step by step: rows, and a token for each.

        They are the rows that were running; one that its token ends is marked as such. Raises
        LogitsError where a row had no token to choose. The tokens of the other rows are taken all
        the same, and may be read on.
        """
        for rows, tokens in self._read(keep):
            for row, token in zip(rows, tokens, strict=True):
                if token < 0:
                    raise no_token(row, len(row.written), self.model.dtype, self.params)
            yield rows, tokens

    def _read(self, keep: int) -> Iterator[tuple[list[Request], list[int]]]:
        """Read as ``read`` does; a row without a token has NO_TOKEN, which ends it."""
        while len(self._unread) > keep:
            launch = self._unread[0]
            for tokens in launch.unread_tokens():
                rows = []
                for row, column in launch.rows:
                    if row.ended:
                        continue
                    # The step has run the token before; the first step was the prompt's.
                    if row.written:
                        self.cache.commit_token(row.slot, row.written[-1])
                    token = tokens[column]
                    row.written.append(token)
                    row.ended = token in self.eos or token < 0 or len(row.written) == row.limit
                    if row.ended:
                        # Whatever is under way, the device has gone one token on at most.
                        ran = min(row.launched - 1, len(row.written))
                        self.cache.expect_length(row.slot, row.start + ran)
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
            for _ in self._read(0):
                pass
        except BaseException:
            self._unread.clear()
            self.cache.reset()
            raise

    def _retire(self) -> None:
        """Empty the places of rows that have ended, or need no more than they were asked for."""
        for place, row in enumerate(self.places):
            if row is not None and (row.ended or row.launched == row.limit):
                self.places[place] = None
                if self.cache.dummy_slot is not None:
                    self.buffers.clear_rows(place, place + 1, self.cache)

    def _rows_of_step(self, live: int) -> int:
        """Return the rows of a step in which so many are live."""
        return live if self.hooked else bucket(live, self.cache)

    def _shrink(self) -> None:
        """Move to a smaller bucket, if the rows fit into one."""
        buffers, cache = self.buffers, self.cache
        kept = [place for place, row in enumerate(self.places) if row is not None]
        if self._rows_of_step(len(kept)) == self._rows_of_step(len(self.places)):
            return
        if kept:
            at = on_device(kept, torch.int64, self.model.device)
            for each in buffers.inputs:
                each[: len(kept)] = each[at]
            buffers.set_sampling(range(len(kept)), buffers.state.pick(kept))
        buffers.clear_rows(len(kept), len(self.places), cache)
        self.places = [self.places[place] for place in kept]

    def _copy_to_host(self, rows: list[tuple[Request, int]], tokens: torch.Tensor) -> None:
        """Have ``tokens [steps, B]`` copied to where the host will read them, without waiting."""
        if tokens.device.type != "cuda":
            self._unread.append(Launch(rows, tokens.clone(), None))
            return
        host = torch.empty(tokens.shape, dtype=torch.int64, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(tokens.device))
        self._unread.append(Launch(rows, host, copied))
