"""BlockDrafter: drafts of a model's DSpark drafter, whose context is in the engine's cache."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from lfm2_fast.cache.batch import on_device
from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.cache.page_memory import PAGE_SIZE
from lfm2_fast.cache.page_pool import CacheError
from lfm2_fast.engine.draft_length import median
from lfm2_fast.engine.model_runner import RING
from lfm2_fast.engine.request import Row
from lfm2_fast.models.dspark import DSpark
from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.models.stream_ring import StreamRing
from lfm2_fast.ops.sampling import SamplingState

# Share of a step that a block costs, as long as none was measured.
COST = 0.4


class BlockDrafter:
    """Drafts with ``model.drafter`` for rows of ``cache``, which must have its layers.

    Rows that draw draft by their own seeds and places.

    Steps keep the streams of their tokens in ``ring``. The drafter reads those of many tokens
    together: when a page is full, and before it drafts. That costs far less than in each step.
    """

    # Prompts and earlier steps are read by the drafter as they run.
    catching_up = 0.0

    def __init__(self, model: Lfm2, cache: Cache) -> None:
        assert isinstance(model.drafter, DSpark)
        self._model, self._cache, self._drafter = model, cache, model.drafter
        self.size, self.max_length = model.verified_tokens, cache.max_length
        like = model.embedding_norm.weight
        self.ring = StreamRing(self._drafter, cache.slots, RING, like)
        # Tokens of each row that the drafter has read.
        self._read: WeakKeyDictionary[Row, int] = WeakKeyDictionary()
        self._times: deque[float] = deque(maxlen=5)

    def seconds(self, step: float) -> tuple[float, float]:
        """Return the seconds of a block, and of one more token in it, if a step takes ``step``."""
        return median(self._times) if self._times else COST * step, 0.0

    def follow(self, rows: Iterable[Row]) -> None:
        """Note rows that go on to decode. What is new among them has been read so far."""
        for row in rows:
            self._read.setdefault(row, self._cache.lengths[row.slot])

    def catch_up(self, row: Row, *, leaves: bool) -> None:
        """Read the full pages of a row, or all tokens of one in a caller's slot.

        ``leaves`` forgets the row.
        """
        if row not in self._read:
            return
        end = self._cache.lengths[row.slot]
        self._read_up_to([row], [end if row.pinned is not None else end - end % PAGE_SIZE])
        if leaves:
            del self._read[row]

    def _read_up_to(self, rows: Sequence[Row], ends: Sequence[int]) -> None:
        """Read the tokens of rows before ``ends``, all together."""
        slots: list[int] = []
        positions: list[int] = []
        for row, end in zip(rows, ends, strict=True):
            first, self._read[row] = self._read[row], max(self._read[row], end)
            slots += [row.slot] * max(end - first, 0)
            positions += range(first, end)
        if slots:
            streams = self.ring.read(slots, positions)
            self._drafter.remember_late(self._model, self._cache, streams, slots, positions)

    def draft(self, rows: Sequence[Row], counts: Sequence[int]) -> list[list[int]]:
        """Return up to ``counts[i]`` tokens that are likely to follow the text of each row.

        There are fewer where the block ends, and none where its pages are missing, or the model
        has another drafter by now.
        """
        begin = time.perf_counter()
        cache, drafter, model = self._cache, self._drafter, self._model
        if model.drafter is not drafter:
            return [[] for _ in rows]
        # The last token of a text is known, but has not run.
        known = [row.length - 1 for row in rows]
        size = min(drafter.config.block_size, *(cache.max_length - at for at in known))
        try:
            cache.make_room({row.slot: at + size for row, at in zip(rows, known, strict=True)})
        except CacheError:
            return [[] for _ in rows]
        self._read_up_to(rows, known)
        last = [row.written[-1] for row in rows]
        block = drafter.run_block(model, cache, last, [row.slot for row in rows], known, size)
        ops = model.ops.settling
        before = on_device(last, torch.int64, model.device)
        drafts: list[list[int]] = [[] for _ in rows]
        for depth in range(min(size, max(counts))):
            logits = drafter.add_markov(block[:, depth], before, ops)
            before = self._choose(rows, logits, depth)
            for draft, token, count in zip(drafts, before.tolist(), counts, strict=True):
                if depth < count:
                    draft.append(token)
        self._times.append(time.perf_counter() - begin)
        return drafts

    def _choose(self, rows: Sequence[Row], logits: torch.Tensor, depth: int) -> torch.Tensor:
        device = logits.device
        if not any(row.request.sampling.do_sample for row in rows):
            return logits.argmax(-1)
        return self._model.ops.sample(logits, drawn_ahead(rows, depth, device)).clamp(min=0)


def drawn_ahead(rows: Sequence[Row], depth: int, device: torch.device) -> SamplingState:
    """Return how rows choose the token ``depth`` places behind their next one."""
    return SamplingState(
        [replace(row.request.sampling, repetition_penalty=1.0) for row in rows],
        device=device,
        seed=[row.request.seed for row in rows],
        rows=on_device([row.request.first_row + row.index for row in rows], torch.int64, device),
        positions=on_device([row.length + depth for row in rows], torch.int64, device),
    )
