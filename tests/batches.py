"""Batches for tests of operations, where no cache is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lfm2_fast.cache.batch import Batch


def batch_of(
    lengths: Sequence[int], counts: Sequence[int], slots: Sequence[int], device: torch.device | str
) -> Batch:
    """Continue each of ``slots``, which hold ``lengths`` tokens, by so many of ``counts``."""
    return Batch.prepare(counts, [lengths[slot] for slot in slots], slots, device)
