"""The engine in its own thread: events of coroutines, and the end of either of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from lfm2_fast.engine.async_engine import AsyncEngine, EngineStopped, Stream
from lfm2_fast.engine.engine import Engine, QueueFull
from lfm2_fast.engine.request import Event, Request
from lfm2_fast.models.lfm2 import Lfm2
from tests.batches import text


def run(work: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(work, 60)

    return asyncio.run(bounded())


def alone(model: Lfm2, request: Request) -> list[int]:
    engine, found = Engine(model, max_rows=1), []
    engine.add(request)
    while engine.busy:
        found += [event.token for event in engine.step()]
    return found


async def tokens_of(engine: AsyncEngine, request: Request) -> list[int | None]:
    return [event.token async for event in engine.generate(request)]


def all_is_free(engine: Engine) -> bool:
    return engine.cache.pool.used == 0 and not engine.rows


def test_many_at_once_get_what_each_gets_alone(native) -> None:
    requests = [Request(text(5 + 9 * i, i), max_tokens=4 + i) for i in range(12)]

    async def work() -> list[list[int | None]]:
        async with AsyncEngine(Engine(native, max_rows=3)) as engine:
            return await asyncio.gather(*(tokens_of(engine, request) for request in requests))

    assert run(work()) == [alone(native, request) for request in requests]


def test_events_before_a_failure_are_not_lost(native) -> None:
    """A slow loop finds tokens and the failure together."""

    async def work() -> list[Any]:
        async with AsyncEngine(Engine(native)) as engine:
            events: asyncio.Queue[Any] = asyncio.Queue()
            stream = Stream(engine, [0], 1, events)
            tokens = [Event(0, 0, token) for token in (5, 6)]
            for each in (*tokens, MemoryError("gone")):
                events.put_nowait(each)
            assert await stream.next() == tokens and not stream.ended
            with pytest.raises(MemoryError, match="gone"):
                await stream.next()
            assert stream.ended
            return tokens

    run(work())


def test_all_continuations_of_a_request_come(native) -> None:
    async def work() -> list[Event]:
        async with AsyncEngine(Engine(native)) as engine:
            return [event async for event in engine.generate(Request(text(9), n=3, max_tokens=5))]

    events = run(work())
    assert sorted(event.index for event in events) == [0] * 5 + [1] * 5 + [2] * 5
    assert [event.finish_reason for event in events].count("length") == 3


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_consumer_that_stops_frees_all(native, after: int) -> None:
    async def work() -> None:
        inner = Engine(native, max_rows=2, prefix_cache=False)
        async with AsyncEngine(inner) as engine:
            for _ in range(3):
                events = engine.generate(Request(text(300), max_tokens=1000))
                task = asyncio.ensure_future(take(events, after))
                if after == 0:
                    await asyncio.sleep(0)
                    task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            request = Request(text(7), max_tokens=3)
            assert await tokens_of(engine, request) == alone(native, request)
            for _ in range(1000):
                if all_is_free(inner):
                    break
                await asyncio.sleep(0.01)
            assert all_is_free(inner)

    async def take(events: Any, count: int) -> None:
        seen = 0
        async for _ in events:
            seen += 1
            if seen == count:
                break
        await events.aclose()

    run(work())


def test_several_requests_have_one_stream(native) -> None:
    requests = [Request(text(5 + 9 * i, i), max_tokens=4 + i) for i in range(4)]

    async def work() -> dict[int, list[int | None]]:
        found: dict[int, list[int | None]] = {}
        async with AsyncEngine(Engine(native, max_rows=2)) as engine:
            stream = await engine.start(requests)
            while not stream.ended:
                for event in await stream.next():
                    found.setdefault(stream.ids.index(event.id), []).append(event.token)
            assert await stream.next() == []
        return found

    assert run(work()) == {i: alone(native, request) for i, request in enumerate(requests)}


def test_a_stream_wakes_ends_one_continuation_and_closes(native) -> None:
    async def work() -> None:
        inner = Engine(native, max_rows=2, prefix_cache=False)
        async with AsyncEngine(inner) as engine:
            stream = await engine.start([Request(text(300), n=2, max_tokens=1500)])
            stream.wake()
            assert await stream.next() == []
            stream.cancel(stream.ids[0], 1)
            reasons: list[str | None] = []
            while "cancelled" not in reasons:
                events = await stream.next()
                reasons += [event.finish_reason for event in events if event.index == 1]
            assert not stream.ended
            assert any(event.index == 0 for event in await stream.next())
            stream.close()
            assert stream.ended
            for _ in range(1000):
                if await engine.between_steps(all_is_free):
                    return
                await asyncio.sleep(0.01)
            raise AssertionError("a row outlived its stream")

    run(work())


def test_of_several_requests_all_are_taken_or_none(native) -> None:
    async def work() -> None:
        async with AsyncEngine(Engine(native, max_rows=1, prefix_cache=False)) as engine:
            with pytest.raises(ValueError, match="prompt has no tokens"):
                await engine.start([Request(text(5), max_tokens=500), Request([])])
            await engine.between_steps(lambda inner: None)
            assert await engine.between_steps(lambda inner: inner.rows) == []
            with pytest.raises(ZeroDivisionError):
                await engine.between_steps(lambda inner: 1 / 0)
        with pytest.raises(EngineStopped):
            await engine.between_steps(lambda inner: inner.rows)

    run(work())


def test_only_the_consumer_of_a_wrong_request_gets_its_error(native) -> None:
    async def work() -> None:
        async with AsyncEngine(Engine(native, max_rows=1, max_waiting=1)) as engine:
            with pytest.raises(ValueError, match="prompt has no tokens"):
                await tokens_of(engine, Request([]))
            running = asyncio.ensure_future(tokens_of(engine, Request(text(5), max_tokens=300)))
            await asyncio.sleep(0.05)
            asked = [tokens_of(engine, Request(text(5), max_tokens=1)) for _ in range(5)]
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert any(isinstance(each, QueueFull) for each in found)
            assert len(await running) == 300

    run(work())


def test_a_fault_reaches_everyone_and_the_next_request_works(native, monkeypatch) -> None:
    request = Request(text(5), max_tokens=6)

    async def work() -> None:
        inner = Engine(native, max_rows=2)
        async with AsyncEngine(inner) as engine:
            with monkeypatch.context() as patch:
                patch.setattr(inner.runner, "_run_prompts", lambda **_: 1 / 0)
                asked = [tokens_of(engine, request) for _ in range(3)]
                found = await asyncio.gather(*asked, return_exceptions=True)
            assert all(isinstance(each, ZeroDivisionError) for each in found), found
            assert await tokens_of(engine, request) == alone(native, request)

    run(work())


def test_an_engine_that_cannot_be_reset_says_why(native, monkeypatch) -> None:
    def broken(*_: Any) -> None:
        raise MemoryError("no more")

    async def work() -> None:
        inner = Engine(native)
        engine = AsyncEngine(inner)
        monkeypatch.setattr(inner, "step", broken)
        monkeypatch.setattr(inner, "reset", broken)
        with pytest.raises(MemoryError):
            await tokens_of(engine, Request(text(5), max_tokens=6))
        engine._thread.join(10)
        with pytest.raises(EngineStopped):
            await tokens_of(engine, Request(text(5), max_tokens=6))
        engine.close()

    run(work())


def test_closing_ends_what_runs(native) -> None:
    async def work() -> None:
        engine = AsyncEngine(Engine(native))
        running = asyncio.ensure_future(tokens_of(engine, Request(text(5), max_tokens=2000)))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(engine.close)
        engine.close()
        with pytest.raises(EngineStopped, match="the engine was closed"):
            await running
        with pytest.raises(EngineStopped):
            await tokens_of(engine, Request(text(5)))

    before = threading.active_count()
    run(work())
    assert threading.active_count() <= before


def test_no_wake_up_is_lost(native) -> None:
    """Requests arrive one by one, each when the engine has just gone to sleep."""

    async def work() -> None:
        async with AsyncEngine(Engine(native, max_rows=1)) as engine:
            for seed in range(150):
                assert len(await tokens_of(engine, Request(text(2, seed), max_tokens=1))) == 1

    run(work())
