"""Decode: rows that decode together, one token a step, on buffers that never move.

On a GPU a step is one captured graph per bucket of rows (1, 2, 4, ...): the forward pass, the
choice of tokens, and the next step's inputs. Steps of few rows are short, so one graph has several.
The host launches a step before it reads the tokens of the previous one, so it never waits for the
newest. It learns late that a row has ended. The device knows at once, and the row runs on without
effect. On a CPU, and if layers have hooks, a step has only the live rows and is read at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Protocol

import torch

from lfm2_fast.cache.batch import on_device
from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.engine.assistant import Assistant
from lfm2_fast.engine.block_drafter import BlockDrafter
from lfm2_fast.engine.launch import Launch, Written
from lfm2_fast.engine.logits import adjusted, prepare, requested_log_probs
from lfm2_fast.engine.request import Row
from lfm2_fast.engine.speculation import Speculation
from lfm2_fast.engine.step_buffers import MAX_STEPS, StepBuffers, bucket
from lfm2_fast.engine.verified_launch import VerifiedLaunch
from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.ops.sampling import SamplingParams, SamplingState

# Largest batch for which one launch covers several steps. A larger batch keeps the device busy
# without that, and the wasted steps of a finished row would slow the others.
MULTI_STEP_ROWS = 4
# With a lower temperature, ordinary logits become infinite in float32.
LEAST_TEMPERATURE = 1e-35


class LogitsError(RuntimeError):
    """Error of logits that are NaN or infinite: they give no token and no loss."""


def why_not_finite(dtype: torch.dtype) -> str:
    """Return why numbers of a model of ``dtype`` are NaN or infinite, with a remedy."""
    if dtype == torch.float16:
        return "numbers outgrow float16, or weights are broken; load with dtype float32 or bfloat16"
    return "weights are broken; look for NaN and infinity in the checkpoint's tensors"


def no_token(
    row: Row,
    number: int,
    dtype: torch.dtype,
    *,
    processed: bool = False,
) -> LogitsError:
    """Return the error of a row that has no token to choose as its new token ``number``, from 1 on.

    ``processed`` is True if logits processors changed its logits. The error's position counts the
    row's tokens from 0 on, without padding.
    """
    why, params = why_not_finite(dtype), row.request.sampling
    if params.do_sample and params.temperature < LEAST_TEMPERATURE:
        why = f"temperature={params.temperature} makes them infinite; decode greedily instead"
    if processed:
        why = f"logits processors leave no token a finite score, or {why}"
    place = row.request.first_row + row.index
    return LogitsError(
        f"row {place} has no token to choose as its new token {number}, at position "
        f"{row.start + number - 1}: the best of its logits is NaN or infinite ({why})"
    )


class Chooser(Protocol):
    """Chooses the tokens of all rows of a step, in place of the sampling operation."""

    @property
    def changes_logits(self) -> bool:
        """Return True if the chooser changes logits. A missing token may then be its fault."""

    def __call__(
        self, rows: Sequence[Row], logits: torch.Tensor, state: SamplingState
    ) -> torch.Tensor:
        """Return the next tokens ``[B]`` int64 of the rows, from ``logits [B, V]``.

        NO_TOKEN means none. ``state`` is that of the rows; the chooser calls ``state.record``.
        """

    def ends(self, row: Row) -> bool:
        """Return True if the row's newest token is its last. Called after every token of a row."""


class DecodeLoop:
    """Rows that decode together: ``admit`` them, then ``launch`` and ``read`` until done.

    ``lag`` is the number of launches that are made before the first of them is read. With a lag, a
    few rows run several steps a launch, unless one of them wants each token at once. Layers with
    hooks see only the steps and rows of the text: nothing is captured, runs ahead or fills a
    bucket. ``params`` are the sampling parameters of places that no row has had yet. If they equal
    those of the rows, one graph serves all places. ``chooser`` chooses the tokens, if given.
    ``prompt_lookup`` and ``assistant`` are those of ``Speculation``.
    """

    def __init__(
        self,
        model: Lfm2,
        cache: Cache,
        buffers: StepBuffers | None = None,
        *,
        params: SamplingParams | None = None,
        chooser: Chooser | None = None,
        prompt_lookup: int = 0,
        assistant: Assistant | BlockDrafter | None = None,
    ) -> None:
        self.model, self.cache, self.chooser = model, cache, chooser
        self.hooked = model.has_hooked_layers
        self.lag = int(model.ops.captures and not self.hooked)
        self.buffers = StepBuffers(model, cache) if buffers is None else buffers
        self.buffers.begin(cache, params or SamplingParams())
        self.places: list[Row | None] = []
        self.speculation: Speculation | None = None
        # A hook and a chooser see the steps of the text alone.
        if chooser is None and not self.hooked:
            self.speculation = Speculation(
                model, cache, self.buffers, prompt_lookup=prompt_lookup, assistant=assistant
            )
        self._unread: deque[Launch | VerifiedLaunch] = deque()

    @property
    def unread(self) -> int:
        """Number of launches that were not read to the end."""
        return len(self._unread)

    @property
    def rows(self) -> list[Row]:
        """Rows that have places, in their order."""
        return [row for row in self.places if row is not None]

    def is_in_flight(self, row: Row) -> bool:
        """Return True if an unread launch runs the row."""
        return any(row is other for launch in self._unread for other, _ in launch.rows)

    def admit(self, rows: Sequence[Row], logits: torch.Tensor) -> None:
        """Choose the next tokens of rows whose texts have run, from ``logits [B, V]``."""
        self._retire()
        buffers, ops = self.buffers, self.model.ops
        free = [place for place, row in enumerate(self.places) if row is None]
        places = (free + list(range(len(self.places), len(self.places) + len(rows))))[: len(rows)]
        made, at = buffers.first_rows(places, rows)
        numbered = list(zip(rows, range(len(rows)), strict=True))
        if self.chooser is None:
            chosen = ops.sample(adjusted(logits, numbered), made.state)
        else:
            chosen = self.chooser(rows, logits, made.state)
        written = torch.empty_like(chosen)
        ops.advance(chosen, made.eos, self.cache.dummy_slot, made.inputs, written)
        buffers.put(places, at, made)
        for place, row in zip(places, rows, strict=True):
            row.launched += 1
            self.places[place : place + 1] = [row]
        self._copy_to_host(numbered, written[None], ran=False, logits=logits)

    def launch(self) -> int:
        """Launch steps of the rows that continue, and return their number; 0 without rows.

        If a row's logits must be changed or reported, it is one step, and all earlier launches must
        have been read. Raises CacheError, with nothing launched, if there are too few pages.
        """
        self._retire()
        self._shrink()
        going = [(row, place) for place, row in enumerate(self.places) if row is not None]
        if not going:
            return 0
        on_logits = self.on_logits
        assert not (on_logits and self._unread)
        if self.speculation is not None:
            verified = None if self._unread else self.speculation.launch(going)
            # Afterwards: ``waits`` and ``launch`` must agree on whether this step looks for drafts.
            self.speculation.count_step(verified=verified is not None)
            if verified is not None:
                self._unread.append(verified)
                return 1
        steps = 1 if on_logits else self._steps_of_launch(going)
        self.cache.make_room({row.slot: row.start + row.launched + steps - 1 for row, _ in going})
        for row, _ in going:
            self.cache.expect_length(row.slot, row.start + row.launched + steps - 1)
        if on_logits:
            prepare(row for row, _ in going)
        count, logits = self._rows_of_step(len(self.places)), None
        begin = perf_counter()
        self.buffers.run_steps(
            self.model,
            self.cache,
            count,
            choose=not on_logits,
            steps=steps,
            hooked=self.hooked,
            adapted=self.buffers.adapted(self.model, (row.slot for row, _ in going)),
            late=None if self.speculation is None else self.speculation.late,
        )
        if self.speculation is not None and not self.lag:
            self.speculation.costs.add(count, perf_counter() - begin)
        if on_logits:
            logits = self._choose(going, count)
        for row, _ in going:
            row.launched += steps
        self._copy_to_host(going, self.buffers.written[-steps:], ran=True, logits=logits)
        return steps

    @property
    def on_logits(self) -> bool:
        """Return True if the next step stops at its logits.

        All earlier launches are then read first.
        """
        return self.chooser is not None or any(row.needs_logits for row in self.rows)

    @property
    def reads_first(self) -> bool:
        """Return True if all launches must be read before the next."""
        drafts = self.speculation is not None and self.speculation.waits(self.rows)
        return not self.lag or self.on_logits or drafts

    @property
    def runs_ahead(self) -> bool:
        """Return True if the next launch need not wait until the last one is read."""
        last = self._unread[-1] if self._unread else None
        return bool(self.lag) and not self.on_logits and not isinstance(last, VerifiedLaunch)

    def _steps_of_launch(self, going: list[tuple[Row, int]]) -> int:
        """Return the number of steps of the next launch.

        There are several only if every row wants all their tokens, and has positions for them.
        """
        if not self.lag or len(self.places) > MULTI_STEP_ROWS:
            return 1
        longest = max(row.start + row.launched for row, _ in going)
        wanted = min(row.limit - row.launched for row, _ in going)
        fit = longest + MAX_STEPS - 1 <= self.cache.max_length and wanted >= MAX_STEPS
        return 1 if not fit or any(row.request.stream for row, _ in going) else MAX_STEPS

    def _choose(self, going: list[tuple[Row, int]], count: int) -> torch.Tensor:
        """Choose tokens from the step's logits, as requests change them, and return the logits."""
        buffers, ops = self.buffers, self.model.ops
        assert buffers.logits is not None
        logits = buffers.logits[:count].clone()
        if self.chooser is None:
            chosen = ops.sample(adjusted(logits, going), buffers.view(count))
        else:
            chosen = self._by_chooser(self.chooser, going, logits)
        inputs, written = buffers.inputs.first(count), buffers.written[-1, :count]
        ops.advance(chosen, buffers.eos[:count], self.cache.dummy_slot, inputs, written)
        return logits

    def _by_chooser(
        self, chooser: Chooser, going: list[tuple[Row, int]], logits: torch.Tensor
    ) -> torch.Tensor:
        """Return the chooser's tokens for all places in ``logits [B, V]``."""
        places, rows = [place for _, place in going], [row for row, _ in going]
        if places == list(range(len(logits))):
            return chooser(rows, logits, self.buffers.view(len(logits)))
        state, at = self.buffers.state.pick(places), on_device(places, torch.int64, logits.device)
        own = chooser(rows, logits[at], state)
        self.buffers.set_sampling(places, state)
        chosen = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        chosen[at] = own
        return chosen

    def read(self, keep: int) -> Iterator[Written]:
        """Yield the tokens of all launches but the last ``keep``: rows and tokens, step by step.

        An item has the rows that were running, their tokens, and log-probabilities. A row's last
        token marks it as ended, and so does NO_TOKEN, if there was no token to choose.
        """
        while len(self._unread) > keep:
            launch = self._unread[0]
            yield from launch.steps(self.cache)
            if isinstance(launch, VerifiedLaunch) and self.speculation is not None:
                self.speculation.note(launch)
            self._unread.popleft()

    def settle(self) -> None:
        """Count the tokens of unread launches, so that the lengths in the cache are right.

        If that fails, the slots are emptied.
        """
        try:
            for _ in self.read(0):
                pass
        except BaseException:
            self._unread.clear()
            self.cache.reset()
            raise

    def remove(self, row: Row) -> None:
        """Free a row's place, as if it had never been there. Its launches must be read."""
        assert not self.is_in_flight(row)
        if row in self.places:
            self._vacate(self.places.index(row))

    def _retire(self) -> None:
        """Free the places of rows that have ended, or whose last steps are launched."""
        for place, row in enumerate(self.places):
            if row is not None and (row.ended or row.launched == row.limit):
                self._vacate(place)

    def _vacate(self, place: int) -> None:
        self.places[place] = None
        if self.cache.dummy_slot is not None:
            self.buffers.clear_rows(place, place + 1, self.cache)

    def _rows_of_step(self, live: int) -> int:
        """Return the number of rows of a step with ``live`` live rows."""
        return live if self.hooked else bucket(live, self.cache)

    def _shrink(self) -> None:
        """Move to a smaller bucket, if the rows fit into one."""
        kept = [place for place, row in enumerate(self.places) if row is not None]
        if self._rows_of_step(len(kept)) == self._rows_of_step(len(self.places)):
            return
        self.buffers.shrink(kept, len(self.places), self.cache)
        self.places = [self.places[place] for place in kept]

    def _copy_to_host(
        self,
        rows: list[tuple[Row, int]],
        tokens: torch.Tensor,
        *,
        ran: bool,
        logits: torch.Tensor | None,
    ) -> None:
        """Copy ``tokens [steps, B]`` to the host without waiting.

        It waits for the log-probabilities of ``logits [B, V]``, if rows ask for them.
        """
        logprobs = {}
        if any(row.request.logprobs is not None for row, _ in rows):
            assert logits is not None
            logprobs = requested_log_probs(rows, tokens[0].tolist(), logits)
        if tokens.device.type != "cuda":
            self._unread.append(Launch(rows, tokens.clone(), None, ran, logprobs))
            return
        host = torch.empty(tokens.shape, dtype=torch.int64, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(tokens.device))
        self._unread.append(Launch(rows, host, copied, ran, logprobs))
