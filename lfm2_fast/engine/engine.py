"""Engine: many requests on one model, a step at a time: continuous batching over shared pages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from lfm2_fast.cache.batch import on_device
from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.cache.page_memory import PAGE_SIZE, pages_of
from lfm2_fast.cache.page_pool import CacheError
from lfm2_fast.cache.prefix_index import Match, PrefixIndex, common_prefix
from lfm2_fast.engine.decode import DecodeLoop, no_token, sampling_state
from lfm2_fast.engine.logits import log_probs
from lfm2_fast.engine.memory import bytes_of
from lfm2_fast.engine.model_runner import ModelRunner, new_cache
from lfm2_fast.engine.request import Event, LogProbs, Request, Row
from lfm2_fast.engine.scheduler import Scheduler, pages_wanted
from lfm2_fast.engine.statistics import Statistics
from lfm2_fast.engine.step_buffers import MAX_STEPS
from lfm2_fast.models.lfm2 import Lfm2

# Seconds that a chunk of a prompt may hold up the rows that decode.
CHUNK_SECONDS = {"cuda": 0.05}
CPU_CHUNK_SECONDS = 0.1


class QueueFull(RuntimeError):
    """The engine takes no more requests for now: as many wait as may."""


class Engine:
    """Runs requests of one model: ``add`` them, and ``step`` until each has ended.

    ``model`` is the network, or a model that holds it as ``network``.

    At most ``max_rows`` continuations run at a time, each of at most ``max_length`` tokens of
    context. ``memory`` is what the pages and conv windows may take: bytes, "8GB", or "80%" of what
    is free. ``pages`` says the same in pages of 64 tokens. Without both there is room for
    ``max_rows`` full contexts, and memory is taken as it is needed. ``prefix_cache`` keeps the
    pages of ended texts, as long as nothing else needs them, for prompts that begin alike.
    ``max_waiting`` bounds the requests that wait. ``chunk`` fixes the tokens of a prompt's chunk,
    which are else chosen from the measured rate.

    Where steps are launched ahead, a launch has up to ``max_steps`` of them.

    With a caller's ``cache`` the engine runs on that. Requests name their slots there, which keep
    what they hold, and go on from what they share with it.

    One thread drives an engine. Nothing in it depends on time but the length of chunks, deadlines
    and the statistics. Raises ValueError where the memory does not suffice for one full context.
    """

    def __init__(
        self,
        model: Lfm2 | Any,
        *,
        max_rows: int = 16,
        max_length: int | None = None,
        memory: int | str | None = None,
        pages: int | None = None,
        prefix_cache: bool = True,
        max_waiting: int | None = None,
        chunk: int | None = None,
        cache: Cache | None = None,
        max_steps: int = MAX_STEPS,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.model: Lfm2 = getattr(model, "network", model)
        model = self.model
        limit = model.config.context_length
        self.max_length = min(max_length or limit, limit)
        if cache is not None:
            self.max_length, max_rows = cache.max_length, cache.slots
        self.max_rows, self.max_waiting = max_rows, max_waiting
        if memory is not None:
            if pages is not None:
                raise ValueError("give memory or pages, not both")
            pages = self._pages_of(memory)
        if pages is not None:
            pages = min(pages, max_rows * pages_of(self.max_length))
            if pages < 1:
                raise ValueError(f"pages must be at least 1, got {pages}")
            self.max_length = min(self.max_length, pages * PAGE_SIZE)
        # Keys of such RoPE scaling depend on the length of the call that made them.
        self._prefix_cache = prefix_cache and not model.config.rope_follows_length
        self._prefix_cache &= cache is None
        self._pages, self._max_steps = pages, max_steps
        seconds = CHUNK_SECONDS.get(model.device.type, CPU_CHUNK_SECONDS)
        self.scheduler = Scheduler(seconds, chunk)
        self.statistics = Statistics()
        self._next_id = self._arrivals = 0
        self._events: list[Event] = []
        self._begin(cache)

    def _begin(self, cache: Cache | None = None) -> None:
        """Run on ``cache``, or on a new one."""
        if cache is None:
            cache = new_cache(self.model, self.max_rows, self.max_length, pages=self._pages)
        self.cache = cache
        self.index = PrefixIndex(self.cache.pool) if self._prefix_cache else None
        self.runner = ModelRunner(self.model, self.cache)
        self.decode = DecodeLoop(self.model, self.cache, max_steps=self._max_steps)
        self._free = list(reversed(range(self.max_rows)))
        # Rows that ended, whose pages a step under way may still write to.
        self._leaving: list[Row] = []
        self._prompt_logprobs: dict[Row, list[LogProbs | None]] = {}

    def _pages_of(self, memory: int | str) -> int:
        """Return the pages that fit into ``memory`` beside the conv windows."""
        config, dtype = self.model.config, self.model.dtype
        taken = bytes_of(memory, self.model.device)
        kinds = config.layer_types
        page = config.cache_bytes(dtype.itemsize, PAGE_SIZE)
        window = kinds.count("conv") * (config.conv_L_cache + 2) * config.hidden_size
        windows = (self.max_rows + 1) * window * dtype.itemsize
        pages = (taken - windows) // max(page, 1)
        if pages < 1:
            raise ValueError(
                f"memory={memory!r} is {taken / 2**20:.0f} MiB, but {windows / 2**20:.0f} MiB of "
                f"conv windows and a page of {page / 2**20:.2f} MiB are the least that an engine "
                "of these max_rows needs; give more memory, or lower max_rows"
            )
        return int(pages)

    @property
    def tokens(self) -> int:
        """Tokens that the pages hold at most."""
        return self.cache.pool.memory.limit * PAGE_SIZE

    @property
    def busy(self) -> bool:
        """True while a request has not ended, or an event was not handed out."""
        rows = self.decode.rows or self.scheduler.waiting or self.scheduler.prefilling
        return bool(rows or self._events or self._leaving or self.decode.unread)

    def add(self, request: Request, slots: Sequence[int] | None = None) -> int:
        """Take a request and return its id.

        On a caller's cache ``slots`` has the slot of each of its continuations. Raises ValueError
        for what can never run, and QueueFull while ``max_waiting`` wait.
        """
        request.check(self.model.config.vocab_size, self.max_length)
        waiting = len(self.scheduler.waiting)
        if self.max_waiting is not None and waiting + request.n > self.max_waiting:
            raise QueueFull(
                f"{waiting} continuations wait and max_waiting is {self.max_waiting}; try again "
                "later"
            )
        self._next_id += 1
        room = self.max_length - len(request.prompt)
        now = time.monotonic()
        for index in range(request.n):
            self._arrivals += 1
            row = Row(
                id=self._next_id,
                request=request,
                index=index,
                limit=min(request.max_tokens or room, room),
                arrival=self._arrivals,
                arrived=now,
                pinned=None if slots is None else slots[index],
            )
            self.scheduler.wait(row)
        self.statistics.requests += 1
        return self._next_id

    def cancel(self, id: int) -> None:
        """End what is left of a request; its last events say "cancelled"."""
        for row in self.rows:
            if row.id == id:
                self._end(row, "cancelled")

    def step(self) -> list[Event]:
        """Run one step: at most one chunk of prompts, then one launch of the rows that decode.

        Returns what is known of new tokens and ends. Raises what the model raises; ``reset`` makes
        the engine usable then.
        """
        self.statistics.steps += 1
        self._expire()
        self._release()
        self._admit()
        self._run_prompts()
        self._run_rows()
        self._release()
        events, self._events = self._events, []
        self._count()
        return events

    def abandon(self) -> None:
        """Forget all requests, and count what their steps have run; slots keep what they hold."""
        rows = self.rows
        self.decode.settle()
        self._events.clear()
        for row in rows:
            self._leave(row)
        self._release()

    def reset(self, error: Exception | None = None) -> None:
        """Forget all requests, whose last events carry ``error``, and what the cache holds."""
        for row in self.rows:
            row.error = error
            self._event(row, None, "error" if error else "cancelled")
        self.scheduler = Scheduler(self.scheduler.seconds, self.scheduler.chunk)
        self._begin()

    def sleep(self) -> None:
        """Give the memory of cache and graphs back. Raises RuntimeError while requests run."""
        if self.busy:
            raise RuntimeError("sleep() needs an engine without requests; step until none is left")
        del self.cache, self.index, self.runner, self.decode
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Take memory again after ``sleep``; nothing is cached."""
        self._begin()

    def close(self) -> None:
        """End all requests and give the memory back."""
        self.reset()
        self._events.clear()
        self.sleep()

    @property
    def rows(self) -> list[Row]:
        """Every row that has not ended."""
        rows = (*self.decode.rows, *self.scheduler.prefilling, *self.scheduler.waiting)
        return [row for row in rows if row.finish_reason is None]

    def _expire(self) -> None:
        now = time.monotonic()
        for row in self.rows:
            if row.request.deadline is not None and now >= row.request.deadline:
                self._end(row, "deadline")

    def _end(self, row: Row, reason: str) -> None:
        """End a row before its time."""
        self._event(row, None, reason)
        self._leave(row)

    def _leave(self, row: Row) -> None:
        """Have an ended row's slot given back as soon as nothing under way writes to it."""
        row.ended = True
        self.scheduler.leave(row)
        self._prompt_logprobs.pop(row, None)
        if row.slot >= 0:
            self._leaving.append(row)

    def _release(self) -> None:
        """Give back the slots of ended rows that nothing under way writes to."""
        for row in list(self._leaving):
            if not self.decode.is_under_way(row):
                self._leaving.remove(row)
                self._give_back(row)

    def _give_back(self, row: Row) -> None:
        """Empty a row's slot, if it is no caller's; full pages stay in the index."""
        if row.pinned is None:
            self._enter(row)
            self.cache.reset([row.slot])
        self._free.append(row.slot)
        row.slot = -1

    def _enter(self, row: Row) -> None:
        """Enter the full pages that a row's slot holds into the index."""
        if self.index is not None:
            slot = row.slot
            held = self.cache.history[slot][: self.cache.lengths[slot]]
            self.index.enter(held, self.cache.pages(slot), row.request.salt)

    def _admit(self) -> None:
        """Give slots to waiting rows, in order, while their pages are there."""
        scheduler = self.scheduler
        while self._free and scheduler.waiting:
            row = scheduler.waiting[0]
            match = self._match(row)
            if match is None:
                return
            needed = pages_wanted(row) - sum(map(self.cache.pool.is_owned, match.pages))
            others = sum(
                max(pages_wanted(other) - len(self.cache.pages(other.slot)), 0)
                for other in scheduler.prefilling
            )
            alone = not scheduler.prefilling and not self.decode.rows and not self._leaving
            if needed + others > self.cache.pool.available and not alone:
                return
            scheduler.leave(row)
            self._take_slot(row)
            if match.tokens:
                self.cache.attach(row.slot, match, row.text[: match.tokens])
            scheduler.prefilling.append(row)
            if not row.written:
                row.cached_tokens = self.cache.lengths[row.slot]
                self.statistics.prefix_hits += row.cached_tokens
                self.statistics.prompt_tokens += row.start

    def _take_slot(self, row: Row) -> None:
        """Give a row its slot, or any; a caller's goes back to what it shares with the text."""
        if row.pinned is None:
            row.slot = self._free.pop()
            return
        row.slot = row.pinned
        self._free.remove(row.slot)
        shared = common_prefix(row.text[:-1], self.cache.history[row.slot])
        self.cache.go_back(row.slot, shared)

    def _match(self, row: Row) -> Match | None:
        """Return what the index has of a row's text, None while another row makes more of it."""
        if any(other.id == row.id for other in self.scheduler.prefilling):
            return None
        if self.index is None or row.request.prompt_logprobs is not None:
            return Match()
        text = row.text
        match = self.index.match(text[:-1], row.request.salt)
        page = len(match.pages) + 1
        for other in self.scheduler.prefilling:
            if other.request.salt == row.request.salt and page * PAGE_SIZE < len(text):
                if other.text[: page * PAGE_SIZE] == text[: page * PAGE_SIZE]:
                    return None
        return match

    def _run_prompts(self) -> None:
        """Run a chunk of the prompts; rows whose prompts have run get their first tokens."""
        chunk = self.scheduler.next_chunk(self._ran, bool(self.decode.rows))
        if not chunk:
            return
        rows = [row for row, _ in chunk]
        replays = [self.cache.replay(row.slot) for row in rows]
        texts = []
        for (row, count), again in zip(chunk, replays, strict=True):
            ran = self._ran(row)
            texts.append(again + row.text[ran : ran + count])
        begin = time.perf_counter()
        slots = [row.slot for row in rows]
        counts = [len(again) for again in replays]
        wanted = [row for row in rows if row.request.prompt_logprobs is not None]
        try:
            if wanted:
                logits = self._with_prompt_logprobs(rows, texts, slots, counts)
            else:
                ends = [row.length for row in rows]
                logits = self.runner.run_chunks(texts, slots, counts, ends)
        except CacheError:
            if not self._preempt():
                raise
            return
        if self.model.device.type == "cpu":
            took = time.perf_counter() - begin
            self.scheduler.measured(rows, sum(map(len, texts)), took)
        for row in rows:
            self._enter(row)
        done = [place for place, row in enumerate(rows) if self._ran(row) == row.length]
        if done:
            at = on_device(done, torch.int64, logits.device)
            self._begin_rows([rows[place] for place in done], logits[at])

    def _ran(self, row: Row) -> int:
        return self.cache.lengths[row.slot]

    def _with_prompt_logprobs(
        self,
        rows: Sequence[Row],
        texts: Sequence[Sequence[int]],
        slots: Sequence[int],
        replays: Sequence[int],
    ) -> torch.Tensor:
        """Run chunks one by one, and note the log-probabilities that their requests ask for."""
        last = []
        for row, text, slot, again in zip(rows, texts, slots, replays, strict=True):
            count, ends = row.request.prompt_logprobs, [row.length]
            if count is None or row.written:
                last.append(self.runner.run_chunks([text], [slot], [again], ends)[0])
                continue
            first = self._ran(row)
            logits = self.runner.run_chunks([text], [slot], [again], ends, every=True)
            following = row.request.prompt[first + 1 : first + len(text) + 1]
            found = self._prompt_logprobs.setdefault(row, [None])
            told = logits[: len(following)]
            found.extend(log_probs(told, following, [count] * len(following)))
            last.append(logits[-1])
        return torch.stack(last)

    def _begin_rows(self, rows: Sequence[Row], logits: torch.Tensor) -> None:
        """Have rows decode whose texts have run; ``logits [B, V]`` choose their next tokens."""
        rows, places = list(rows), list(range(len(rows)))
        for place, row in enumerate(list(rows)):
            self.scheduler.leave(row)
            for sibling in self._fork(row):
                rows.append(sibling)
                places.append(place)
        if len(rows) > len(logits):
            logits = logits[on_device(places, torch.int64, logits.device)]
        self.decode.admit(rows, logits, sampling_state(self.model, rows))

    def _fork(self, row: Row) -> list[Row]:
        """Give slots to the waiting continuations of a row's request: copies of its slot."""
        forked: list[Row] = []
        if row.written or row.request.prompt_logprobs is not None:
            return forked
        for sibling in list(self.scheduler.waiting):
            if sibling.id != row.id or sibling.written:
                continue
            # A page for what is not full, and one that is written next.
            if not self._free or self.cache.pool.available < 2:
                break
            slot = self._free[-1] if sibling.pinned is None else sibling.pinned
            self._free.remove(slot)
            self.cache.copy(row.slot, slot)
            sibling.slot, sibling.cached_tokens = slot, row.start
            self.scheduler.leave(sibling)
            forked.append(sibling)
        return forked

    def _run_rows(self) -> None:
        """Launch a step of the rows that decode, and read what launches before it made."""
        launched = 0
        if self.decode.rows:
            if any(row.needs_logits for row in self.decode.rows):
                self._read(0)
            while True:
                try:
                    launched = self.decode.launch()
                    break
                except CacheError:
                    if not self._preempt():
                        raise
        self._read(self.decode.lag if launched else 0)

    def _read(self, keep: int) -> None:
        """Turn the tokens of all launches but the last ``keep`` into events."""
        now = time.monotonic()
        for rows, tokens, told in self.decode.read(keep):
            for row, token in zip(rows, tokens, strict=True):
                if row.finish_reason is not None:
                    continue
                self._token(row, token, told.get(row), now)

    def _token(self, row: Row, token: int, logprobs: LogProbs | None, now: float) -> None:
        """Note a new token of a row, and its end if it is the last."""
        request, count = row.request, len(row.written)
        if token < 0:
            row.written.pop()
            changed = row.request.changes_logits
            row.error = no_token(row, count, self.model.dtype, processed=changed)
            self._event(row, None, "error")
            self._leave(row)
            return
        times = self.statistics.between_tokens if count > 1 else self.statistics.first_token
        times.append(now - (row.last_token if count > 1 else row.arrived))
        row.last_token = now
        self.statistics.new_tokens += 1
        reason = None
        if token in row.ends:
            reason = "stop"
        elif request.stop is not None and request.stop(row.written):
            reason = "stop"
        elif count == row.limit:
            reason = "length"
        self._event(row, token, reason, logprobs)
        if reason is not None:
            self._leave(row)
        elif self.cache.lengths[row.slot] % PAGE_SIZE == 0:
            self._enter(row)

    def _event(
        self, row: Row, token: int | None, reason: str | None, logprobs: LogProbs | None = None
    ) -> None:
        row.finish_reason = reason
        prompt = self._prompt_logprobs.pop(row, None)
        self._events.append(
            Event(
                id=row.id,
                index=row.index,
                token=token,
                finish_reason=reason,
                logprobs=logprobs,
                prompt_logprobs=None if prompt is None else tuple(prompt),
                cached_tokens=row.cached_tokens,
                error=row.error,
            )
        )

    def _preempt(self) -> bool:
        """Take the pages of the youngest row; False if there is none but the oldest.

        Where reading what is under way ends rows and frees their pages, no row is preempted. The
        row's full pages stay in the index while nobody needs them. It waits again, and goes on
        later as if nothing had been.
        """
        before = self.cache.pool.available
        self._read(0)
        self._release()
        if self.cache.pool.available > before:
            return True
        rows = [row for row in self.rows if row.slot >= 0]
        rows.sort(key=lambda row: (row.request.priority, row.arrival))
        if len(rows) < 2:
            return False
        row = rows[-1]
        self.decode.remove(row)
        self.scheduler.leave(row)
        self._give_back(row)
        row.launched = len(row.written)
        # They are told anew, from the prompt's first chunk on.
        self._prompt_logprobs.pop(row, None)
        self.scheduler.wait(row)
        self.statistics.preemptions += 1
        return True

    def _count(self) -> None:
        """Note in the statistics what is so now."""
        statistics, pool = self.statistics, self.cache.pool
        statistics.running = len(self.decode.rows) + len(self.scheduler.prefilling)
        statistics.waiting = len(self.scheduler.waiting)
        statistics.pages_free, statistics.pages_cached = pool.free, pool.cached
        statistics.pages_used = pool.used
