"""Faults in the middle of a step: no row, slot or event is lost, and nothing waits for ever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lfm2_fast.cache.page_memory import PAGE_SIZE
from lfm2_fast.cache.page_pool import CacheError
from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.model_runner import new_cache
from lfm2_fast.engine.request import Event, Request, Row
from tests.batches import text


def events_of(engine: Engine, steps: int = 500) -> list[Event]:
    """Step until all requests have ended; their events."""
    events: list[Event] = []
    for _ in range(steps):
        if not engine.busy:
            return events
        events += engine.step()
    raise AssertionError("the engine does not come to an end")


def refuse(*args: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_partial_page_without_memory_is_done_without(native: Any, monkeypatch: Any) -> None:
    engine = Engine(native, max_rows=2)
    stem = text(2 * PAGE_SIZE)
    engine.add(Request(stem, max_tokens=1))
    events_of(engine)
    expected = events_of_one(engine, Request(stem[:100], max_tokens=3))
    take = engine.cache._pages._take
    calls: list[int] = []

    def short(count: int) -> list[int]:
        calls.append(count)
        if len(calls) == 1:
            raise CacheError("no page")
        return take(count)

    engine.clear_prefix_cache()
    events_of_one(engine, Request(stem, max_tokens=1))
    monkeypatch.setattr(engine.cache._pages, "_take", short)
    id = engine.add(Request(stem[:100], max_tokens=3))
    events = events_of(engine)
    assert events[0].cached_tokens == PAGE_SIZE and calls
    assert [event.token for event in events if event.id == id] == expected
    assert sorted(engine.slots.free) == [0, 1]


def events_of_one(engine: Engine, request: Request) -> list[int | None]:
    engine.add(request)
    return [event.token for event in events_of(engine)]


def test_a_fork_without_memory_keeps_its_slot(native: Any, monkeypatch: Any) -> None:
    engine = Engine(native, max_rows=4)
    copy = engine.cache.copy
    calls: list[int] = []

    def short(source: int, target: int) -> None:
        calls.append(target)
        if len(calls) == 1:
            raise CacheError("no page")
        copy(source, target)

    monkeypatch.setattr(engine.cache, "copy", short)
    engine.add(Request(text(30), max_tokens=4, n=3))
    events = events_of(engine)
    assert sorted(event.index for event in events if event.finish_reason) == [0, 1, 2]
    assert sorted(engine.slots.free) == [0, 1, 2, 3] and calls


def test_a_fault_in_the_choice_of_first_tokens_is_reported(native: Any, monkeypatch: Any) -> None:
    engine = Engine(native, max_rows=2)
    id = engine.add(Request(text(9), max_tokens=4))
    with monkeypatch.context() as patch:
        patch.setattr(native.ops, "sample", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError) as caught:
            engine.step()
    engine.reset(caught.value)
    assert [(event.id, event.error) for event in engine.step()] == [(id, caught.value)]


def test_an_ended_request_is_let_go(native: Any) -> None:
    engine = Engine(native, max_rows=4)
    for seed in range(9):
        engine.add(Request(text(30, seed), max_tokens=1))
    events_of(engine)
    engine.step()
    assert not engine.scheduler._costs and not engine.runner.prefilled and not engine.slots.leaving


def test_a_prompt_with_log_probabilities_does_not_wait_for_shared_pages(native: Any) -> None:
    engine = Engine(native, max_rows=2, chunk=64)
    stem = text(5 * PAGE_SIZE)
    engine.add(Request(stem, max_tokens=1))
    engine.step()
    told = engine.add(Request([*stem, 5], max_tokens=1, prompt_logprobs=0))
    engine.step()
    assert told in [row.id for row in engine.scheduler.prefilling]
    events_of(engine)


def test_rows_of_a_callers_cache_that_is_full_run_together(native: Any) -> None:
    """Their pages are there already, so none waits for another."""
    cache = new_cache(native, 3, 4 * PAGE_SIZE)
    held = {slot: text(3 * PAGE_SIZE + 10, slot) for slot in range(3)}
    for more in (10, 20):
        engine = Engine(native, cache=cache)
        ids = {
            engine.add(Request(tokens, max_tokens=more), [slot]): slot
            for slot, tokens in held.items()
        }
        most = 0
        while engine.busy:
            for event in engine.step():
                held[ids[event.id]].append(event.token)
            most = max(most, len(engine.decode.rows))
        assert most == 3


def test_a_slot_that_two_requests_name_serves_one_after_the_other(native: Any) -> None:
    engine = Engine(native, cache=new_cache(native, 2, 256))
    requests = [Request(text(20, seed), max_tokens=4) for seed in (1, 2)]
    ids = [engine.add(request, [0]) for request in requests]
    ended = [event.id for event in events_of(engine) if event.finish_reason]
    assert ended == ids
    told = engine.add(Request(text(20, 2), max_tokens=1, prompt_logprobs=0), [0])
    events = events_of(engine)
    assert events[0].id == told and len(events[0].prompt_logprobs or ()) == 20


def test_an_engine_on_a_callers_cache_does_not_forget_it(native: Any) -> None:
    cache = new_cache(native, 1, 256)
    with pytest.raises(ValueError, match="memory and pages are those of cache"):
        Engine(native, cache=cache, pages=3)
    engine = Engine(native, cache=cache)
    engine.add(Request(text(20), max_tokens=4), [0])
    engine.step()
    for forget in (engine.reset, engine.sleep, engine.wake):
        with pytest.raises(RuntimeError, match=r"caller's cache|without requests"):
            forget()
    engine.close()
    assert cache.lengths[0] >= 20 and str(engine).endswith("asleep")


class First:
    """A chooser that takes token 9, and ends the given rows."""

    changes_logits = True

    def __init__(self, last: int) -> None:
        self.last = last
        self.seen: list[int] = []

    def __call__(self, rows: Sequence[Row], logits: torch.Tensor, state: Any) -> torch.Tensor:
        self.seen.append(len(rows))
        tokens = torch.full((len(rows),), 9)
        state.record(tokens)
        return tokens

    def ends(self, row: Row) -> bool:
        return len(row.written) == self.last


def test_a_chooser_sees_all_rows_of_every_step(native: Any) -> None:
    chooser = First(3)
    engine = Engine(native, max_rows=3, chooser=chooser, chunk=32)
    for seed in range(3):
        engine.add(Request(text(20 + 30 * seed, seed), max_tokens=6))
    events = events_of(engine)
    assert [event.token for event in events] == [9] * 9 and chooser.seen == [3, 3, 3]
    assert [event.finish_reason for event in events[-3:]] == ["stop"] * 3


def test_a_chooser_with_more_requests_than_rows_goes_on(native: Any) -> None:
    engine = Engine(native, max_rows=2, chooser=First(2))
    for seed in range(5):
        engine.add(Request(text(9, seed), max_tokens=6))
    assert [event.token for event in events_of(engine)] == [9] * 10


def test_memory_is_taken_again_on_waking(native: Any, monkeypatch: Any) -> None:
    engine = Engine(native, max_rows=2, memory="64MB")
    for put_away in (engine.sleep, engine.close):
        put_away()
        assert str(engine) == "2 rows; asleep"
        with pytest.raises(RuntimeError, match="asleep"):
            _ = engine.tokens
        engine.wake()
        assert engine.cache.pool.memory.count == engine.cache.pool.memory.limit


def test_an_engine_may_be_made_in_inference_mode(native: Any) -> None:
    expected = events_of_one(Engine(native, max_rows=2), Request(text(30), max_tokens=5))
    with torch.inference_mode():
        engine = Engine(native, max_rows=2)
    assert events_of_one(engine, Request(text(30), max_tokens=5)) == expected


def test_the_first_token_comes_before_the_next_step_runs(native: Any) -> None:
    engine = Engine(native, max_rows=1)
    engine.add(Request(text(30), max_tokens=3))
    assert [len(engine.step()) for _ in range(3)] == [1, 1, 1]
