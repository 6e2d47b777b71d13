"""Batch: the tokens that run in one step, and which sequences they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

# Values on the host, and their dtype on the device.
Field = tuple[Sequence[int] | Sequence[float], torch.dtype]


@dataclass(frozen=True)
class HostBatch:
    """Numbers of a batch on the host, one for each sequence.

    ``slots`` is a sequence's slot in the cache, ``starts`` the position of its first token in this
    step, ``query_lengths`` its number of tokens in this step. ``write_from`` is as in ``Batch``.
    """

    slots: tuple[int, ...]
    starts: tuple[int, ...]
    query_lengths: tuple[int, ...]
    write_from: tuple[int, ...] | None = None

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Yield slot, start and query length of each sequence."""
        return zip(self.slots, self.starts, self.query_lengths, strict=True)


@dataclass(frozen=True)
class Batch:
    """Tokens of one forward pass, packed end to end without padding.

    With T tokens of B sequences: ``positions [T]`` int64 is each token's place in its sequence.
    ``cu_seqlens [B + 1]`` int32 is the start of each sequence in the packed axis. ``slots [B]``
    int64 is its slot in the cache, ``lengths [B]`` int32 its context after this step. All four are
    on the model's device. ``max_query`` is the largest number of tokens of one sequence in this
    step. ``write_from [B]`` int32 is the first position whose key and value are written. Tokens
    before it run again, and their keys and values exist already. None means that all are written.

    ``final_lengths [B]`` int32, on the device, are the contexts at the end of the whole call; None
    means ``lengths``. RoPE scaling that depends on the length uses them. So every chunk of a prompt
    has the frequencies of the whole prompt.

    ``adapters [B]`` int64, on the device, are the sequences' entries in the stacks of adapters, 0
    for none. None means that all have the model's active one. ``whole`` are the entries with whole
    matrices that sequences may have, as the host knows them; None means any.

    ``host`` has the same numbers on the host, for implementations that need them there. It is None
    for captured work, which has its numbers only on the device. Tokens after the last sequence are
    padding and change nothing. A captured prompt is padded to its fixed size.
    """

    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor
    max_query: int
    host: HostBatch | None = None
    final_lengths: torch.Tensor | None = None
    write_from: torch.Tensor | None = None
    adapters: torch.Tensor | None = None
    whole: frozenset[int] | None = None

    @classmethod
    def prepare(
        cls,
        query_lengths: Sequence[int],
        starts: Sequence[int],
        slots: Sequence[int],
        device: torch.device | str,
        final_lengths: Sequence[int] | None = None,
        *,
        write_from: Sequence[int] | None = None,
    ) -> Batch:
        """Run ``query_lengths[i]`` tokens of the sequence in ``slots[i]`` from ``starts[i]`` on.

        ``final_lengths[i]`` is its context at the end of the call (default: after this step).
        ``write_from[i]`` is the first position to write (default: the first that runs). Sequences
        without tokens are left out. Raises ValueError for a repeated slot, a negative length, and a
        final length that is shorter than this step.
        """
        if not len(query_lengths) == len(slots) == len(starts):
            raise ValueError(f"{len(query_lengths)} query lengths for {len(slots)} slots")
        if min(query_lengths, default=0) < 0:
            raise ValueError(f"query lengths must not be negative, got {list(query_lengths)}")
        if len(set(slots)) != len(slots):
            raise ValueError(f"a batch may have each slot once, got slots {list(slots)}")
        live = [place for place, n in enumerate(query_lengths) if n]
        ends = [starts[place] + query_lengths[place] for place in live]
        finals = ends
        if final_lengths is not None:
            finals = [final_lengths[place] for place in live]
            if any(final < end for final, end in zip(finals, ends, strict=True)):
                raise ValueError(f"this step ends at {ends}, beyond the final lengths {finals}")
        host = HostBatch(
            slots=tuple(slots[place] for place in live),
            starts=tuple(starts[place] for place in live),
            query_lengths=tuple(query_lengths[place] for place in live),
            write_from=None if write_from is None else tuple(write_from[place] for place in live),
        )
        bounds = [0]
        for n in host.query_lengths:
            bounds.append(bounds[-1] + n)
        positions = [p for _, start, n in host for p in range(start, start + n)]
        fields: dict[str, Field] = {
            "positions": (positions, torch.int64),
            "cu_seqlens": (bounds, torch.int32),
            "slots": (host.slots, torch.int64),
            "lengths": (ends, torch.int32),
        }
        if finals != ends:
            fields["final_lengths"] = (finals, torch.int32)
        if host.write_from is not None:
            fields["write_from"] = (host.write_from, torch.int32)
        tensors = together_on_device(device, *fields.values())
        moved: dict[str, Any] = dict(zip(fields, tensors, strict=True))
        return cls(max_query=max(host.query_lengths, default=0), host=host, **moved)

    @property
    def required_host(self) -> HostBatch:
        """Return ``host``. Raises RuntimeError if the numbers are only on the device."""
        if self.host is None:
            raise RuntimeError(
                "this batch has its numbers on the device only, but the implementation needs them "
                "on the host: it cannot run captured work"
            )
        return self.host

    @property
    def last_rows(self) -> torch.Tensor:
        """Packed index ``[B]`` of every sequence's last token."""
        return self.cu_seqlens[1:].long() - 1


class DecodeInputs(NamedTuple):
    """Inputs of a decode step, a row for each of B sequences, on the device.

    ``tokens, slots, positions [B]`` int64, ``lengths [B]`` int32, which is the position plus one,
    and ``finished [B]`` bool. A finished row still runs, without effect.
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


def together_on_device(device: torch.device | str, *fields: Field) -> list[torch.Tensor]:
    """Return the values of each field on the device, without waiting for the device.

    A CUDA device gets all of them by one copy of pinned memory, as each copy costs the host as much
    as a launch. There they share memory.
    """
    if torch.device(device).type != "cuda":
        return [on_device(values, dtype, device) for values, dtype in fields]
    hosts = [torch.tensor(list(values), dtype=dtype, device="cpu") for values, dtype in fields]
    starts, size = [], 0
    for each in hosts:
        starts.append(size)
        # Triton compiles a kernel again for pointers that are not multiples of 16 bytes.
        size += -(-each.nbytes // 16) * 16
    packed = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    for start, each in zip(starts, hosts, strict=True):
        packed[start : start + each.nbytes] = each.view(torch.uint8)
    moved = packed.to(device, non_blocking=True)
    return [
        moved[start : start + each.nbytes].view(each.dtype)
        for start, each in zip(starts, hosts, strict=True)
    ]


def widest_float(device: torch.device | str) -> torch.dtype:
    """Return float64, or float32 on devices that may lack it: all but CPUs and CUDA devices."""
    return torch.float64 if torch.device(device).type in ("cpu", "cuda") else torch.float32


@contextmanager
def host_by_default() -> Iterator[None]:
    """Make new tensors on the host unless a device is named, despite ``set_default_device``.

    torch's mode for this slows every operation, so it is entered only if it is needed.
    """
    host = torch.get_default_device().type == "cpu"
    with nullcontext() if host else torch.device("cpu"):
        yield
