"""Batches and tables for tests of operations, and changes to whole caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

import lfm2_fast
from lfm2_fast.cache.batch import Batch
from lfm2_fast.cache.kv_cache import Cache, ConvWindow, KVPages
from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.model_runner import run_batch
from lfm2_fast.engine.request import Event, Request


def batch_of(
    lengths: Sequence[int], counts: Sequence[int], slots: Sequence[int], device: torch.device | str
) -> Batch:
    """Continue each of ``slots``, which hold ``lengths`` tokens, by ``counts`` tokens."""
    return Batch.prepare(counts, [lengths[slot] for slot in slots], slots, device)


def logits_of(
    model: lfm2_fast.Lfm2ForCausalLM, steps: Sequence[Mapping[int, int]]
) -> list[torch.Tensor]:
    """Run steps of random tokens, whose counts are given by slot. Return each step's logits."""
    cache = model.new_cache(4)
    generator = torch.Generator().manual_seed(1)
    found = []
    for step in steps:
        batch = cache.next_batch(list(step.values()), list(step), model.device)
        tokens = torch.randint(8, 307, (sum(step.values()),), generator=generator)
        found.append(run_batch(model.network, tokens.to(model.device), batch, cache))
    return found


def text(count: int, seed: int = 1) -> list[int]:
    """Return random token ids of the small checkpoint's vocabulary."""
    return torch.randint(8, 900, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def events_by_request(engine: Engine, requests: Sequence[Request]) -> list[list[Event]]:
    """Run requests together until all have ended. Return the events of each."""
    ids = [engine.add(request) for request in requests]
    events: dict[int, list[Event]] = {id: [] for id in ids}
    while engine.busy:
        for event in engine.step():
            events[event.id].append(event)
    return [events[id] for id in ids]


def whole_pages(pages: torch.Tensor) -> torch.Tensor:
    """Return the table of ``pages [slots, ...]`` that hold a whole sequence each."""
    return torch.arange(len(pages), dtype=torch.int32, device=pages.device)[:, None]


def fill(cache: Cache, change: Callable[[torch.Tensor], object]) -> None:
    """Change every conv window and every page that has memory, in place."""
    count = cache.pool.memory.count
    for layer in cache.layers:
        if isinstance(layer, ConvWindow):
            change(layer.rows)
        else:
            change(layer.k[:count])
            change(layer.v[:count])


def with_nan(values: torch.Tensor) -> torch.Tensor:
    """Fill a tensor with NaN."""
    return values.fill_(float("nan"))


def sequence_of(cache: Cache, layer: KVPages, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values that a slot holds, ``[kv_heads, length, D]`` each."""
    pages = torch.tensor(cache.pages(slot), dtype=torch.int64, device=layer.k.device)
    length = cache.lengths[slot]
    k, v = (each[pages].transpose(0, 1).flatten(1, 2)[:, :length] for each in (layer.k, layer.v))
    return k, v
