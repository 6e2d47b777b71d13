"""Batches and tables for tests of operations, and what tests do to whole caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lfm2_fast.cache.batch import Batch
from lfm2_fast.cache.kv_cache import Cache, ConvWindow, KVPages


def batch_of(
    lengths: Sequence[int], counts: Sequence[int], slots: Sequence[int], device: torch.device | str
) -> Batch:
    """Continue each of ``slots``, which hold ``lengths`` tokens, by so many of ``counts``."""
    return Batch.prepare(counts, [lengths[slot] for slot in slots], slots, device)


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
