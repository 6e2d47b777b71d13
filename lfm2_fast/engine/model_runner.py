"""ModelRunner: runs sequences of a cache, a prompt at once and then token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lfm2_fast.cache.batch import Batch, on_device
from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.engine.captured_prompt import CapturedPrompt
from lfm2_fast.engine.step_buffers import StepBuffers, bucket
from lfm2_fast.models.lfm2 import Lfm2

# Tokens per forward pass of a prefill: enough to keep the matrices busy, few enough that the
# feed-forward's intermediate values stay small beside the weights.
CHUNK = 2048


def run_batch(
    model: Lfm2,
    tokens: torch.Tensor,
    batch: Batch,
    cache: Cache,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run packed ``tokens [T]`` int64 and count them in the cache; return logits ``[R, V]``.

    ``rows [R]`` are packed indices, None means all T. Token ids are not checked. Raises CacheError
    when the cache cannot take the tokens; it is unchanged then.
    """
    cache.reserve(batch)
    logits = model(tokens, batch, cache, rows)
    cache.commit_batch(batch)
    return logits


class ModelRunner:
    """``prefill``, then ``step`` until done, over the slots of one cache.

    Every slot can be at another place in another sequence. The cache's ``history`` follows what
    was run, so that a later call can tell which prefix it holds. Where layers have hooks, nothing
    is captured. Hooks are looked for once, here: HookError is raised for one that would never be
    called.
    """

    def __init__(self, model: Lfm2, cache: Cache) -> None:
        model.check_hooks()
        self.model = model
        self.cache = cache
        self.hooked = model.has_hooked_layers

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> torch.Tensor:
        """Run each prompt, of at least one token, in its slot; logits ``[B, V]`` of the last ones.

        Long prompts run in chunks. Each slot is marked at the prompt's end, so that its cache can
        come back there (``Cache.resume``).
        """
        logits: dict[int, torch.Tensor] = {}
        done = [0] * len(prompts)
        ends = [self.cache.lengths[s] + len(p) for s, p in zip(slots, prompts, strict=True)]
        while len(logits) < len(prompts):
            room, counts = CHUNK, []
            for prompt, ran in zip(prompts, done, strict=True):
                counts.append(min(room, len(prompt) - ran))
                room -= counts[-1]
            rows = [row for row, n in enumerate(counts) if n]
            chunks = [prompts[row][done[row] : done[row] + counts[row]] for row in rows]
            last = self._run(chunks, [slots[row] for row in rows], [ends[row] for row in rows])
            for row, row_logits in zip(rows, last, strict=True):
                done[row] += counts[row]
                if done[row] == len(prompts[row]):
                    logits[row] = row_logits
        for slot in slots:
            self.cache.mark(slot)
        return torch.stack([logits[row] for row in range(len(prompts))])

    def step(self, tokens: Sequence[int], slots: Sequence[int]) -> torch.Tensor:
        """Run one more token in each slot; logits ``[B, V]``. Captured, where that can be."""
        if self.hooked or not self.model.ops.uses_graphs:
            return self._run([[token] for token in tokens], slots)
        model, cache, count = self.model, self.cache, len(tokens)
        batch = cache.next_batch([1] * count, slots, model.device)
        cache.reserve(batch)
        buffers = StepBuffers.of(model, cache)
        buffers.load_inputs(tokens, batch, cache)
        buffers.run_steps(model, cache, bucket(count, cache), choose=False)
        cache.commit_batch(batch)
        cache.record_tokens(batch, [[token] for token in tokens])
        assert buffers.logits is not None
        return buffers.logits[:count].clone()

    def _run(
        self,
        chunks: Sequence[Sequence[int]],
        slots: Sequence[int],
        ends: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Run the chunks of prompts that end at ``ends``; the logits of each one's last token."""
        model, cache = self.model, self.cache
        counts, total = [len(chunk) for chunk in chunks], sum(map(len, chunks))
        # A captured prompt knows no end but its own.
        alone = len(chunks) == 1 and ends in (None, [cache.lengths[slots[0]] + total])
        captured = alone and not self.hooked
        prompt = CapturedPrompt.of(model, cache, total) if captured else None
        batch = cache.next_batch(counts, slots, model.device if prompt is None else "cpu", ends)
        if prompt is None:
            packed = on_device(
                [token for chunk in chunks for token in chunk], torch.int64, model.device
            )
            rows = None if batch.max_query == 1 else batch.last_rows
            logits = run_batch(model, packed, batch, cache, rows)
        else:
            cache.reserve(batch)
            prompt.prefill(model, cache, chunks[0], slots[0], batch.required_host.starts[0])
            cache.commit_batch(batch)
            logits = prompt.logits.clone()
        cache.record_tokens(batch, chunks)
        return logits
