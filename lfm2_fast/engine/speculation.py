"""Speculation: which rows of a step get drafts, of which tokens, and what has come of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.cache.page_pool import CacheError
from lfm2_fast.engine.assistant import Assistant
from lfm2_fast.engine.block_drafter import BlockDrafter
from lfm2_fast.engine.draft_length import (
    ANOTHER_MODEL,
    LOOKUP,
    Acceptance,
    Budget,
    Source,
    StepCosts,
    draft_lengths,
)
from lfm2_fast.engine.logits import prepare
from lfm2_fast.engine.prompt_lookup import PromptLookup
from lfm2_fast.engine.request import Row
from lfm2_fast.engine.step_buffers import StepBuffers
from lfm2_fast.engine.verified_launch import Drafted, VerifiedLaunch
from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.models.stream_ring import StreamRing

# On a GPU: steps without a draft after which the host runs ahead, and how often it then looks.
IDLE, LOOK = 32, 16
# The kind of drafts that the assistant makes; those of lookups are above.
ASSISTED = 0


@dataclass
class _Drafting:
    """Row's lookup, the fate of its drafts, and the steps since the last of them."""

    lookup: PromptLookup
    acceptance: Acceptance
    idle: int = 0
    kind: int = 0


@dataclass
class _Found:
    """Draft that could be made: of a row, from a place of its text, or by the assistant."""

    number: int
    drafting: _Drafting
    place: int | None
    kind: int
    most: int


class Speculation:
    """Drafts tokens of rows that ask for it, and has steps verify them.

    The text stays what it is without. A step has only as many tokens as are independent of each
    other to the bit. A row's draft is limited to what the conv windows can remove again.
    ``prompt_lookup`` is that of rows that say none. ``assistant`` drafts where a lookup finds
    nothing. ``drafted`` and ``accepted`` count tokens.
    """

    def __init__(
        self,
        model: Lfm2,
        cache: Cache,
        buffers: StepBuffers,
        *,
        prompt_lookup: int = 0,
        assistant: Assistant | BlockDrafter | None = None,
    ) -> None:
        self._model, self._cache, self._buffers = model, cache, buffers
        self._prompt_lookup, self._assistant = prompt_lookup, assistant
        if assistant is not None and not assistant.size:
            self._assistant = None
        # Its context is kept up even where it drafts nothing.
        self._block = assistant if isinstance(assistant, BlockDrafter) else None
        self._size, self._ahead = model.verified_tokens, model.ops.captures
        self._most = cache.ring - cache.past - 1
        self._rows: WeakKeyDictionary[Row, _Drafting] = WeakKeyDictionary()
        self._acceptance, self._budget = Acceptance(), Budget()
        self.costs = StepCosts(warm=2 if model.ops.uses_graphs else 1)
        self.drafted = self.accepted = 0

    @property
    def late(self) -> StreamRing | None:
        """Ring that steps keep streams in for the model's drafter, if that makes drafts."""
        return None if self._block is None else self._block.ring

    def waits(self, rows: Sequence[Row]) -> bool:
        """Return True if the next step of ``rows`` may have drafts, so that all must be read."""
        return len(rows) < self._size and any(self._looks(row) for row in rows)

    def _most_looked_up(self, row: Row) -> int:
        asked = row.request.prompt_lookup
        return self._prompt_lookup if asked is None else asked

    def _looks(self, row: Row) -> bool:
        assisted = self._assistant is not None and row.request.assisted
        if not self._size or not self._most or not (assisted or self._most_looked_up(row)):
            return False
        drafting = self._rows.get(row)
        if drafting is None or not self._ahead:
            return True
        return drafting.idle < IDLE or drafting.idle % LOOK == 0

    def count_step(self, *, verified: bool) -> None:
        """Note that a step is launched, with drafts or without."""
        self._budget.count_step(verified=verified)
        for drafting in self._rows.values():
            drafting.idle += 1

    def launch(self, going: Sequence[tuple[Row, int]]) -> VerifiedLaunch | None:
        """Run a step of ``going``, rows and places, with drafts; None where none is worth it.

        All launches before must have been read.
        """
        if self._block is not None:
            self._block.follow(row for row, _ in going)
        room = self._size - len(going)
        if room < 1 or self._must_time_plain(len(going)):
            return None
        found = [each for each in map(self._find, range(len(going)), going) if each is not None]
        if not found or not self._verifies(going):
            return None
        plain = self.costs.of(len(going))
        chances = [each.drafting.acceptance.chance(each.kind, _source(each.kind)) for each in found]
        most, at_all, drafting = [each.most for each in found], 0.0, 0.0
        if self._assistant is not None and any(each.place is None for each in found):
            at_all, drafting = self._assistant.seconds(plain)
        loss = self._budget.left * plain
        counts = draft_lengths(self.costs, len(going), chances, most, room, drafting, at_all, loss)
        drafted = [Drafted(row, place, ()) for row, place in going]
        ends = {row.slot: row.length for row, _ in going}
        for each, count in zip(found, counts, strict=True):
            ends[drafted[each.number].row.slot] += count
        try:
            if any(counts):
                self._cache.make_room(ends)
        except CacheError:
            # A plain step may have its pages.
            counts = [0] * len(found)
        for each, count in zip(found, counts, strict=True):
            if not count:
                self._skip(each.drafting, each.kind)
        if not any(counts):
            return None
        took = at_all + drafting * max(counts)
        took += self._draft(
            [(each, n) for each, n in zip(found, counts, strict=True) if n], drafted
        )
        launch, seconds = self._run(drafted)
        launch.took = (took + seconds) / plain
        return launch

    def _must_time_plain(self, rows: int) -> bool:
        """Return True if a plain step is to be timed first. Where the host runs ahead, none is."""
        return not self._ahead and (self._budget.asks_for_plain or not self.costs.knows(rows))

    def _verifies(self, going: Sequence[tuple[Row, int]]) -> bool:
        """Return True if a step of ``going`` may have drafts beside the adapters of its rows."""
        # Beside adapters, a GPU's kernels keep no bits and take one token of a slot.
        slots = (row.slot for row, _ in going)
        return not self._ahead or self._buffers.adapted(self._model, slots) is None

    def _draft(self, found: Sequence[tuple[_Found, int]], drafted: Sequence[Drafted]) -> float:
        """Put the given number of tokens of each draft into the rows of ``drafted``.

        Returns the seconds that an assistant took to catch up with texts.
        """
        assisted = []
        for each, count in found:
            each.drafting.kind = each.kind
            if each.place is None:
                assisted.append((drafted[each.number], count))
            else:
                draft = each.drafting.lookup.draft(each.place, count)
                drafted[each.number].draft = draft
        if not assisted:
            return 0.0
        assert self._assistant is not None
        rows, counts = [each.row for each, _ in assisted], [count for _, count in assisted]
        try:
            drafts = self._assistant.draft(rows, counts)
        except CacheError:
            # Its cache finds no memory to grow. Rows need not suffer: they go on without it.
            self._assistant = None
            return 0.0
        for (own, _), draft in zip(assisted, drafts, strict=True):
            own.draft = draft
            if not draft:
                self._skip(self._rows[own.row], ASSISTED)
        return self._assistant.catching_up

    def _run(self, drafted: list[Drafted]) -> tuple[VerifiedLaunch, float]:
        """Run a step, and return what it took, without what else delayed it."""
        prepare(each.row for each in drafted)
        begin = time.perf_counter()
        launch = VerifiedLaunch(self._model, self._buffers, drafted, self.late)
        tokens = launch.run(self._cache, self._size)
        return launch, self.costs.add(tokens, time.perf_counter() - begin)

    def _skip(self, drafting: _Drafting, kind: int) -> None:
        """Note that a draft was not tried, for all steps until the next look."""
        drafting.acceptance.skip(kind, LOOK if self._ahead and drafting.idle >= IDLE else 1)

    def _find(self, number: int, going: tuple[Row, int]) -> _Found | None:
        """Return the draft that a row could have, if it asks for drafts and there is one."""
        row, _ = going
        if not self._looks(row):
            return None
        request = row.request
        drafting = self._rows.get(row)
        if drafting is None:
            lookup = PromptLookup(request.lookup_ngram)
            drafting = self._rows[row] = _Drafting(lookup, Acceptance(self._acceptance))
        # The last token that is wanted is chosen, and does not run.
        most = min(self._most, row.limit - len(row.written) - 1)
        if most < 1:
            return None
        asked = self._most_looked_up(row)
        if asked:
            drafting.lookup.follow(request.prompt, row.written)
            found = drafting.lookup.find()
            if found is not None:
                # Tokens that fit, by powers of two: the more, the likelier is the next.
                place, kind = found[0], found[1].bit_length()
                return _Found(number, drafting, place, kind, min(most, asked))
        if self._assistant is None or not request.assisted:
            return None
        if drafting.acceptance.rests(ASSISTED, ANOTHER_MODEL):
            # Most steps of a useless model come here, so no length is computed for them.
            self._skip(drafting, ASSISTED)
            return None
        most = min(most, self._assistant.max_length - row.length)
        return _Found(number, drafting, None, ASSISTED, most) if most > 0 else None

    def catch_up(self, row: Row, *, leaves: bool = False) -> None:
        """Complete a drafter's context in the full pages of a row, or in all of a caller's slot.

        ``leaves`` says that the row does not go on to decode here.
        """
        if self._block is not None:
            self._block.catch_up(row, leaves=leaves)

    def note(self, launch: VerifiedLaunch) -> None:
        """Learn from a step that was read."""
        written = sum(1 + each.accepted for each in launch.drafted)
        self._budget.note(launch.took, saved=written / len(launch.drafted))
        for each in launch.drafted:
            if each.draft:
                drafting = self._rows[each.row]
                # A row that ended has refused nothing.
                refused = not each.row.ended and each.accepted < len(each.draft)
                kind = drafting.kind
                drafting.acceptance.note(kind, each.accepted, int(refused), _source(kind))
                drafting.idle = 0
                self.drafted += len(each.draft)
                self.accepted += each.accepted


def _source(kind: int) -> Source:
    return ANOTHER_MODEL if kind == ASSISTED else LOOKUP
