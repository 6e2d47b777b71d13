"""Rows that decode, in one tensor for each dtype."""

from __future__ import annotations

import pytest
import torch

import lfm2_fast
from lfm2_fast.engine.request import Request, Row
from lfm2_fast.engine.step_buffers import StepBuffers
from lfm2_fast.engine.step_rows import StepRows, first_rows, sampling_state
from lfm2_fast.ops.sampling import TENSORS, SamplingParams, SamplingState

CPU = torch.device("cpu")
PARAMS = [
    SamplingParams(),
    SamplingParams(True, 0.7, 5, 0.9, 0.1),
    SamplingParams(True, 0.5, repetition_penalty=1.3),
]
TEXTS = [[5, 6], [7, 8, 9], [5, 4, 3, 4]]
EOS: list[tuple[int, ...]] = [(1, 2, 3), (), (4,)]


def rows_of(slots: list[int]) -> list[Row]:
    return [
        Row(0, Request(text, params, eos, seed=2**64 - 7), 1, limit=9, arrival=0, slot=slot)
        for text, params, eos, slot in zip(TEXTS, PARAMS, EOS, slots, strict=True)
    ]


def numbers(rows: StepRows) -> dict[str, list[object]]:
    found = {
        name: each.tolist() for name, each in zip(rows.inputs._fields, rows.inputs, strict=True)
    }
    found |= {f"state {name}": getattr(rows.state, name).tolist() for name in TENSORS}
    return found | {"eos": rows.eos.tolist(), "params": list(rows.state.params)}


def test_rows_stand_at_the_ends_of_their_texts() -> None:
    rows = rows_of([4, 0, 2])
    rows[1].written, rows[1].launched = [11, 12], 2
    made, (more,) = first_rows(rows, CPU, 4, ([8], torch.int32))
    assert more.tolist() == [8] and more.dtype == torch.int32
    alike = SamplingState(
        PARAMS, seed=2**64 - 7, rows=torch.ones(3).long(), positions=torch.tensor([2, 5, 4])
    )
    for name in TENSORS:
        ours, theirs = getattr(made.state, name), getattr(alike, name)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    assert made.inputs.slots.tolist() == [4, 0, 2]
    assert made.inputs.positions.tolist() == [1, 4, 3]
    assert made.inputs.lengths.tolist() == [2, 5, 4]
    assert not made.inputs.finished.any()
    assert made.eos.tolist() == [[1, 2, 3, -1], [-1] * 4, [4, -1, -1, -1]]
    for each in (*made.inputs, *(getattr(made.state, name) for name in TENSORS)):
        assert each.is_contiguous() and not each.data_ptr() % 16


@pytest.mark.parametrize("places", [[0, 1, 2], [3, 0, 4]])
def test_picked_rows_are_those_that_were_put(places: list[int]) -> None:
    made, _ = first_rows(rows_of([4, 0, 2]), CPU, 3)
    blank = [SamplingParams()] * 5
    whole, _ = StepRows.from_host(blank, CPU, {"tokens": range(5)}, [()] * 5, 3)
    before = numbers(whole)
    whole.put(places, torch.tensor(places), made)
    assert numbers(whole.pick(places)) == numbers(made)
    rest = [place for place in range(5) if place not in places]
    after = numbers(whole)
    for name, kept in before.items():
        assert [after[name][at] for at in rest] == [kept[at] for at in rest], name
    assert whole.state.active == {"do_sample", "temperature", "top_k", "top_p", "min_p"} | {
        "repetition_penalty"
    }


@pytest.mark.parametrize("places", [[0, 1, 2], [2, 0, 3]])
def test_buffers_mark_the_texts_where_rows_are_put(tiny, places: list[int]) -> None:
    model = lfm2_fast.load(tiny, device="cpu", backend="eager", dtype="float32")
    cache, rows = model.new_cache(4), rows_of([0, 1, 2])
    buffers = StepBuffers(model.network, cache)
    buffers.begin(cache, SamplingParams())
    made, at = buffers.first_rows(places, rows)
    state = sampling_state(model.network, rows)
    assert state.seen is not None and made.state.seen is not None
    assert torch.equal(made.state.seen, state.seen)
    assert [seen.nonzero()[:, 0].tolist() for seen in state.seen] == [
        sorted(set(text)) for text in TEXTS
    ]
    buffers.put(places, at, made)
    assert buffers.state.seen is not None and torch.equal(buffers.state.seen[places], state.seen)
    assert numbers(buffers.rows.pick(places)) == numbers(made)
    buffers.shrink(places[:1], 4, cache)
    assert torch.equal(buffers.state.seen[0], state.seen[0])
    assert buffers.inputs.finished.tolist() == [False, True, True, True]
