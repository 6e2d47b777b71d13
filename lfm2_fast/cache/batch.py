"""Batch: the tokens that run in one step, and which sequences they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class HostBatch:
    """Numbers of a batch on the host, one of each for every sequence.

    ``slots`` names a sequence's slot in the cache, ``starts`` its context before this step,
    ``query_lengths`` counts its tokens in this step.
    """

    slots: tuple[int, ...]
    starts: tuple[int, ...]
    query_lengths: tuple[int, ...]

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Yield slot, start and query length of each sequence."""
        return zip(self.slots, self.starts, self.query_lengths, strict=True)


@dataclass(frozen=True)
class Batch:
    """Tokens of one forward pass, packed end to end without padding.

    With T tokens of B sequences: ``positions [T]`` int64 is each token's place in its sequence,
    ``cu_seqlens [B + 1]`` int32 where each sequence starts in the packed axis, ``slots [B]`` int64
    its slot in the cache, ``lengths [B]`` int32 its context after this step. All four lie on the
    model's device. ``max_query`` is the most tokens that any sequence runs in this step.

    ``final_lengths [B]`` int32, on the device, are the contexts at the end of the call that this
    step is a part of; None means ``lengths``. RoPE scaling that goes by the length takes these, so
    that a prompt in chunks has the frequencies of its whole length in each of them.

    ``host`` has the same numbers on the host, for implementations that need them there. It is None
    for captured work, whose numbers are known on the device alone. Tokens after the last sequence
    are padding and touch nothing; a captured prompt has them, up to its fixed size.
    """

    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor
    max_query: int
    host: HostBatch | None = None
    final_lengths: torch.Tensor | None = None

    @classmethod
    def prepare(
        cls,
        query_lengths: Sequence[int],
        starts: Sequence[int],
        slots: Sequence[int],
        device: torch.device | str,
        final_lengths: Sequence[int] | None = None,
    ) -> Batch:
        """Continue the sequence in ``slots[i]`` from ``starts[i]`` by ``query_lengths[i]`` tokens.

        ``final_lengths[i]`` is its context at the end of the call (default: after this step).
        Sequences that run no token are left out. Raises ValueError for a slot that is named twice,
        a negative length, and final lengths that this step passes.
        """
        if not len(query_lengths) == len(slots) == len(starts):
            raise ValueError(f"{len(query_lengths)} query lengths for {len(slots)} slots")
        if min(query_lengths, default=0) < 0:
            raise ValueError(f"query lengths must not be negative, got {list(query_lengths)}")
        if len(set(slots)) != len(slots):
            raise ValueError(f"a slot may stand in a batch once, got slots {list(slots)}")
        every = zip(query_lengths, starts, slots, strict=True)
        live = [(n, start, slot) for n, start, slot in every if n]
        ends = [start + n for n, start, _ in live]
        finals = ends
        if final_lengths is not None:
            pairs = zip(query_lengths, final_lengths, strict=True)
            finals = [final for n, final in pairs if n]
            if any(final < end for final, end in zip(finals, ends, strict=True)):
                raise ValueError(f"this step ends at {ends}, beyond the final lengths {finals}")
        host = HostBatch(
            query_lengths=tuple(n for n, _, _ in live),
            starts=tuple(start for _, start, _ in live),
            slots=tuple(slot for _, _, slot in live),
        )
        bounds = [0]
        for n in host.query_lengths:
            bounds.append(bounds[-1] + n)
        positions = [p for _, start, n in host for p in range(start, start + n)]
        return cls(
            positions=on_device(positions, torch.int64, device),
            cu_seqlens=on_device(bounds, torch.int32, device),
            slots=on_device(host.slots, torch.int64, device),
            lengths=on_device(ends, torch.int32, device),
            max_query=max(host.query_lengths, default=0),
            host=host,
            final_lengths=None if finals == ends else on_device(finals, torch.int32, device),
        )

    @property
    def required_host(self) -> HostBatch:
        """``host``. Raises RuntimeError where the numbers are on the device alone."""
        if self.host is None:
            raise RuntimeError(
                "this batch has its numbers on the device alone, but the implementation needs them "
                "on the host: it cannot run captured work"
            )
        return self.host

    @property
    def last_rows(self) -> torch.Tensor:
        """``[B]``: the packed index of every sequence's last token."""
        return self.cu_seqlens[1:].long() - 1


class DecodeInputs(NamedTuple):
    """Inputs of a decode step, a row for each of B sequences, on the device.

    ``tokens, slots, positions [B]`` int64, ``lengths [B]`` int32, which is the position plus one,
    and ``finished [B]`` bool. A finished row runs on without effect.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    finished: torch.Tensor

    def first(self, count: int) -> DecodeInputs:
        """Return the first ``count`` rows, sharing their memory."""
        return DecodeInputs(*(each[:count] for each in self))


def on_device(
    values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """Return ``values`` on the device, without waiting for the device."""
    return torch.tensor(list(values), dtype=dtype).to(device, non_blocking=True)


@contextmanager
def host_by_default() -> Iterator[None]:
    """Make new tensors on the host unless a device is named, despite ``set_default_device``.

    torch does this with a mode that every operation goes through, so only where it is needed.
    """
    host = torch.get_default_device().type == "cpu"
    with nullcontext() if host else torch.device("cpu"):
        yield
