"""Admission and chunks: the order of prompts, and the counts."""

from __future__ import annotations

from typing import Any

import pytest

from lfm2_fast.cache.page_memory import PAGE_SIZE
from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.request import Event, Request, Row
from lfm2_fast.engine.scheduler import MOST, Scheduler
from tests.batches import text


def events_of(engine: Engine) -> list[Event]:
    """Step until all requests have ended; their events."""
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    return events


def test_only_a_twin_waits_for_a_prompt_that_runs(native: Any) -> None:
    """A prompt with the same beginning waits for the pages. A later prompt does not."""
    engine = Engine(native, max_rows=3, chunk=64)
    prompt = text(5 * PAGE_SIZE)
    first = engine.add(Request(prompt, max_tokens=1))
    twin = engine.add(Request(prompt + [7], max_tokens=1))
    other = engine.add(Request(text(30, 2), max_tokens=1))
    engine.step()
    assert [row.id for row in engine.scheduler.waiting] == [twin]
    assert {row.id for row in engine.scheduler.prefilling} | {other} == {first, other}
    events = events_of(engine)
    assert next(e for e in events if e.id == twin).cached_tokens >= 4 * PAGE_SIZE


def test_nothing_passes_a_prompt_that_waits_for_pages(native: Any) -> None:
    engine = Engine(native, max_rows=3, pages=6, prefix_cache=False)
    engine.add(Request(text(4 * PAGE_SIZE), max_tokens=60))
    engine.step()
    long = engine.add(Request(text(4 * PAGE_SIZE, 2), max_tokens=2))
    short = engine.add(Request(text(3, 3), max_tokens=2))
    engine.step()
    assert [row.id for row in engine.scheduler.waiting] == [long, short]
    ended = [event.id for event in events_of(engine) if event.finish_reason]
    assert set(ended[1:]) == {long, short}


def test_a_prompt_is_counted_once(native: Any) -> None:
    """Forks and preemptions do not count a prompt again."""
    engine = Engine(native, max_rows=4)
    stem = text(3 * PAGE_SIZE)
    engine.add(Request(stem + [5], max_tokens=1))
    events_of(engine)
    id = engine.add(Request(stem + [6, 7], max_tokens=4, n=3))
    engine.step()
    engine.step()
    assert len(engine.decode.rows) == 3
    assert engine.runner.preempt() and engine.statistics.preemptions == 1
    events = [event for event in events_of(engine) if event.id == id]
    assert {event.cached_tokens for event in events} == {len(stem)}
    assert engine.statistics.prompt_tokens == 2 * len(stem) + 3
    assert engine.statistics.prefix_hits == len(stem)


def test_the_index_can_be_cleared(native: Any) -> None:
    engine = Engine(native, max_rows=2)
    request = Request(text(3 * PAGE_SIZE), max_tokens=1)
    for hits in (0, 2 * PAGE_SIZE + 63, 0):
        if hits == 0:
            engine.clear_prefix_cache()
            assert engine.cache.pool.cached == 0
        engine.add(request)
        assert events_of(engine)[0].cached_tokens == hits


def test_prompts_with_log_probabilities_take_their_pages_first(native: Any) -> None:
    """A chunk has two prompts, and pages for one. Neither runs in part."""
    engine = Engine(native, max_rows=2, pages=4, chunk=256, prefix_cache=False)
    ids = [engine.add(Request(text(90, i), max_tokens=3, prompt_logprobs=1)) for i in range(2)]
    engine.prefill.admit(others=False)
    taken = engine.cache.pool.take(1)
    assert engine.step() == [] and engine.cache.lengths == [0, 0]
    assert engine.statistics.preemptions == 1
    engine.cache.pool.release(taken)
    told = {event.id: event.prompt_logprobs for event in events_of(engine) if event.prompt_logprobs}
    assert {id: len(found) for id, found in told.items()} == dict.fromkeys(ids, 90)


def test_chunks_have_the_given_length_until_one_is_timed() -> None:
    """The first length holds before a chunk was timed. Then the seconds decide."""
    scheduler = Scheduler(0.05, first=MOST)
    row = Row(0, Request(text(9000)), 0, limit=1, arrival=0)
    scheduler.prefilling.append(row)
    assert scheduler.next_chunk(lambda row: 0, 1) == [(row, MOST)]
    scheduler.measured([row], 1000, 0.1)
    assert scheduler.next_chunk(lambda row: 0, 1) == [(row, 448)]
    assert scheduler.next_chunk(lambda row: 0, 0) == [(row, MOST)]


def test_no_head_runs_before_a_prompt_ends(native: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head sees only the last token of the last of three chunks of a prompt."""
    engine, rows = Engine(native, max_rows=1, chunk=64), []
    forward = engine.model.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        logits = forward(*args, **kwargs)
        rows.append(len(logits))
        return logits

    monkeypatch.setattr(engine.model, "forward", noted)
    engine.add(Request(text(150), max_tokens=1))
    assert len(events_of(engine)) == 1 and rows == [1]


@pytest.mark.parametrize(
    ("prompts", "decoding", "tokens"), [(1, 8, 64), (8, 8, 64), (16, 8, 128), (99, 2, 256)]
)
def test_chunks_grow_with_the_prompts_that_wait(prompts: int, decoding: int, tokens: int) -> None:
    """With a millisecond a token, a chunk takes 0.064 seconds for each prompt that waits."""
    scheduler = Scheduler(0.064)
    rows = [Row(i, Request(text(9000)), 0, limit=1, arrival=i) for i in range(prompts)]
    scheduler.prefilling.append(rows[0])
    for row in rows[1:]:
        scheduler.wait(row)
    scheduler.measured([rows[0]], 64, 0.064)
    assert scheduler.next_chunk(lambda row: 0, decoding) == [(rows[0], tokens)]


def test_a_short_chunk_says_nothing_of_the_rate() -> None:
    """A short chunk reads the weights for one token; a long chunk reads them once for all."""
    scheduler = Scheduler(0.064)
    row = Row(0, Request(text(9000)), 0, limit=1, arrival=0)
    scheduler.prefilling.append(row)
    scheduler.measured([row], 64, 0.064)
    scheduler.measured([row], 1, 0.032)
    assert scheduler.next_chunk(lambda row: 0, 1) == [(row, 64)]
