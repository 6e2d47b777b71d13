"""Engine: many requests on one model, a step at a time: continuous batching over shared pages."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lfm2_fast.cache.batch import host_by_default
from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.cache.page_memory import PAGE_SIZE, pages_of
from lfm2_fast.engine.assistant import Assistant
from lfm2_fast.engine.block_drafter import BlockDrafter
from lfm2_fast.engine.decode import Chooser
from lfm2_fast.engine.events import Events
from lfm2_fast.engine.memory import bytes_of, pages_in
from lfm2_fast.engine.model_runner import new_cache
from lfm2_fast.engine.request import Event, Request, Row
from lfm2_fast.engine.row_runner import RowRunner
from lfm2_fast.engine.scheduler import LEAST, MOST, Scheduler
from lfm2_fast.engine.statistics import Statistics
from lfm2_fast.engine.step_buffers import StepBuffers
from lfm2_fast.engine.warm_up import warm_up_requests
from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.ops.sampling import SamplingParams

# Seconds that a chunk of a prompt may delay the rows that decode, on a CPU and on a GPU.
CPU_CHUNK_SECONDS, GPU_CHUNK_SECONDS = 0.1, 0.05


class QueueFull(RuntimeError):
    """Error of an engine whose queue is full. It takes requests again later."""


class Engine:
    """Runs requests of one model: ``add`` them, and ``step`` until each has ended.

    ``model`` is the network, or a model that holds it as ``network``.

    At most ``max_rows`` continuations run at the same time, each with a context of at most
    ``max_length`` tokens. ``memory`` is the size of the pages and conv windows: bytes, "8GB", or
    "80%" of the free memory. It is taken at once. ``pages`` limits the number of pages, of 64
    tokens, instead. Without both there are pages for ``max_rows`` full contexts, and memory is
    taken as it is needed. ``prefix_cache`` keeps the pages of ended texts for prompts with the same
    beginning, until other rows need them. While ``max_waiting`` continuations wait for a row,
    ``add`` raises QueueFull. ``chunk`` fixes the tokens of a prompt's chunk; without it they follow
    from the measured speed.

    With ``cache`` the engine runs on the caller's cache, with ``buffers`` made for it, or new ones.
    Requests name their slots there. Slots keep their content, and a request continues from the part
    that it shares with its slot. With ``chooser`` all rows begin together, and it chooses their
    tokens.

    ``prompt_lookup`` is the default of requests. ``assistant`` is a smaller model of the
    same vocabulary, which drafts tokens for requests; its cache is made as it is needed. Without
    one, the model's own drafter does, if one was loaded. Drafts change no text.

    Only one thread may use an engine. Time affects only the length of chunks, deadlines and the
    statistics. Raises ValueError if the memory is too small for one page.
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
        buffers: StepBuffers | None = None,
        chooser: Chooser | None = None,
        prompt_lookup: int = 0,
        assistant: Lfm2 | Any | None = None,
    ) -> None:
        if prompt_lookup < 0:
            raise ValueError(f"prompt_lookup must be at least 0, got {prompt_lookup}")
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.model: Lfm2 = getattr(model, "network", model)
        model = self.model
        limit = model.config.context_length
        self._length = min(max_length or limit, limit)
        if cache is not None:
            if memory is not None or pages is not None:
                raise ValueError("memory and pages are those of cache; leave them out")
            self._length, max_rows = cache.max_length, cache.slots
        self.max_length = self._length
        self.max_rows, self.max_waiting = max_rows, max_waiting
        if pages is not None:
            if memory is not None:
                raise ValueError("give memory or pages, not both")
            if pages < 1:
                raise ValueError(f"pages must be at least 1, got {pages}")
        # Taken once: a share of the free memory is that of an engine without memory.
        self._bytes = 0 if memory is None else bytes_of(memory, model.device)
        # Keys of RoPE scaling by length depend on the length of the call that made them.
        self._prefix_cache = prefix_cache and not model.config.rope_follows_length
        self._prefix_cache &= cache is None
        self._pages, self._chunk, self._chooser = pages, chunk, chooser
        self._memory, self._is_callers = memory, cache is not None
        self._prompt_lookup, self._assistant = (
            prompt_lookup,
            getattr(assistant, "network", assistant),
        )
        self.scheduler = self._new_scheduler()
        self.statistics = Statistics()
        self._next_id = self._arrivals = 0
        self.events = Events(self.statistics, model.dtype, chooser)
        self._begin(cache, buffers)

    # Not in a caller's inference mode: tensors made here must be writable outside of it.
    @torch.inference_mode(False)
    def _begin(self, cache: Cache | None = None, buffers: StepBuffers | None = None) -> None:
        """Run on ``cache``, or on a new one."""
        if cache is None:
            cache = self._new_cache()
        self.cache = cache
        if self._memory is not None:
            self._take_memory(self._memory)
        assistant: Assistant | BlockDrafter | None = None
        if self._assistant is not None:
            assistant = Assistant(self._assistant, self.model, cache.slots, self.max_length)
        elif self._chooser is None and self.model.drafts_on(cache):
            assistant = BlockDrafter(self.model, cache)
        self.runner = RowRunner(
            self.model,
            cache,
            buffers,
            self.scheduler,
            self.statistics,
            self.events,
            shares=self._prefix_cache,
            chooser=self._chooser,
            prompt_lookup=self._prompt_lookup,
            assistant=assistant,
        )
        self.slots, self.prefill = self.runner.slots, self.runner.prefill
        self.decode = self.runner.decode
        self._awake = True

    def _new_cache(self) -> Cache:
        """Return a new cache, for the drafter too if the model has one by now and it may draft."""
        model, max_rows = self.model, self.max_rows
        drafter = self._assistant is None and self._chooser is None
        pages, self.max_length = self._pages, self._length
        if self._memory is not None:
            pages = pages_in(self._memory, self._bytes, model, max_rows, drafter=drafter)
        if pages is not None:
            pages = min(pages, max_rows * pages_of(self.max_length))
            self.max_length = min(self.max_length, pages * PAGE_SIZE)
        return new_cache(model, max_rows, self.max_length, pages=pages, drafter=drafter)

    def _take_memory(self, memory: int | str) -> None:
        """Take the memory of all pages now, so that no later request lacks it."""
        try:
            self.cache.take_memory()
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"memory={memory!r} cannot be taken from {self.model.device}: something else took "
                f"it meanwhile, or it is fragmented ({error}); give less"
            ) from error

    @property
    def tokens(self) -> int:
        """Number of tokens that fit into the pages. Raises RuntimeError when asleep."""
        self._check_awake()
        return self.cache.pool.memory.limit * PAGE_SIZE

    def __str__(self) -> str:
        """Return a line that says how many rows run and how many tokens fit."""
        if not self._awake:
            return f"{self.max_rows} rows; asleep"
        size = self.tokens // PAGE_SIZE * self.cache.pool.memory.page_bytes / 2**20
        return (
            f"{self.max_rows} rows of at most {self.max_length:,} tokens; room for "
            f"{self.tokens:,} tokens together in {size:,.0f} MiB"
        )

    @property
    def busy(self) -> bool:
        """Return True while a request has not ended, or an event was not returned."""
        if not self._awake:
            return bool(self.events)
        return self.runner.busy or bool(self.events)

    def add(self, request: Request, slots: Sequence[int] | None = None) -> int:
        """Take a request and return its id.

        On a caller's cache ``slots`` has the slot of each of its continuations. Raises ValueError
        for a request that can never run, QueueFull while ``max_waiting`` wait, and RuntimeError
        when asleep.
        """
        self._check_awake()
        request.check(self.model.config.vocab_size, self.max_length)
        adapters = self.model.adapters
        adapter = adapters.active if request.adapter is None else adapters.find(request.adapter)
        waiting = len(self.scheduler.waiting) - len(self.slots.free)
        if self.max_waiting is not None and waiting >= self.max_waiting:
            raise QueueFull(
                f"{max(waiting, 0)} continuations wait for a row and max_waiting is "
                f"{self.max_waiting}; try again later"
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
                adapter=adapter,
                arrived=now,
                pinned=None if slots is None else slots[index],
            )
            self.scheduler.wait(row)
        self.statistics.requests += 1
        return self._next_id

    def cancel(self, id: int, index: int | None = None) -> None:
        """End a request, or one of its continuations. Its last event has "cancelled".

        An id that is unknown, or has ended, is ignored.
        """
        for row in self.rows:
            if row.id == id and index in (None, row.index):
                self.runner.end(row, "cancelled")

    # Not in a caller's inference mode either: a cache's tensors must be writable outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    @host_by_default()
    def step(self) -> list[Event]:
        """Run one step: at most one chunk of prompts, then one launch of the rows that decode.

        Returns events of new tokens and ends. Raises the exceptions of the model; the engine is
        usable again after ``reset``. Raises RuntimeError when asleep.
        """
        self._check_awake()
        self.statistics.steps += 1
        self._expire()
        self.runner.step()
        events = self.events.take()
        if self.model.adapters.release_unused():
            # Recorded steps hold the matrices.
            self.decode.buffers.drop_graphs()
        return events

    def warm_up(self, sampling: Iterable[SamplingParams] = ()) -> None:
        """Compile and capture, on a GPU, what requests will need, so that none waits for it.

        ``sampling`` are parameters by which they will choose tokens, beside greedy ones. Steps with
        loaded adapters are captured too, except those with whole matrices of several. It takes some
        tens of seconds where nothing was compiled on this machine, and does nothing on a CPU.
        Pages and counts are as before. Raises RuntimeError while requests run, or when asleep.
        """
        self._check_awake()
        if not self.model.ops.captures:
            return
        if self.busy:
            raise RuntimeError("warm_up() needs an engine without requests; call it before them")
        kinds = dict.fromkeys([SamplingParams(), *sampling])
        statistics = copy.deepcopy(vars(self.statistics))
        adapters, limits = self.model.adapters, (self.max_rows, self.max_length)
        # Captured steps differ by the whole matrices that they multiply by.
        differing = {adapters.whole & {adapters.find(name).entry}: name for name in adapters.names}
        for adapter in (None, *differing.values()):
            vocab_size = self.model.config.vocab_size
            for requests in warm_up_requests(*limits, vocab_size, kinds, adapter):
                for request in requests:
                    self.add(request)
                while self.busy:
                    self.step()
                self.clear_prefix_cache()
        vars(self.statistics).update(statistics)

    def abandon(self) -> None:
        """Drop all requests, and count the tokens that their steps have run.

        Slots keep their content.
        """
        rows = self.rows
        self.decode.settle()
        self.events.take()
        for row in rows:
            self.runner.leave(row)
        self.runner.release()

    def reset(self, error: Exception | None = None) -> None:
        """Drop all requests, with ``error`` in their last events, and empty the cache.

        Raises RuntimeError on a caller's cache, which the engine does not own. If the new cache
        cannot be made, for instance because memory= is too small for a drafter that was loaded
        meanwhile, the engine is asleep.
        """
        self._check_owner()
        for row in self.rows:
            if error is None:
                self.events.end(row, "cancelled")
            else:
                self.events.fail(row, error)
        self.scheduler = self._new_scheduler()
        # First: the new cache may need the memory.
        self._put_away()
        self._begin()

    def sleep(self) -> None:
        """Free the memory of cache and graphs. Raises RuntimeError while requests run."""
        if self.busy:
            raise RuntimeError("sleep() needs an engine without requests; step until none is left")
        self._check_owner()
        self._put_away()

    def _put_away(self) -> None:
        if not self._awake:
            return
        self._awake = False
        del self.cache, self.runner, self.slots, self.prefill, self.decode
        if self.model.device.type != "cpu":
            torch.get_device_module(self.model.device).empty_cache()

    def wake(self) -> None:
        """Take memory again after ``sleep``. The cache is empty."""
        self._check_owner()
        if not self._awake:
            self._begin()

    def close(self) -> None:
        """End all requests, without events, and free the memory. A second call does nothing.

        ``wake`` makes an engine with its own cache usable again.
        """
        if self._awake and self._is_callers:
            self.abandon()
        self.events.take()
        self.scheduler = self._new_scheduler()
        self._put_away()

    def clear_prefix_cache(self) -> None:
        """Free the pages of texts that have ended. Later prompts do not find them."""
        self._check_awake()
        if self.slots.index is not None:
            self.slots.index.clear()

    @property
    def rows(self) -> list[Row]:
        """Every row that has not ended."""
        return self.runner.rows if self._awake else []

    def _check_awake(self) -> None:
        if not self._awake:
            raise RuntimeError("the engine is asleep or closed; call wake() before you use it")

    def _check_owner(self) -> None:
        if self._is_callers:
            raise RuntimeError("an engine on a caller's cache cannot forget it; use abandon()")

    def _new_scheduler(self) -> Scheduler:
        cpu = self.model.device.type == "cpu"
        seconds, first = (CPU_CHUNK_SECONDS, 2 * LEAST) if cpu else (GPU_CHUNK_SECONDS, MOST)
        return Scheduler(seconds, self._chunk, first=first)

    def _expire(self) -> None:
        now = time.monotonic()
        for row in self.rows:
            if row.request.deadline is not None and now >= row.request.deadline:
                self.runner.end(row, "deadline")
