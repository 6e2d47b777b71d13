"""Constraints: masks that belong to rows, asked in time, and apart from one another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast
from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.request import Event, Request
from lfm2_fast.ops.sampling import SamplingParams


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return lfm2_fast.load(tiny, device="cpu", dtype=torch.float32)


def events_of(engine: Engine, requests: Sequence[Request]) -> list[list[Event]]:
    ids = [engine.add(request) for request in requests]
    events: dict[int, list[Event]] = {id: [] for id in ids}
    while engine.busy:
        for event in engine.step():
            events[event.id].append(event)
    return [events[id] for id in ids]


class Counting:
    """Allows tokens 100, 101, 102, ... in this order; knows them by its own count."""

    def __init__(self) -> None:
        self.known: list[int] = []

    def prepare(self, written: Sequence[int]) -> None:
        assert list(written[: len(self.known)]) == self.known
        self.known = list(written)

    def apply(self, written: Sequence[int], logits: torch.Tensor) -> None:
        assert list(written) == self.known
        allowed = logits[100 + len(self.known)].clone()
        logits.fill_(-math.inf)
        logits[100 + len(self.known)] = allowed


def test_each_continuation_has_its_own(model: Any) -> None:
    sampling = SamplingParams(do_sample=True, temperature=5.0)
    one = Request([1, 2], sampling, max_tokens=4, constraint=Counting, n=3)
    (events,) = events_of(Engine(model, max_rows=2), [one])
    for index in range(3):
        own = [event.token for event in events if event.index == index]
        assert own == [100, 101, 102, 103]


def test_it_goes_on_where_its_row_was_preempted(model: Any) -> None:
    requests = [
        Request([n + 1] * 40, max_tokens=150, constraint=constraint)
        for n, constraint in enumerate((Counting, None, Counting))
    ]
    engine = Engine(model, max_rows=3, pages=5)
    told = events_of(engine, requests)
    assert engine.statistics.preemptions > 0
    for events in (told[0], told[2]):
        assert [event.token for event in events] == list(range(100, 250))
    (alone,) = events_of(Engine(model, max_rows=1), requests[1:2])
    assert [event.token for event in told[1]] == [event.token for event in alone]


def test_an_early_end_is_forbidden_unless_nothing_else_is_left(model: Any) -> None:
    request = Request([1], eos=(102, 103), max_tokens=9, min_tokens=3, constraint=Counting)
    (events,) = events_of(Engine(model), [request])
    assert [event.token for event in events] == [100, 101, 102]
    assert events[-1].finish_reason == "stop"


def test_one_that_fails_ends_its_row_alone(model: Any) -> None:
    class Broken:
        def prepare(self, written: Sequence[int]) -> None:
            raise RuntimeError("not told")

        def apply(self, written: Sequence[int], logits: torch.Tensor) -> None:
            if len(written) == 2:
                raise RuntimeError("too complex")

    requests = [Request([1], max_tokens=5, constraint=each) for each in (Broken, Counting)]
    broken, fine = events_of(Engine(model), requests)
    assert str(broken[-1].error) == "too complex" and broken[-1].finish_reason == "error"
    assert [event.token is None for event in broken] == [False, False, True]
    assert [event.token for event in fine] == list(range(100, 105))


def test_it_is_told_before_the_model_runs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Spy:
        def prepare(self, written: Sequence[int]) -> None:
            order.append(f"prepare {len(written)}")

        def apply(self, written: Sequence[int], logits: torch.Tensor) -> None:
            order.append(f"apply {len(written)}")

    engine = Engine(model)
    run = engine.decode.buffers.run_steps

    def spied(*args: Any, **more: Any) -> None:
        order.append("run")
        run(*args, **more)

    monkeypatch.setattr(engine.decode.buffers, "run_steps", spied)
    events_of(engine, [Request([1], max_tokens=3, constraint=Spy)])
    first = order.index("run")
    assert order[first - 1 : first + 3] == ["prepare 1", "run", "prepare 1", "apply 1"]
