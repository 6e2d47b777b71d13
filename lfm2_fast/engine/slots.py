"""Slots: the slots of a cache that rows have, and the prefix index over its pages."""

from __future__ import annotations

from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.cache.page_pool import CacheError
from lfm2_fast.cache.prefix_index import Match, PrefixIndex, common_prefix
from lfm2_fast.engine.request import Row


class Slots:
    """Gives slots of ``cache`` to rows and takes them back.

    With ``shares`` the full pages of every text are entered into an index, and rows with the same
    beginning share them. ``leaving`` are ended rows with pages that a running step may still write
    to.
    """

    def __init__(self, cache: Cache, *, shares: bool) -> None:
        self.cache = cache
        self.index = PrefixIndex(cache.pool) if shares else None
        self.free = list(reversed(range(cache.slots)))
        self.leaving: list[Row] = []

    def match(self, row: Row) -> Match:
        """Return the indexed part of a row's text, without its last token."""
        if self.index is None:
            return Match()
        return self.index.match(row.text[:-1], row.salt, row.digests)

    def take(self, row: Row, match: Match) -> None:
        """Give a row a slot that holds the pages of ``match``.

        A caller's slot is cut to the part that it shares with the text. It is emptied if the
        request wants the log-probabilities of the whole prompt.
        """
        if row.pinned is None:
            row.slot = self.free.pop()
            if match.tokens:
                self.cache.attach(row.slot, match, row.text[: match.tokens])
            return
        row.slot = row.pinned
        self.free.remove(row.slot)
        shared = 0
        if row.request.prompt_logprobs is None:
            shared = common_prefix(row.text[:-1], self.cache.history[row.slot])
        self.cache.go_back(row.slot, shared)

    def fork(self, row: Row, sibling: Row) -> bool:
        """Give ``sibling`` a slot with the content of the row's slot.

        Return False if there is no free slot, or there are too few pages.
        """
        slot = sibling.pinned
        if slot is None:
            # A page for the copy of the unfinished one, and one for the next tokens.
            if not self.free or self.cache.pool.available < 2:
                return False
            slot = self.free[-1]
        elif slot not in self.free:
            return False
        try:
            self.cache.copy(row.slot, slot)
        except CacheError:
            return False
        self.free.remove(slot)
        sibling.slot = slot
        return True

    def enter(self, row: Row) -> None:
        """Enter the full pages that a row's slot holds into the index."""
        if self.index is not None:
            slot = row.slot
            held = self.cache.history[slot][: self.cache.lengths[slot]]
            self.index.enter(held, self.cache.pages(slot), row.salt)

    def give_back(self, row: Row) -> None:
        """Empty a row's slot unless it is a caller's. Full pages stay in the index."""
        if row.pinned is None:
            self.enter(row)
            self.cache.reset([row.slot])
        self.free.append(row.slot)
        row.slot = -1
