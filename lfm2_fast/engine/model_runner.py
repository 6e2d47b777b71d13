"""ModelRunner: runs sequences of a cache, a prompt at once and then token by token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from lfm2_fast.cache.batch import Batch, together_on_device
from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.cache.page_memory import PAGE_SIZE
from lfm2_fast.engine.captured_prompt import CapturedPrompt
from lfm2_fast.engine.step_buffers import StepBuffers, bucket
from lfm2_fast.models.lfm2 import Lfm2

# Tokens per forward pass of a prefill. They are enough for fast matrix products. The intermediate
# values of the feed-forward are still small beside the weights.
CHUNK = 2048
# Most tokens that are drafted for a row: a longer step would cost more than it gains.
MOST_DRAFTED = 7
# Tokens whose streams are kept for a drafter: those of an unfinished page, and of one step more.
RING = PAGE_SIZE + MOST_DRAFTED + 1


def new_cache(
    model: Lfm2,
    slots: int,
    max_length: int,
    *,
    spare: int = MOST_DRAFTED + 1,
    pages: int | None = None,
    drafter: bool = True,
) -> Cache:
    """Return an empty cache for ``slots`` sequences of at most ``max_length`` tokens each.

    ``spare`` and ``pages`` are those of ``Cache``; drafts of ``spare - 1`` tokens fit. Without
    ``drafter`` the model's drafter, if there is one, neither drafts on it nor reads what runs.

    If steps are captured, it has two additions. Several sequences that run together get a dummy
    slot. Each slot has one more conv row, for the step that is running when a text ends.
    """
    captures = model.ops.captures
    return Cache(
        model.config,
        slots,
        max_length,
        device=model.device,
        dtype=model.dtype,
        spare=spare + captures,
        dummy_slot=captures and slots > 1,
        in_place=captures,
        pages=pages,
        draft_layers=model.draft_layers if drafter else 0,
    )


def run_batch(
    model: Lfm2,
    tokens: torch.Tensor,
    batch: Batch,
    cache: Cache,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run packed ``tokens [T]`` int64 and count them in the cache; return logits ``[R, V]``.

    ``rows [R]`` are packed indices; None means all T. Without any the head does not run. Token ids
    are not checked. Raises CacheError if the tokens do not fit into the cache, which is then
    unchanged.
    """
    cache.reserve(batch)
    if rows is not None and not len(rows):
        model.run_blocks(tokens, batch, cache, rows=rows)
        shape = (0, model.config.vocab_size)
        logits = torch.empty(shape, dtype=model.dtype, device=model.device)
    else:
        logits = model(tokens, batch, cache, rows)
    cache.commit_batch(batch)
    return logits


class ModelRunner:
    """``prefill``, then ``step`` until done, over the slots of one cache.

    Each slot has its own sequence, of any length. The cache's ``history`` lists the tokens that
    were run, so that a later call can tell which prefix a slot holds. The texts have the model's
    active adapter, unless ``buffers.set_adapter`` sets another. ``buffers`` are those of steps
    on the cache; new ones are made if none are given. If layers have hooks, nothing is captured.
    Hooks are looked for once, here. Raises HookError for a hook that would never be called.
    """

    def __init__(self, model: Lfm2, cache: Cache, buffers: StepBuffers | None = None) -> None:
        model.check_hooks()
        self.model = model
        self.cache = cache
        self.buffers = StepBuffers(model, cache) if buffers is None else buffers
        self.hooked = model.has_hooked_layers
        active = model.adapters.active
        for slot in range(cache.slots):
            self.buffers.set_adapter(slot, 0 if active is None else active.entry)

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> torch.Tensor:
        """Run each prompt, of at least one token, in its slot; logits ``[B, V]`` of the last ones.

        Long prompts run in chunks. If the conv windows of a slot are gone, it replays its last
        tokens.
        """
        logits: dict[int, torch.Tensor] = {}
        replays = [self.cache.replay(slot) for slot in slots]
        texts = [again + list(new) for again, new in zip(replays, prompts, strict=True)]
        ends = [self.cache.lengths[s] + len(p) for s, p in zip(slots, prompts, strict=True)]
        done = [0] * len(texts)
        while len(logits) < len(texts):
            room, counts = CHUNK, []
            for text, ran, again in zip(texts, done, replays, strict=True):
                # Replayed tokens run together with the first new token.
                most = min(room, len(text) - ran)
                counts.append(most if ran or most > len(again) else 0)
                room -= counts[-1]
            rows = [row for row, n in enumerate(counts) if n]
            chunks = [texts[row][done[row] : done[row] + counts[row]] for row in rows]
            last = self.run_chunks(
                chunks,
                [slots[row] for row in rows],
                [0 if done[row] else len(replays[row]) for row in rows],
                [ends[row] for row in rows],
            )
            for row in rows:
                done[row] += counts[row]
            ended = [row for row in rows if done[row] == len(texts[row])]
            logits |= zip(ended, last, strict=True)
        return torch.stack([logits[row] for row in range(len(texts))])

    def step(self, tokens: Sequence[int], slots: Sequence[int]) -> torch.Tensor:
        """Run one more token in each slot, captured if possible. Return logits ``[B, V]``."""
        model, cache, count = self.model, self.cache, len(tokens)
        uncaptured = self.hooked or not model.ops.uses_graphs
        if uncaptured or any(cache.replay(slot) for slot in slots):
            return self.prefill([[token] for token in tokens], slots)
        batch = cache.next_batch([1] * count, slots, "cpu")
        cache.reserve(batch)
        buffers = self.buffers
        buffers.load_rows(tokens, slots, batch.required_host.starts, cache)
        adapted = buffers.adapted(model, slots)
        buffers.run_steps(model, cache, bucket(count, cache), choose=False, adapted=adapted)
        cache.commit_batch(batch)
        cache.record_tokens(batch, [[token] for token in tokens])
        assert buffers.logits is not None
        return buffers.logits[:count].clone()

    def run_chunks(
        self,
        chunks: Sequence[Sequence[int]],
        slots: Sequence[int],
        replays: Sequence[int],
        ends: Sequence[int],
        *,
        every: bool = False,
    ) -> torch.Tensor:
        """Run chunks of texts that end at ``ends``; return logits ``[E, V]`` of the ended texts.

        They belong to the last token of each text, in the order of the chunks. A chunk that does
        not reach the end of its text has none. The first ``replays[i]`` tokens of a chunk run
        again. ``every`` asks for the logits of every token instead. Raises CacheError, with nothing
        changed, if the cache has too few pages.
        """
        model, cache = self.model, self.cache
        counts, total = [len(chunk) for chunk in chunks], sum(map(len, chunks))
        # A captured prompt has the frequencies of its own length, and gives only the last logits.
        held = [cache.lengths[slot] - again for slot, again in zip(slots, replays, strict=True)]
        own = [start + n for start, n in zip(held, counts, strict=True)]
        ended = [i for i, (at, end) in enumerate(zip(own, ends, strict=True)) if at == end]
        free = bool(ended) or not model.config.rope_follows_length
        alone = len(chunks) == 1 and free and not every and not self.hooked
        prompt = CapturedPrompt.of(model, self.buffers, total) if alone else None
        device = model.device if prompt is None else "cpu"
        batch = cache.next_batch(counts, slots, device, ends, replays=replays)
        batch = self.buffers.with_adapters(model, batch)
        if prompt is None:
            lasts = [place - 1 for place in accumulate(counts)]
            packed, rows = together_on_device(
                model.device,
                ([token for chunk in chunks for token in chunk], torch.int64),
                ([lasts[i] for i in ended], torch.int64),
            )
            whole = every or (batch.max_query == 1 and len(ended) == len(chunks))
            logits = run_batch(model, packed, batch, cache, None if whole else rows)
        else:
            cache.reserve(batch)
            start = batch.required_host.starts[0]
            write_from = start + replays[0]
            prompt.prefill(model, cache, self.buffers, chunks[0], slots[0], start, write_from)
            cache.commit_batch(batch)
            logits = prompt.logits[: len(ended)].clone()
        cache.record_tokens(batch, chunks)
        return logits
