"""SlotPages: the pages of every slot of a KV cache, and the table by which kernels find them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from lfm2_fast.cache.batch import on_device, together_on_device
from lfm2_fast.cache.page_memory import PAGE_SIZE, PageMemory, pages_of
from lfm2_fast.cache.page_pool import CacheError, PagePool
from lfm2_fast.cache.prefix_index import Match


@dataclass
class KVPages:
    """One attention layer's ``k, v [pages, kv_heads, page_size, head_dim]``.

    ``table [slots, pages per slot]`` int32, shared by all layers, lists the pages of a slot's
    sequence, in order. Entries beyond a sequence are undefined.
    """

    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor


class SlotPages:
    """Pages of ``memory`` by slot, with their owners in ``pool`` and a table for all layers.

    A slot has at most ``most`` pages. With ``dummy`` there is one more slot, with one page.
    ``layers`` are the attention layers' views, updated in place. With ``in_place`` the table is a
    narrow view that widens; ``reallocations`` counts how often it did.
    """

    def __init__(
        self, memory: PageMemory, slots: int, most: int, *, dummy: bool, in_place: bool
    ) -> None:
        self.pool = PagePool(memory)
        self.reallocations = 0
        self._pages: list[list[int]] = [[] for _ in range(slots)]
        # A cache made inside torch.inference_mode must stay writable outside of it.
        with torch.inference_mode(False):
            size = slots + dummy, most
            self._table = torch.zeros(size, dtype=torch.int32, device=memory.device)
        count = memory.shape[0] // 2
        self.layers = [KVPages(self._table, self._table, self._table) for _ in range(count)]
        # The columns of the table decide how many programs a GPU's kernels launch.
        self.columns = 1 if in_place and memory.device.type != "cpu" else most
        if dummy:
            self._table[slots, 0] = self.pool.take(1)[0]
        self._view = self._table[:, : self.columns]
        self.lay_out()

    def __getitem__(self, slot: int) -> list[int]:
        """Return the numbers of the pages that hold a slot's sequence, in order."""
        return self._pages[slot]

    def take_memory(self) -> None:
        """Take the memory of all pages now. Raises torch.OutOfMemoryError as torch does."""
        self.pool.take_memory()
        self.lay_out()

    def make_room(self, contexts: Mapping[int, int], lengths: Sequence[int]) -> None:
        """Give each slot pages of its own for its context, in tokens; ``lengths`` are present ones.

        Raises CacheError, with nothing changed, if there are too few pages.
        """
        wanted: list[tuple[int, int]] = []
        for slot, tokens in contexts.items():
            pages = self._pages[slot]
            first = lengths[slot] // PAGE_SIZE
            # The page that is written next, if it has another owner, and the pages after it.
            if first < len(pages) and tokens > lengths[slot]:
                if self.pool.is_shared(pages[first]):
                    wanted.append((slot, first))
            wanted.extend((slot, column) for column in range(len(pages), pages_of(tokens)))
        if not wanted:
            return
        taken = self._take(len(wanted))
        self._widen(max(column for _, column in wanted) + 1)
        for (slot, column), page in zip(wanted, taken, strict=True):
            pages = self._pages[slot]
            if column < len(pages):
                self.pool.memory.copy(pages[column], page, lengths[slot] % PAGE_SIZE)
                self.pool.release([pages[column]])
                pages[column] = page
            else:
                pages.append(page)
        rows, columns = zip(*wanted, strict=True)
        fields = (rows, torch.int64), (columns, torch.int64), (taken, torch.int32)
        *at, pages_taken = together_on_device(self._table.device, *fields)
        self._table[tuple(at)] = pages_taken

    def truncate(self, slot: int, length: int) -> None:
        """Keep only the pages of a slot's first ``length`` tokens."""
        kept = pages_of(length)
        self.pool.release(self._pages[slot][kept:])
        del self._pages[slot][kept:]

    def attach(self, slot: int, match: Match) -> int:
        """Give an empty slot the matched pages, and return the number of their tokens.

        Whole pages are shared. Part of one page is copied, if there is a page for the copy.
        """
        pages, held = list(match.pages), len(match.pages) * PAGE_SIZE
        self.pool.share(pages)
        if match.partial is not None:
            # Owned while it is copied, so that it cannot be evicted for its own copy.
            self.pool.share([match.partial])
            with suppress(CacheError):
                pages += self._take(1)
                self.pool.memory.copy(match.partial, pages[-1], match.rows)
                held += match.rows
            self.pool.release([match.partial])
        self._hold(slot, pages)
        return held

    def reorder(self, sources: Mapping[int, int], lengths: Sequence[int]) -> None:
        """Give each slot the pages of another one, ``{slot: source}``, all at the same time.

        Full pages are shared. An unfinished page is copied, except for one slot: it takes the page
        over if the source gives it up. Raises CacheError if there are too few pages. The slots that
        should change have no pages then.
        """
        pages: dict[int, list[int]] = {}
        copies: list[tuple[int, int, int]] = []
        given: set[int] = set()
        for slot, source in sources.items():
            full, rest = divmod(lengths[source], PAGE_SIZE)
            taken_over = bool(rest) and source in sources and source not in given
            if taken_over:
                given.add(source)
            elif rest:
                copies.append((slot, self._pages[source][full], rest))
            pages[slot] = self._pages[source][: full + taken_over]
            self.pool.share(pages[slot])
        for slot in sources:
            self.truncate(slot, 0)
        try:
            made = self._take(len(copies))
        except CacheError:
            for own in pages.values():
                self.pool.release(own)
            raise
        for (slot, page, rest), copy in zip(copies, made, strict=True):
            self.pool.memory.copy(page, copy, rest)
            pages[slot].append(copy)
        for slot, own in pages.items():
            self._hold(slot, own)

    def lay_out(self) -> None:
        """Give every layer the present pages and the present table."""
        for number, layer in enumerate(self.layers):
            layer.k, layer.v = self.pool.memory.layer(number)
            # One object until it widens: implementations use it as a key for what their graphs
            # point at.
            layer.table = self._view

    def _hold(self, slot: int, pages: list[int]) -> None:
        """Give an empty slot ``pages``, which it owns."""
        self._widen(len(pages))
        self._pages[slot] = pages
        self._table[slot, : len(pages)] = on_device(pages, torch.int32, self._table.device)

    def _take(self, count: int) -> list[int]:
        """Own ``count`` pages; layers see memory that grew. Raises CacheError as the pool does."""
        known = self.pool.memory.count
        taken = self.pool.take(count)
        if self.pool.memory.count != known:
            self.lay_out()
        return taken

    def _widen(self, columns: int) -> None:
        """Make the table at least ``columns`` wide."""
        if columns > self.columns:
            self.columns = min(max(columns, 2 * self.columns), self._table.shape[1])
            self.reallocations += 1
            self._view = self._table[:, : self.columns]
            self.lay_out()
