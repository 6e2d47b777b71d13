"""Assistant: a smaller model that drafts the next tokens of rows, on a cache of its own."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch

from lfm2_fast.cache.batch import on_device
from lfm2_fast.cache.prefix_index import common_prefix
from lfm2_fast.engine.block_drafter import drawn_ahead
from lfm2_fast.engine.draft_length import median
from lfm2_fast.engine.model_runner import MOST_DRAFTED, ModelRunner, new_cache
from lfm2_fast.engine.request import Row
from lfm2_fast.engine.step_buffers import bucket
from lfm2_fast.models.lfm2 import Lfm2

# Share of a step that a drafted token costs, as long as none was measured.
COST = 0.15


class Assistant:
    """Runs ``model`` along the texts of rows, in the slots that they have in the engine's cache.

    Rows that draw draft by their own seeds and places, so that two like models draw alike.
    ``catching_up`` are the seconds that the last drafts took beside, for texts that had gone on
    without it since earlier drafts. Raises ValueError for a model of another vocabulary than
    ``target``'s, or on another device.
    """

    def __init__(self, model: Lfm2, target: Lfm2, slots: int, max_length: int) -> None:
        ours, theirs = model.config.vocab_size, target.config.vocab_size
        if ours != theirs:
            raise ValueError(
                f"the assistant has a vocabulary of {ours} tokens and the model one of {theirs}: "
                "give an assistant with the same tokenizer"
            )
        if model.device != target.device:
            raise ValueError(
                f"the assistant is on {model.device} and the model on {target.device}: move it "
                "with assistant.to(model.device)"
            )
        self.model = model
        self.size = model.verified_tokens
        self.max_length = min(max_length, model.config.context_length)
        spare = MOST_DRAFTED + 2
        self._cache = new_cache(model, slots, self.max_length, spare=spare, drafter=False)
        self._runner = ModelRunner(model, self._cache)
        # The row that a slot follows, and how many of its tokens are known to be its text's.
        self._follows: dict[int, tuple[Row, int]] = {}
        self._times: deque[float] = deque(maxlen=5)
        self.catching_up = 0.0
        self._warm = 2 if model.ops.uses_graphs else 0

    def seconds(self, step: float) -> tuple[float, float]:
        """Return what drafts take at all, and one more token of all rows.

        ``step`` are the seconds of a step without drafts.
        """
        return 0.0, median(self._times) if self._times else COST * step

    def draft(self, rows: Sequence[Row], counts: Sequence[int]) -> list[list[int]]:
        """Return ``counts[i]`` tokens that are likely to follow the text of each row."""
        missing = self._catch_up(rows)
        begin = time.perf_counter()
        drafts: list[list[int]] = [[] for _ in rows]
        for depth in range(max(counts)):
            going = [i for i, count in enumerate(counts) if count > depth]
            runs = [missing[i] if depth == 0 else drafts[i][-1:] for i in going]
            chosen = self._step([rows[i] for i in going], runs, depth)
            for i, token in zip(going, chosen, strict=True):
                drafts[i].append(token)
        if self._warm:
            self._warm -= 1
        else:
            self._times.append((time.perf_counter() - begin) / max(counts))
        return drafts

    def _catch_up(self, rows: Sequence[Row]) -> list[list[int]]:
        """Run the new tokens of texts, except the last few, which are returned."""
        cache, missing = self._cache, []
        # A step writes all conv rows of a slot before it reads them.
        room, fit = self.size, cache.ring - cache.past
        self.catching_up = 0.0
        for left, row in zip(range(len(rows) - 1, -1, -1), rows, strict=True):
            text, slot = row.text, row.slot
            held = cache.history[slot]
            follows, known = self._follows.get(slot, (None, 0))
            if follows is not row:
                known = common_prefix(text[:-1], held)
            while known < min(len(held), len(text) - 1) and held[known] == text[known]:
                known += 1
            cache.go_back(slot, known)
            if cache.replay(slot):
                cache.truncate(slot, 0)
            rest = list(text[cache.lengths[slot] :])
            if len(rest) > min(max(room - left, 1), fit):
                begin = time.perf_counter()
                self._runner.prefill([rest[:-1]], [slot])
                if follows is row:
                    self.catching_up += time.perf_counter() - begin
                rest = rest[-1:]
            room -= len(rest)
            self._follows[slot] = (row, len(text) - 1)
            missing.append(rest)
        return missing

    def _step(self, rows: Sequence[Row], runs: Sequence[list[int]], depth: int) -> list[int]:
        """Run tokens of each row in one step, and return the next token of each."""
        model, cache = self.model, self._cache
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        lengths = [cache.lengths[row.slot] for row in rows]
        cache.make_room(
            {row.slot: at + len(run) for row, at, run in zip(rows, lengths, runs, strict=True)}
        )
        for row, at, run in zip(rows, lengths, runs, strict=True):
            tokens += run
            slots += [row.slot] * len(run)
            positions += range(at, at + len(run))
            last.append(len(tokens) - 1)
            cache.overwrite(row.slot, at + len(run))
        own = self._runner.buffers.of_drafts(model, cache, self.size)
        own.load_rows(tokens, slots, positions, cache)
        draws = any(row.request.sampling.do_sample for row in rows)
        size = bucket(len(tokens), cache)
        hooked = self._runner.hooked
        own.run_steps(
            model,
            cache,
            size,
            choose=not draws,
            hooked=hooked,
            verified=True,
            adapted=own.adapted(model, slots),
        )
        for row, run in zip(rows, runs, strict=True):
            for token in run:
                cache.commit_token(row.slot, token)
        if not draws:
            chosen = own.written[-1, : len(tokens)].tolist()
            return [max(chosen[at], 0) for at in last]
        assert own.logits is not None
        logits = own.logits[on_device(last, torch.int64, model.device)]
        state = drawn_ahead(rows, depth, model.device)
        return model.ops.sample(logits, state).clamp(min=0).tolist()
