"""Scheduler: the order of waiting requests, and the next chunk of their prompts."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable

from lfm2_fast.cache.page_memory import PAGE_SIZE, pages_of
from lfm2_fast.engine.request import Row

# Most tokens of a chunk, and the least that is worth a pass over the weights.
MOST, LEAST = 2048, 32
# Most times that a chunk takes its seconds, where more prompts wait than rows decode.
MOST_PATIENCE = 4
# New tokens whose pages must be there when a request is admitted.
RESERVED = 256


class Scheduler:
    """The rows that wait, in order, and those whose prompts run.

    Rows wait by priority, then by arrival. A preempted row keeps its arrival, so it is the first of
    its priority again. ``seconds`` bounds a chunk while other rows decode. The bound grows with the
    prompts that wait for each of those rows, up to ``MOST_PATIENCE`` times: a pass over more tokens
    takes less for each, and full steps less for each row. ``first`` is the tokens of a chunk as
    long as none was timed. ``chunk`` fixes the tokens of every chunk.
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

    def next_chunk(self, ran: Callable[[Row], int], decoding: int) -> list[tuple[Row, int]]:
        """Return the rows whose prompts run next, and how many tokens of each.

        ``ran`` tells the tokens of a row that have run; ``decoding`` counts the rows that decode.
        Prompts that fit into a chunk are packed. They take turns with longer ones, so neither waits
        for all of the other. While no row decodes a chunk is as long as it may be.
        """
        rests = [(row, row.length - ran(row)) for row in self.prefilling if row.length > ran(row)]
        if not rests:
            return []
        prompts = len(rests) + len(self.waiting)
        room = self._room(rests[0][0], decoding, prompts)
        short = [(row, rest) for row, rest in rests if rest <= room]
        long = [(row, rest) for row, rest in rests if rest > room]
        if long and (not short or not self._long_was_last):
            self._long_was_last = True
            row = long[0][0]
            return [(row, self._room(row, decoding, prompts))]
        self._long_was_last = False
        chosen = []
        for row, rest in short:
            if rest <= room:
                chosen.append((row, rest))
                room -= rest
        return chosen

    def measured(self, rows: Iterable[Row], tokens: int, seconds: float) -> None:
        """Note what a chunk of ``tokens`` took.

        A shorter one than ``LEAST`` says nothing: reading the weights is most of its time.
        """
        if tokens < LEAST:
            return
        self._cost = seconds / tokens
        for row in rows:
            # A row that has left is not held by its cost.
            if row in self.prefilling:
                self._costs[row] = self._cost

    def _room(self, row: Row, decoding: int, prompts: int) -> int:
        """Return the most tokens of a chunk of a row's prompt, while ``prompts`` wait to run."""
        if self.chunk is not None:
            return self.chunk
        if not decoding:
            return MOST
        cost = self._costs.get(row, self._cost)
        if cost is None:
            return self.first
        patience = min(max(prompts / decoding, 1.0), MOST_PATIENCE)
        room = int(self.seconds * patience / max(cost, 1e-9))
        room = room // PAGE_SIZE * PAGE_SIZE if room >= PAGE_SIZE else room
        return min(max(room, LEAST), MOST)


def pages_wanted(row: Row) -> int:
    """Return the pages that must be there when a row is admitted: its text's and a reserve."""
    rest = row.limit - len(row.written)
    return pages_of(row.length + min(rest, RESERVED))
