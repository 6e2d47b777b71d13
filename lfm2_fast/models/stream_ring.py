"""StreamRing: streams of the newest tokens of each slot, until a drafter reads them together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lfm2_fast.cache.batch import Batch
from lfm2_fast.ops.base import Ops


class StreamRing:
    """Ring of the streams of the last ``size`` positions of each slot, ``[slots, size, N]``.

    A token's ``N`` numbers are its streams after all layers that ``drafter`` reads.
    """

    def __init__(self, drafter: Any, slots: int, size: int, like: torch.Tensor) -> None:
        self.drafter, self.size = drafter, size
        self.rows = like.new_zeros(slots, size, width(drafter))

    def keep(self, streams: Sequence[torch.Tensor], batch: Batch, ops: Ops) -> None:
        """Store the streams ``[T, H]`` of a step whose sequences have one token each."""
        ops.keep_streams(streams, batch.slots, batch.positions, self.rows)

    def read(self, slots: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Return the streams ``[T, N]`` of tokens, each one of the newest of its slot."""
        places = [position % self.size for position in positions]
        return self.rows[list(slots), places]


def width(drafter: Any) -> int:
    """Return how many numbers of a token's streams a drafter reads."""
    config = drafter.config
    return len(config.target_layers) * config.blocks.hidden_size
