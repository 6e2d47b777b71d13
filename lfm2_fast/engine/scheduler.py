"""Scheduler: the order of waiting requests, and the next chunk of their prompts."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable

from lfm2_fast.cache.page_memory import PAGE_SIZE, pages_of
from lfm2_fast.engine.request import Row

# Most tokens of a chunk, and the fewest that are worth a pass over the weights.
MOST, LEAST = 2048, 32
# Largest factor on a chunk's seconds, used while more prompts wait than rows decode.
MOST_PATIENCE = 4
# New tokens for which there must be pages when a request is admitted.
RESERVED = 256


class Scheduler:
    """Rows that wait, in order, and those whose prompts run.

    Rows wait by priority, then by arrival. A preempted row keeps its arrival, so it is the first of
    its priority again. ``seconds`` limits a chunk while other rows decode. The limit grows with the
    number of waiting prompts for each of those rows, up to ``MOST_PATIENCE`` times. Longer chunks
    cost less for each token, and full steps less for each row. ``first`` is the length of a chunk
    before one was timed. ``chunk`` fixes the tokens of every chunk.
    """

    def __init__(self, seconds: float, chunk: int | None = None, *, first: int = 2 * LEAST) -> None:
        self.seconds = seconds
        self.chunk = chunk
        self.first = first
        self.waiting: list[Row] = []
        self.prefilling: list[Row] = []
        # Seconds for a prompt token: in the last chunk, and by row, as later tokens cost more.
        self._cost: float | None = None
        self._costs: dict[Row, float] = {}
        self._long_was_last = False

    def wait(self, row: Row) -> None:
        """Insert a row into the queue."""
        bisect.insort(self.waiting, row, key=lambda row: (row.request.priority, row.arrival))

    def leave(self, row: Row) -> None:
        """Remove a row from the queue and from the running prompts."""
        for rows in (self.waiting, self.prefilling):
            if row in rows:
                rows.remove(row)
        self._costs.pop(row, None)

    def next_chunk(self, ran: Callable[[Row], int], decoding: int) -> list[tuple[Row, int]]:
        """Return the rows whose prompts run next, and how many tokens of each.

        ``ran`` returns the tokens of a row that have run. ``decoding`` is the number of rows that
        decode. Prompts that fit into a chunk are packed. They take turns with longer prompts, so
        neither kind waits for all of the other. If no row decodes, a chunk has its full length.
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
        """Note how long a chunk of ``tokens`` took.

        A chunk shorter than ``LEAST`` is ignored: most of its time is the reading of the weights.
        """
        if tokens < LEAST:
            return
        self._cost = seconds / tokens
        for row in rows:
            # The key must not keep a row alive that has left.
            if row in self.prefilling:
                self._costs[row] = self._cost

    def _room(self, row: Row, decoding: int, prompts: int) -> int:
        """Return the largest chunk of a row's prompt in tokens, while ``prompts`` wait to run."""
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
    """Return how many pages an admitted row needs: those of its text and a reserve."""
    rest = row.limit - len(row.written)
    return pages_of(row.length + min(rest, RESERVED))
