"""Prefill: prompts from their admission to the logits of their last tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lfm2_fast.cache.page_memory import PAGE_SIZE
from lfm2_fast.cache.prefix_index import Match
from lfm2_fast.engine.chunk_timer import ChunkTimer
from lfm2_fast.engine.logits import log_probs
from lfm2_fast.engine.model_runner import ModelRunner
from lfm2_fast.engine.request import Row
from lfm2_fast.engine.scheduler import Scheduler, pages_wanted
from lfm2_fast.engine.slots import Slots
from lfm2_fast.engine.statistics import Statistics

# Waiting rows that a step examines. Most of them wait for an earlier row, and each costs time.
LOOK_AHEAD = 64


class Prefill:
    """Admits waiting rows of ``scheduler`` to ``slots``, and runs their prompts in chunks."""

    def __init__(
        self, runner: ModelRunner, slots: Slots, scheduler: Scheduler, statistics: Statistics
    ) -> None:
        self.runner, self.cache = runner, runner.cache
        self.slots, self.scheduler, self.statistics = slots, scheduler, statistics
        self._timer = ChunkTimer(runner.model.device)

    def admit(self, *, others: bool) -> None:
        """Give slots to waiting rows, in their order, while there are pages for them.

        If another row runs the same beginning, a row waits for it, and rows behind it may pass. No
        row passes a row that waits for pages. ``others`` is True if rows decode or leave, which
        will free pages. Without them one row is admitted in any case.
        """
        scheduler = self.scheduler
        for row in scheduler.waiting[:LOOK_AHEAD]:
            if not self.slots.free:
                return
            if row.pinned is not None and row.pinned not in self.slots.free:
                continue
            match = self._match(row)
            if match is None:
                continue
            if (others or scheduler.prefilling) and not self._fits(row, match):
                return
            self.slots.take(row, match)
            self.runner.buffers.set_adapter(row.slot, row.entry)
            scheduler.leave(row)
            scheduler.prefilling.append(row)
            self._count(row)

    def _match(self, row: Row) -> Match | None:
        """Return the indexed part of a row's text, or None while another row extends it."""
        if row.request.prompt_logprobs is not None:
            return Match()
        if any(other.id == row.id for other in self.scheduler.prefilling):
            return None
        match = self.slots.match(row)
        text, end = row.text, (len(match.pages) + 1) * PAGE_SIZE
        if self.slots.index is None or end >= len(text):
            return match
        for other in self.scheduler.prefilling:
            if other.salt == row.salt and other.text[:end] == text[:end]:
                return None
        return match

    def _fits(self, row: Row, match: Match) -> bool:
        """Return True if there are pages for a row, beside those of admitted prompts.

        A caller's cache has pages for all its slots at full length.
        """
        if row.pinned is not None:
            return True
        pool = self.cache.pool
        needed = pages_wanted(row) - sum(map(pool.is_owned, match.pages))
        for other in self.scheduler.prefilling:
            needed += max(pages_wanted(other) - len(self.cache.pages(other.slot)), 0)
        return needed <= pool.available

    def _count(self, row: Row) -> None:
        """Count an admitted row in the statistics: each prompt once, also after a preemption."""
        if row.admitted:
            return
        row.admitted = True
        row.cached_tokens = self.cache.lengths[row.slot]
        if row.index == 0:
            self.statistics.prefix_hits += row.cached_tokens
            self.statistics.prompt_tokens += row.start

    def run(self, *, decoding: int) -> list[tuple[Row, torch.Tensor]]:
        """Run a chunk. Return the rows whose texts have run, each with its logits ``[V]``.

        The other continuations of their requests come with them. ``decoding`` is the number of rows
        that decode. Raises CacheError, with nothing run, if there are too few pages.
        """
        for timed in self._timer.finished():
            self.scheduler.measured(*timed)
        chunk = self.scheduler.next_chunk(self._ran, decoding)
        if not chunk:
            return []
        rows = [row for row, _ in chunk]
        self.cache.make_room({row.slot: self._ran(row) + count for row, count in chunk})
        replays = [self.cache.replay(row.slot) for row in rows]
        texts = []
        for (row, count), again in zip(chunk, replays, strict=True):
            ran = self._ran(row)
            texts.append([*again, *row.text[ran : ran + count]])
        counts = [len(again) for again in replays]
        with self._timer.time(rows, sum(map(len, texts))):
            if any(row.request.prompt_logprobs is not None for row in rows):
                logits = self._with_prompt_logprobs(rows, texts, counts)
            else:
                slots, ends = [row.slot for row in rows], [row.length for row in rows]
                logits = self.runner.run_chunks(texts, slots, counts, ends)
        ended = []
        for row in rows:
            self.slots.enter(row)
            if self._ran(row) == row.length:
                own, logits = logits[0], logits[1:]
                ended += [(each, own) for each in (row, *self._forked(row))]
        return ended

    def _ran(self, row: Row) -> int:
        return self.cache.lengths[row.slot]

    def _with_prompt_logprobs(
        self, rows: Sequence[Row], texts: Sequence[Sequence[int]], replays: Sequence[int]
    ) -> torch.Tensor:
        """Run chunks one by one, and keep the log-probabilities that their requests want.

        Returns the logits ``[E, V]`` of the texts that have run.
        """
        last = []
        for row, text, again in zip(rows, texts, replays, strict=True):
            count, slots, ends = row.request.prompt_logprobs, [row.slot], [row.length]
            if count is None or row.written:
                last.append(self.runner.run_chunks([text], slots, [again], ends))
                continue
            first = self._ran(row)
            logits = self.runner.run_chunks([text], slots, [again], ends, every=True)
            following = row.request.prompt[first + 1 : first + len(text) + 1]
            row.prompt_logprobs = row.prompt_logprobs or [None]
            row.prompt_logprobs += log_probs(
                logits[: len(following)], following, [count] * len(following)
            )
            last.append(logits[-1:] if self._ran(row) == row.length else logits[:0])
        return torch.cat(last)

    def _forked(self, row: Row) -> list[Row]:
        """Give copies of a row's slot to the waiting continuations of its request."""
        forked: list[Row] = []
        if row.written or row.request.prompt_logprobs is not None:
            return forked
        for sibling in [each for each in self.scheduler.waiting if each.id == row.id]:
            if sibling.written:
                continue
            if not self.slots.fork(row, sibling):
                break
            self.runner.buffers.set_adapter(sibling.slot, sibling.entry)
            self.scheduler.leave(sibling)
            self.scheduler.prefilling.append(sibling)
            if not sibling.admitted:
                sibling.admitted, sibling.cached_tokens = True, row.cached_tokens
            forked.append(sibling)
        return forked
