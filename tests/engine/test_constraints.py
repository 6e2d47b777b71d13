"""Constraints: masks that belong to rows, computed in time, independent of each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast
from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.logits import adjusted
from lfm2_fast.engine.request import Request, Row
from lfm2_fast.ops.sampling import SamplingParams
from tests.batches import events_by_request

VOCAB = 4096


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return lfm2_fast.load(tiny, device="cpu", dtype=torch.float32)


def words_of(tokens: Sequence[int]) -> torch.Tensor:
    """The words of a mask that allows these tokens."""
    bits = torch.zeros(VOCAB, dtype=torch.int64)
    bits[list(tokens)] = 1
    words = (bits.view(-1, 32) << torch.arange(32)).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


class Counting:
    """Allows tokens 100, 101, 102, ... in this order; knows them by its own count."""

    def __init__(self) -> None:
        self.known: list[int] = []

    def prepare(self, written: Sequence[int]) -> None:
        assert list(written[: len(self.known)]) == self.known
        self.known = list(written)

    def allowed(self, written: Sequence[int]) -> torch.Tensor:
        assert list(written) == self.known
        return words_of([100 + len(self.known)])


def test_each_continuation_has_its_own(model: Any) -> None:
    sampling = SamplingParams(do_sample=True, temperature=5.0)
    one = Request([1, 2], sampling, max_tokens=4, constraint=Counting, n=3)
    (events,) = events_by_request(Engine(model, max_rows=2), [one])
    for index in range(3):
        own = [event.token for event in events if event.index == index]
        assert own == [100, 101, 102, 103]


def test_every_token_has_its_bit(model: Any) -> None:
    chosen = [0, 31, 32, 63, 1000, VOCAB - 1]

    def only(token: int | None) -> Any:
        class Only:
            def prepare(self, written: Sequence[int]) -> None:
                pass

            def allowed(self, written: Sequence[int]) -> torch.Tensor | None:
                return None if token is None else words_of([token])

        return Only

    sampling = SamplingParams(do_sample=True, temperature=3.0)
    # Rows without a mask stand between, and keep their own tokens.
    each = [only(token) for token in chosen] + [only(None), None]
    order = [each[place] for place in (6, 0, 1, 7, 2, 3, 4, 5)]
    requests = [Request([5], sampling, max_tokens=3, constraint=one) for one in order]
    told = [
        [event.token for event in events] for events in events_by_request(Engine(model), requests)
    ]
    assert [told[place] for place in (1, 2, 4, 5, 6, 7)] == [[token] * 3 for token in chosen]
    assert told[0] == told[3]
    (alone,) = events_by_request(Engine(model), [Request([5], sampling, max_tokens=3)])
    assert told[0] == [event.token for event in alone]


@pytest.mark.parametrize("vocab_size", [40, 64, 307])
def test_a_vocabulary_need_not_fill_its_last_word(vocab_size: int) -> None:
    masks = torch.randint(-(2**31), 2**31, (3, (vocab_size + 31) // 32)).to(torch.int32)

    class Given:
        def prepare(self, written: Sequence[int]) -> None:
            pass

        def allowed(self, written: Sequence[int]) -> torch.Tensor:
            return masks[written[0]]

    logits = torch.randn(4, vocab_size)
    rows = []
    for place in range(3):
        row = Row(1, Request([1], constraint=Given), place, 9, place)
        row.written.append(place)
        rows.append((row, place + 1))
    made = adjusted(logits, rows)
    bits = ((masks[:, :, None] >> torch.arange(32)) & 1).view(3, -1)[:, :vocab_size].bool()
    expected = logits.clone()
    expected[1:][~bits] = -torch.inf
    assert torch.equal(made, expected)


@pytest.mark.slow
def test_it_goes_on_where_its_row_was_preempted(model: Any) -> None:
    requests = [
        Request([n + 1] * 40, max_tokens=150, constraint=constraint)
        for n, constraint in enumerate((Counting, None, Counting))
    ]
    engine = Engine(model, max_rows=3, pages=5)
    told = events_by_request(engine, requests)
    assert engine.statistics.preemptions > 0
    for events in (told[0], told[2]):
        assert [event.token for event in events] == list(range(100, 250))
    (alone,) = events_by_request(Engine(model, max_rows=1), requests[1:2])
    assert [event.token for event in told[1]] == [event.token for event in alone]


def test_an_early_end_is_forbidden_unless_nothing_else_is_left(model: Any) -> None:
    request = Request([1], eos=(102, 103), max_tokens=9, min_tokens=3, constraint=Counting)
    (events,) = events_by_request(Engine(model), [request])
    assert [event.token for event in events] == [100, 101, 102]
    assert events[-1].finish_reason == "stop"


def test_one_that_fails_ends_its_row_alone(model: Any) -> None:
    class Broken:
        def prepare(self, written: Sequence[int]) -> None:
            raise RuntimeError("not told")

        def allowed(self, written: Sequence[int]) -> None:
            if len(written) == 2:
                raise RuntimeError("too complex")

    requests = [Request([1], max_tokens=5, constraint=each) for each in (Broken, Counting)]
    broken, fine = events_by_request(Engine(model), requests)
    assert str(broken[-1].error) == "too complex" and broken[-1].finish_reason == "error"
    assert [event.token is None for event in broken] == [False, False, True]
    assert [event.token for event in fine] == list(range(100, 105))


def test_a_constraint_prepares_before_the_model_runs(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    class Spy:
        def prepare(self, written: Sequence[int]) -> None:
            order.append(f"prepare {len(written)}")

        def allowed(self, written: Sequence[int]) -> None:
            order.append(f"allowed {len(written)}")

    engine = Engine(model)
    run = engine.decode.buffers.run_steps

    def spied(*args: Any, **more: Any) -> None:
        order.append("run")
        run(*args, **more)

    monkeypatch.setattr(engine.decode.buffers, "run_steps", spied)
    events_by_request(engine, [Request([1], max_tokens=3, constraint=Spy)])
    first = order.index("run")
    assert order[first - 1 : first + 3] == ["prepare 1", "run", "prepare 1", "allowed 1"]
