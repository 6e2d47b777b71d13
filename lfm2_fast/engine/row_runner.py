"""Rows on one cache: their prompts, then their decode steps, and the pages that they give back."""

from __future__ import annotations

import time

import torch

from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.cache.page_memory import PAGE_SIZE
from lfm2_fast.cache.page_pool import CacheError
from lfm2_fast.engine.assistant import Assistant
from lfm2_fast.engine.block_drafter import BlockDrafter
from lfm2_fast.engine.decode import Chooser, DecodeLoop
from lfm2_fast.engine.events import Events
from lfm2_fast.engine.model_runner import ModelRunner
from lfm2_fast.engine.prefill import Prefill
from lfm2_fast.engine.request import Row
from lfm2_fast.engine.scheduler import Scheduler
from lfm2_fast.engine.slots import Slots
from lfm2_fast.engine.statistics import Statistics
from lfm2_fast.engine.step_buffers import StepBuffers
from lfm2_fast.models.lfm2 import Lfm2


class RowRunner:
    """Runs the rows of ``scheduler`` on ``cache``: a chunk of prompts, then a launch of all rows.

    ``shares`` keeps the full pages of ended texts in a prefix index. ``buffers`` are those of an
    earlier runner of the cache, or None. ``chooser`` chooses the tokens of all rows together.
    ``prompt_lookup`` and ``assistant`` draft tokens. Writes events and statistics.
    """

    def __init__(
        self,
        model: Lfm2,
        cache: Cache,
        buffers: StepBuffers | None,
        scheduler: Scheduler,
        statistics: Statistics,
        events: Events,
        *,
        shares: bool,
        chooser: Chooser | None,
        prompt_lookup: int,
        assistant: Assistant | BlockDrafter | None,
    ) -> None:
        self.model, self.cache = model, cache
        self.scheduler, self.statistics, self.events = scheduler, statistics, events
        self.slots = Slots(cache, shares=shares)
        runner = ModelRunner(model, cache, buffers)
        self.prefill = Prefill(runner, self.slots, scheduler, statistics)
        self.decode = DecodeLoop(
            model,
            cache,
            runner.buffers,
            chooser=chooser,
            prompt_lookup=prompt_lookup,
            assistant=assistant,
        )
        # Drafted and accepted tokens that the statistics count already.
        self._counted = 0, 0
        # Rows whose prompts have run, with their logits. They will begin together.
        self.prefilled: list[tuple[Row, torch.Tensor]] = []

    @property
    def rows(self) -> list[Row]:
        """Every row that has not ended."""
        rows = (*self.decode.rows, *self.scheduler.prefilling, *self.scheduler.waiting)
        return [row for row in rows if row.finish_reason is None]

    @property
    def busy(self) -> bool:
        """Return True while a row has not ended, or a launch was not read."""
        rows = self.decode.rows or self.scheduler.waiting or self.scheduler.prefilling
        return bool(rows or self.slots.leaving or self.decode.unread)

    def step(self) -> None:
        """Run at most one chunk of prompts, then one launch of the rows that decode."""
        self.release()
        decoding, waiting = bool(self.decode.rows), len(self.scheduler.waiting)
        self.prefill.admit(others=bool(decoding or self.slots.leaving))
        began = self._run_prompts(stuck=waiting == len(self.scheduler.waiting))
        if began and not decoding and not self.decode.lag:
            # No row waits for a launch, so the first tokens are returned before it.
            self._read(0)
        else:
            self._run_rows()
        self.release()
        self._count()

    def end(self, row: Row, reason: str) -> None:
        """End a row before its time."""
        self.events.end(row, reason)
        self.leave(row)

    def leave(self, row: Row) -> None:
        """Mark an ended row, to free its slot as soon as no running launch writes to it."""
        row.ended = True
        self.scheduler.leave(row)
        if row.slot >= 0:
            self.slots.leaving.append(row)

    def release(self) -> None:
        """Free the slots of ended rows that no running launch writes to."""
        for row in list(self.slots.leaving):
            if not self.decode.is_in_flight(row):
                self.slots.leaving.remove(row)
                self._give_back(row)

    def _give_back(self, row: Row) -> None:
        """Give a row's slot back, with all that later rows may share."""
        if self.decode.speculation is not None:
            self.decode.speculation.catch_up(row, leaves=True)
        self.slots.give_back(row)

    def preempt(self) -> bool:
        """Take the pages of the youngest row. Return False if only the oldest is left.

        A row in a slot of a caller's cache is never preempted, because the slot keeps its pages.
        With a chooser no row is preempted, because its rows go together.

        Unread launches are read first. If rows end by that, their pages may be enough. The row's
        full pages stay in the index until another row needs them. The row waits again, and
        continues later with the same tokens.
        """
        before = self.cache.pool.available
        self._read(0)
        self.release()
        if self.cache.pool.available > before:
            return True
        if self.decode.chooser is not None:
            return False
        rows = [row for row in self.rows if row.slot >= 0 and row.pinned is None]
        rows.sort(key=lambda row: (row.request.priority, row.arrival))
        if len(rows) < 2:
            return False
        row = rows[-1]
        self.decode.remove(row)
        self.scheduler.leave(row)
        self._give_back(row)
        row.launched = len(row.written)
        # They are computed again, from the prompt's first chunk on.
        row.prompt_logprobs = None
        self.prefilled = [each for each in self.prefilled if each[0] is not row]
        self.scheduler.wait(row)
        self.statistics.preemptions += 1
        return True

    def _run_prompts(self, *, stuck: bool) -> bool:
        """Run a chunk of the prompts; rows whose prompts have run get their first tokens.

        Return True if rows got them. A chooser sees all rows of a step, so with one they begin when
        all prompts have run. ``stuck`` is True if no waiting row could be admitted.
        """
        try:
            self.prefilled += self.prefill.run(decoding=len(self.decode.rows))
        except CacheError:
            if not self.preempt():
                raise
            return False
        self.prefilled = [each for each in self.prefilled if each[0] in self.scheduler.prefilling]
        if not self.prefilled:
            return False
        waits = len(self.prefilled) < len(self.scheduler.prefilling)
        if self.decode.chooser is not None and (waits or (self.scheduler.waiting and not stuck)):
            return False
        starting, self.prefilled = sorted(self.prefilled, key=lambda each: each[0].arrival), []
        rows = [row for row, _ in starting]
        first = starting[0][1][None]
        logits = first if len(rows) == 1 else torch.stack([own for _, own in starting])
        self.decode.admit(rows, logits)
        for row in rows:
            self.scheduler.leave(row)
        return True

    def _run_rows(self) -> None:
        """Launch a step of the rows that decode, and read the tokens of earlier launches."""
        launched = 0
        if self.decode.rows:
            if self.decode.reads_first:
                self._read(0)
            while True:
                try:
                    launched = self.decode.launch()
                    break
                except CacheError:
                    if not self.preempt():
                        raise
        ahead = launched and self.decode.runs_ahead
        self._read(self.decode.lag if ahead else 0)

    def _read(self, keep: int) -> None:
        """Turn the tokens of all launches but the last ``keep`` into events."""
        now = time.monotonic()
        for rows, tokens, log_probs in self.decode.read(keep):
            for row, token in zip(rows, tokens, strict=True):
                if row.finish_reason is not None:
                    continue
                self.events.token(row, token, log_probs.get(row), now)
                if row.finish_reason is not None:
                    self.leave(row)
                elif self.cache.lengths[row.slot] % PAGE_SIZE == 0:
                    if self.decode.speculation is not None:
                        self.decode.speculation.catch_up(row)
                    self.slots.enter(row)

    def _count(self) -> None:
        """Update the present numbers in the statistics."""
        statistics, pool = self.statistics, self.cache.pool
        statistics.running = len(self.decode.rows) + len(self.scheduler.prefilling)
        statistics.waiting = len(self.scheduler.waiting)
        statistics.pages_free, statistics.pages_cached = pool.free, pool.cached
        statistics.pages_used = pool.used
        if self.decode.speculation is not None:
            before = self._counted
            self._counted = self.decode.speculation.drafted, self.decode.speculation.accepted
            statistics.drafted += self._counted[0] - before[0]
            statistics.accepted += self._counted[1] - before[1]
