"""Scheduler: the order of waiting requests, and the next chunk of their prompts."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable

from lfm2_fast.cache.page_memory import PAGE_SIZE, pages_of
from lfm2_fast.engine.request import Row

# Most tokens of a chunk, and the least that is worth a pass over the weights.
MOST, LEAST = 2048, 32
# New tokens whose pages must be there when a request is admitted.
RESERVED = 256


class Scheduler:
    """The rows that wait, in order, and those whose prompts run.

    Rows wait by priority, then by arrival. A preempted row keeps its arrival, so it is the first of
    its priority again. ``seconds`` bounds a chunk while other rows decode; ``first`` is its tokens
    as long as no chunk was timed. ``chunk`` fixes the tokens of every chunk.
    """

    def __init__(self, seconds: float, chunk: int | None = None, *, first: int = 2 * LEAST) -> None:
        self.seconds = seconds
        self.chunk = chunk
        self.first = first
        self.waiting: list[Row] = []
        self.prefilling: list[Row] = []
        # Seconds a prompt token, of the last chunk and by row: a token costs more after more.
        self._cost: float | None = None
        self._costs: dict[Row, float] = {}
        self._long_was_last = False

    def wait(self, row: Row) -> None:
        """Put a row in its place among those that wait."""
        bisect.insort(self.waiting, row, key=lambda row: (row.request.priority, row.arrival))

    def leave(self, row: Row) -> None:
        """Forget a row, wherever it stands."""
        for rows in (self.waiting, self.prefilling):
            if row in rows:
                rows.remove(row)
        self._costs.pop(row, None)

    def next_chunk(self, ran: Callable[[Row], int], decoding: bool) -> list[tuple[Row, int]]:
        """Return the rows whose prompts run next, and how many tokens of each.

        Prompts that fit into a chunk are packed. They take turns with longer ones, so neither waits
        for all of the other. While no row decodes a chunk is as long as it may be.
        """
        rests = [(row, row.length - ran(row)) for row in self.prefilling if row.length > ran(row)]
        if not rests:
            return []
        if self.chunk is not None:
            room = self.chunk
        else:
            room = self._room(rests[0][0]) if decoding else MOST
        short = [(row, rest) for row, rest in rests if rest <= room]
        long = [(row, rest) for row, rest in rests if rest > room]
        if long and (not short or not self._long_was_last):
            self._long_was_last = True
            return [(long[0][0], self._room(long[0][0]) if self._bounded(decoding) else room)]
        self._long_was_last = False
        chosen = []
        for row, rest in short:
            if rest <= room:
                chosen.append((row, rest))
                room -= rest
        return chosen

    def measured(self, rows: Iterable[Row], tokens: int, seconds: float) -> None:
        """Note what a chunk of ``tokens`` took."""
        self._cost = seconds / tokens
        for row in rows:
            # A row that has left is not held by its cost.
            if row in self.prefilling:
                self._costs[row] = self._cost

    def _bounded(self, decoding: bool) -> bool:
        return decoding and self.chunk is None

    def _room(self, row: Row) -> int:
        cost = self._costs.get(row, self._cost)
        if cost is None:
            return self.first
        room = int(self.seconds / max(cost, 1e-9))
        room = room // PAGE_SIZE * PAGE_SIZE if room >= PAGE_SIZE else room
        return min(max(room, LEAST), MOST)


def pages_wanted(row: Row) -> int:
    """Return the pages that must be there when a row is admitted: its text's and a reserve."""
    rest = row.limit - len(row.written)
    return pages_of(row.length + min(rest, RESERVED))
