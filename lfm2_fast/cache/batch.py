"""Batch: which tokens of which sequences run in this step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from lfm2_fast.cache.kv_cache import Cache


@dataclass(frozen=True)
class Batch:
    """The tokens of one forward pass, packed end to end without padding.

    Tokens after the last sequence touch nothing; a captured prompt has such, up to its fixed size.

    With T tokens of B sequences: ``positions [T]`` int64 is each token's place in its sequence,
    ``cu_seqlens [B + 1]`` int32 where each sequence starts in the packed axis, ``slots [B]`` int64
    its slot in the cache, ``lengths [B]`` int32 its context after this step. All four lie on the
    model's device. ``query_lengths``, ``starts`` (context before this step) and ``host_slots`` are
    the host's copies, so that no body has to wait for the device to learn them.
    """

    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor
    query_lengths: tuple[int, ...]
    starts: tuple[int, ...]
    host_slots: tuple[int, ...]

    @property
    def max_query(self) -> int:
        """The most tokens that any sequence runs in this step."""
        return max(self.query_lengths, default=0)

    @classmethod
    def prepare(
        cls,
        query_lengths: Sequence[int],
        slots: Sequence[int],
        cache: Cache,
        device: torch.device | str,
    ) -> Batch:
        """Continue each ``slots[i]`` of ``cache`` by ``query_lengths[i]`` tokens.

        Sequences that run no token are left out. Raises ValueError for a slot that the cache does
        not have or that is named twice, and for a negative length.
        """
        if len(query_lengths) != len(slots):
            raise ValueError(f"{len(query_lengths)} query lengths for {len(slots)} slots")
        if min(query_lengths, default=0) < 0:
            raise ValueError(f"query lengths must not be negative, got {list(query_lengths)}")
        if len(set(slots)) != len(slots):
            raise ValueError(f"a slot may stand in a batch once, got slots {list(slots)}")
        for slot in slots:
            if not 0 <= slot < cache.slots:
                raise ValueError(f"slot {slot} is not one of the cache's {cache.slots} slots")
        live = [(n, slot) for n, slot in zip(query_lengths, slots, strict=True) if n]
        counts = tuple(n for n, _ in live)
        host_slots = tuple(slot for _, slot in live)
        starts = tuple(cache.lengths[slot] for slot in host_slots)

        ends = [start + n for start, n in zip(starts, counts, strict=True)]
        positions = [p for start, end in zip(starts, ends, strict=True) for p in range(start, end)]
        bounds = [0]
        for n in counts:
            bounds.append(bounds[-1] + n)

        return cls(
            positions=on_device(positions, torch.int64, device),
            cu_seqlens=on_device(bounds, torch.int32, device),
            slots=on_device(host_slots, torch.int64, device),
            lengths=on_device(ends, torch.int32, device),
            query_lengths=counts,
            starts=starts,
            host_slots=host_slots,
        )

    @property
    def last_rows(self) -> torch.Tensor:
        """``[B]``: the packed index of every sequence's last token."""
        return self.cu_seqlens[1:].long() - 1


def on_device(
    values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """``values`` on the device, for which the host does not wait."""
    return torch.tensor(list(values), dtype=dtype).to(device, non_blocking=True)


@contextmanager
def host_by_default() -> Iterator[None]:
    """Let tensors lie on the host unless a device is named, whatever ``set_default_device`` says.

    torch does this with a mode that every operation goes through, so only where it is needed.
    """
    host = torch.get_default_device().type == "cpu"
    with nullcontext() if host else torch.device("cpu"):
        yield
