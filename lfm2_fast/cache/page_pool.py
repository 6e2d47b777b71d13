"""PagePool: every page of a KV cache is free, cached or owned."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from lfm2_fast.cache.page_memory import PageMemory


class CacheError(RuntimeError):
    """Error of a cache: it has no room left, or the state that a call needs is gone."""


class PagePool:
    """Pages of ``memory`` with their owners.

    A page with owners belongs to them. A page that ``keep`` marked stays cached after its last
    owner. When pages are needed, the least recently used cached page is evicted, and ``on_evict``
    is called.
    """

    def __init__(self, memory: PageMemory) -> None:
        self.memory = memory
        self.on_evict: Callable[[int], None] = lambda page: None
        self._free: list[int] = []
        self._owners: dict[int, int] = {}
        self._kept: set[int] = set()
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._refused: torch.OutOfMemoryError | None = None

    @property
    def used(self) -> int:
        """Pages that have an owner."""
        return len(self._owners)

    @property
    def cached(self) -> int:
        """Pages without owner whose content is kept."""
        return len(self._cached)

    @property
    def free(self) -> int:
        """Pages that can be taken without losing content, counting memory not taken yet."""
        return self.memory.limit - self.used - self.cached

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return self.memory.limit - self.used

    def take(self, count: int) -> list[int]:
        """Own ``count`` pages, of any content.

        Raises CacheError, with nothing changed, if fewer are available: because of the limit, or
        because the device has no more memory. In the second case the limit becomes the present
        number of pages.
        """
        if count > self.available:
            raise CacheError(
                f"{count} more pages do not fit into the cache: {self.available} of its "
                f"{self.memory.limit} are not owned; give it more memory, or run fewer or shorter "
                "sequences at a time"
            ) from self._refused
        self._grow(count)
        taken = []
        for _ in range(count):
            if not self._free:
                self._evict()
            page = self._free.pop()
            self._owners[page] = 1
            taken.append(page)
        return taken

    def take_memory(self) -> None:
        """Take memory for all pages now. Raises torch.OutOfMemoryError as torch does."""
        self._free[:0] = reversed(self.memory.grow(self.memory.limit - self.memory.count))

    def share(self, pages: Sequence[int]) -> None:
        """Add an owner to each page, which has owners or is cached."""
        for page in pages:
            self._cached.pop(page, None)
            self._owners[page] = self._owners.get(page, 0) + 1

    def release(self, pages: Sequence[int]) -> None:
        """Take an owner from each page. Without owners a page is free, or cached if it was kept.

        ``pages`` are in the order of their text. The last are evicted first.
        """
        for page in reversed(pages):
            left = self._owners.pop(page) - 1
            if left:
                self._owners[page] = left
            elif page in self._kept:
                self._cached[page] = None
            else:
                self._free.append(page)

    def keep(self, page: int) -> None:
        """Keep the content of an owned page beyond its last owner; it is never written again."""
        self._kept.add(page)

    def is_owned(self, page: int) -> bool:
        """Return True if the page has an owner."""
        return page in self._owners

    def is_shared(self, page: int) -> bool:
        """Return True if the page has another owner, or its content is kept."""
        return self._owners.get(page, 0) > 1 or page in self._kept

    def forget(self, page: int) -> None:
        """Undo ``keep``: an owned page will be free after its last owner."""
        self._kept.discard(page)

    def drop_cached(self) -> None:
        """Free every cached page."""
        while self._cached:
            self._evict()

    def _grow(self, count: int) -> None:
        """Take memory for the pages that are missing from ``count``. Without memory, evict cached
        pages.
        """
        short = min(count - len(self._free), self.memory.limit - self.memory.count)
        if short <= 0:
            return
        try:
            self._free.extend(reversed(self.memory.grow(short)))
        except torch.OutOfMemoryError as error:
            # Drop the frames of the error's traceback, which hold tensors.
            self.memory.limit, self._refused = self.memory.count, error.with_traceback(None)
            if count > self.available:
                raise CacheError(
                    f"the device has no memory for {count} more pages of the cache, which has "
                    f"{self.memory.nbytes / 2**20:.0f} MiB so far; run fewer or shorter sequences "
                    "at a time"
                ) from error

    def _evict(self) -> None:
        """Free the least recently used cached page."""
        page, _ = self._cached.popitem(last=False)
        self._kept.discard(page)
        self.on_evict(page)
        self._free.append(page)
