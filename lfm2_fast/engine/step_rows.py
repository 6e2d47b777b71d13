"""StepRows: the numbers of rows that decode, in one tensor for each dtype.

So few launches move rows: one copy brings them from the host, and one launch a tensor puts them
into their places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch

from lfm2_fast.cache.batch import DecodeInputs, Field, on_device, together_on_device, widest_float
from lfm2_fast.engine.request import Row
from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.ops.sampling import SamplingParams, SamplingState, signed

# Names in each tensor, in order. The positions of draws are those of the next tokens.
INTS = ("tokens", "slots", "positions", "top_k", "seeds", "rows", "draw_positions")
FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty")
FLAGS = ("finished", "do_sample")


class StepRows:
    """Inputs, end tokens and sampling state of B rows.

    ``inputs`` and ``state`` are views of ``ints [7, P]`` int64, ``floats [4, P]`` in the device's
    widest float, ``lengths [1, P]`` int32 and ``flags [2, P]`` bool. P is B with padding, so that
    each row of a tensor begins at a multiple of 16 bytes. ``eos [B, E]`` int64 has -1 after a row's
    end tokens.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        tensors: Sequence[torch.Tensor],
        eos: torch.Tensor,
        seen: torch.Tensor | None = None,
    ) -> None:
        self.tensors, self.eos = tuple(tensors), eos
        own: dict[str, torch.Tensor] = {}
        count = len(params)
        for names, tensor in zip((INTS, FLOATS, ("lengths",), FLAGS), tensors, strict=True):
            own |= {name: tensor[at, :count] for at, name in enumerate(names)}
        self.inputs = DecodeInputs(*(own[name] for name in DecodeInputs._fields))
        self.state = SamplingState.over(params, {**own, "positions": own["draw_positions"]}, seen)

    @classmethod
    def from_host(
        cls,
        params: Sequence[SamplingParams],
        device: torch.device,
        own: Mapping[str, Sequence[int]],
        eos: Sequence[Sequence[int]],
        ends: int,
        *more: Field,
        seen: torch.Tensor | None = None,
    ) -> tuple[StepRows, list[torch.Tensor]]:
        """Return rows of numbers ``own`` by name, and the tensors of ``more``, by one copy.

        Numbers that are not given are 0. Lengths follow from the positions. A row has room for
        ``ends`` end tokens.
        """
        count, values = len(params), dict(own)
        for field in fields(SamplingParams):
            values[field.name] = [getattr(each, field.name) for each in params]
        values["lengths"] = [position + 1 for position in own.get("positions", [0] * count)]

        def field_of(names: Sequence[str], dtype: torch.dtype) -> Field:
            padding = [0] * (_padded(count, dtype) - count)
            blank = [0] * count
            return [one for name in names for one in (*values.get(name, blank), *padding)], dtype

        kinds = (
            (INTS, torch.int64),
            (FLOATS, widest_float(device)),
            (("lengths",), torch.int32),
            (FLAGS, torch.bool),
        )
        padded = [one for each in eos for one in (*each, *[-1] * (ends - len(each)))]
        moved = together_on_device(
            device, *(field_of(*kind) for kind in kinds), (padded, torch.int64), *more
        )
        tensors = [
            each.view(len(names), -1) for each, (names, _) in zip(moved, kinds, strict=False)
        ]
        return cls(params, tensors, moved[4].view(count, ends), seen), moved[5:]

    def pick(self, places: Sequence[int]) -> StepRows:
        """Return the rows in ``places``, in that order, as a copy."""
        at, seen = on_device(places, torch.int64, self.eos.device), self.state.seen
        return StepRows(
            [self.state.params[place] for place in places],
            [each[:, at] for each in self.tensors],
            self.eos[at],
            None if seen is None else seen[at],
        )

    def put(self, places: Sequence[int], at: torch.Tensor | slice, other: StepRows) -> None:
        """Write ``other`` into the rows ``places``, which are ``at`` too, except what it has seen.

        Both have room for as many end tokens.
        """
        for ours, theirs in zip(self.tensors, other.tensors, strict=True):
            ours[:, at] = theirs[:, : len(places)]
        self.eos[at] = other.eos
        self.state.note_params(places, other.state.params)

    # Not in a caller's inference mode: steps outside of it write to these tensors.
    @torch.inference_mode(False)
    def widen(self, ends: int) -> None:
        """Make room for ``ends`` end tokens a row."""
        wider = torch.full((len(self.eos), ends), -1, device=self.eos.device)
        wider[:, : self.eos.shape[1]] = self.eos
        self.eos = wider


def first_rows(
    rows: Sequence[Row],
    device: torch.device,
    ends: int = 0,
    *more: Field,
    seen: torch.Tensor | None = None,
) -> tuple[StepRows, list[torch.Tensor]]:
    """Return rows at the last tokens of their texts, and the tensors of ``more``, by one copy.

    The texts have run. ``seen [B, V]`` bool, if given, gets the marks of their tokens.
    """
    own = {
        "slots": [row.slot for row in rows],
        "positions": [row.start + row.launched - 1 for row in rows],
        "seeds": signed([row.request.seed for row in rows]),
        "rows": [row.request.first_row + row.index for row in rows],
        "draw_positions": [row.length for row in rows],
    }
    params, eos = [row.request.sampling for row in rows], [row.request.eos for row in rows]
    if seen is not None:
        vocab = seen.shape[1]
        marks = [at * vocab + token for at, row in enumerate(rows) for token in row.text]
        more = (*more, (marks, torch.int64))
    made, moved = StepRows.from_host(
        params, device, own, eos if ends else [()] * len(rows), ends, *more, seen=seen
    )
    if seen is not None:
        seen.zero_().view(-1).index_fill_(0, moved.pop(), True)
    return made, moved


def sampling_state(model: Lfm2, rows: Sequence[Row]) -> SamplingState:
    """Return the state that chooses the next tokens of ``rows``, after their texts."""
    seen = None
    if penalizes(rows):
        shape = (len(rows), model.config.vocab_size)
        seen = torch.empty(shape, dtype=torch.bool, device=model.device)
    return first_rows(rows, model.device, seen=seen)[0].state


def penalizes(rows: Sequence[Row]) -> bool:
    """Return True if a row has a repetition penalty, which needs marks of its text."""
    return any(row.request.sampling.repetition_penalty != 1.0 for row in rows)


def _padded(count: int, dtype: torch.dtype) -> int:
    """Return the numbers of a row of ``count`` numbers that ends at a multiple of 16 bytes."""
    return -(-count * dtype.itemsize // 16) * 16 // dtype.itemsize
