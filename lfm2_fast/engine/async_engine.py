"""AsyncEngine: an engine in a thread of its own, for coroutines."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.request import Event, Request
from lfm2_fast.ops.cpu_threads import release_threads

T = TypeVar("T")
# Events, an error that ends them, or None, which only wakes a waiting coroutine.
EventQueue = asyncio.Queue["Event | BaseException | None"]
# A coroutine's loop, and its queue.
Consumer = tuple[asyncio.AbstractEventLoop, EventQueue]


class EngineStopped(RuntimeError):
    """Error of an engine that was closed, or that could not be reset after a fault."""


class Stream:
    """Events of requests that the engine has taken, with their ``ids``.

    ``close`` it at the end, which cancels continuations that have not ended. Only one coroutine may
    use it.
    """

    def __init__(
        self, engine: AsyncEngine, ids: Sequence[int], left: int, events: EventQueue
    ) -> None:
        self.ids = tuple(ids)
        self._engine, self._left, self._events = engine, left, events
        self._failure: BaseException | None = None

    @property
    def ended(self) -> bool:
        """Return True if every continuation has ended."""
        return not self._left

    async def next(self) -> list[Event]:
        """Wait for events and return them; none after ``wake`` and after the end.

        Raises the exception of a failed step, and EngineStopped.
        """
        if self.ended:
            return []
        if self._failure is not None:
            self._left = 0
            raise self._failure
        found: list[Event] = []
        event = await self._events.get()
        while True:
            if isinstance(event, BaseException):
                if found:
                    # What came before the failure is read first.
                    self._failure = event
                    return found
                self._left = 0
                raise event
            if event is not None:
                self._left -= event.finish_reason is not None
                found.append(event)
            if self._events.empty():
                return found
            event = self._events.get_nowait()

    def wake(self) -> None:
        """Let ``next`` return without waiting. Called in the stream's loop."""
        self._events.put_nowait(None)

    def cancel(self, id: int, index: int) -> None:
        """End one continuation; its last event says so."""
        self._engine.cancel(id, index)

    def close(self) -> None:
        """Cancel continuations that have not ended. A second call does nothing."""
        if self._left:
            self._left = 0
            self._engine.forget(self.ids)


class AsyncEngine:
    """Runs ``engine`` in a thread. Nothing else may use the engine meanwhile.

    ``generate`` is an asynchronous iterator over a request's events. ``start`` returns the events
    of several requests. If a consumer stops reading, its requests are cancelled. An exception in a
    step reaches every consumer; the engine is then reset for the next request. ``async with``
    closes it at the end.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: deque[Callable[[], None]] = deque()
        self._consumers: dict[int, Consumer] = {}
        # Requests that the thread has not added yet.
        self._adding: dict[asyncio.Future[list[int]], Consumer] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._fault: BaseException | None = None
        # This thread has perhaps loaded the model, or warmed it up.
        release_threads()
        self._thread = threading.Thread(target=self._drive, name="lfm2_fast engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    async def generate(self, request: Request) -> AsyncIterator[Event]:
        """Yield the events of a request, until each of its continuations has ended.

        Raises the exceptions of ``Engine.add`` and of steps, and EngineStopped.
        """
        stream = await self.start([request])
        try:
            while not stream.ended:
                for event in await stream.next():
                    yield event
        finally:
            stream.close()

    async def start(self, requests: Sequence[Request]) -> Stream:
        """Return the events of all requests, once the engine has taken each of them.

        Raises EngineStopped, and the exceptions of ``Engine.add``; then no request is taken.
        """
        loop = asyncio.get_running_loop()
        events: EventQueue = asyncio.Queue()
        added: asyncio.Future[list[int]] = loop.create_future()
        consumer: Consumer = (loop, events)
        self._tell(lambda: self._add(requests, consumer, added), adding=(added, consumer))
        try:
            ids = await asyncio.shield(added)
        except asyncio.CancelledError:
            # The ids are forgotten as soon as they are known.
            added.add_done_callback(self._forget_added)
            raise
        return Stream(self, ids, sum(request.n for request in requests), events)

    async def between_steps(self, function: Callable[[Engine], T]) -> T:
        """Call a quick function of the engine while no step runs, and return its result.

        Raises the function's exceptions, and EngineStopped.
        """
        loop = asyncio.get_running_loop()
        made: asyncio.Future[list[Any]] = loop.create_future()
        consumer: Consumer = (loop, asyncio.Queue())

        def call() -> None:
            with self._wake:
                self._adding.pop(made, None)
            try:
                result = [function(self.engine)]
            except Exception as error:
                self._call(loop, _settle, made, None, error)
            else:
                self._call(loop, _settle, made, result, None)

        self._tell(call, adding=(made, consumer))
        return (await made)[0]

    def _forget_added(self, added: asyncio.Future[list[int]]) -> None:
        if not added.cancelled() and added.exception() is None:
            self.forget(added.result())

    def cancel(self, id: int, index: int | None = None) -> None:
        """End a request, or one of its continuations, whose last events say so."""
        with suppress(EngineStopped):
            self._tell(lambda: self.engine.cancel(id, index))

    def forget(self, ids: Sequence[int]) -> None:
        """End requests whose consumer has stopped reading: it gets no more events."""

        def cancel() -> None:
            for id in ids:
                self._consumers.pop(id, None)
                self.engine.cancel(id)

        with suppress(EngineStopped):
            self._tell(cancel)

    def close(self) -> None:
        """End all requests and the thread, and free the engine's memory.

        Consumers get EngineStopped. A second call does nothing.
        """
        with self._wake:
            self._closed = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _tell(
        self,
        command: Callable[[], None],
        adding: tuple[asyncio.Future[list[Any]], Consumer] | None = None,
    ) -> None:
        """Let the thread call a function before its next step. Raises EngineStopped when closed."""
        with self._wake:
            if self._fault is not None:
                raise EngineStopped(_why(self._fault)) from self._fault
            if self._closed:
                raise EngineStopped("the engine was closed")
            if adding is not None:
                self._adding.update([adding])
            self._commands.append(command)
            self._wake.notify()

    def _add(
        self, requests: Sequence[Request], consumer: Consumer, added: asyncio.Future[list[int]]
    ) -> None:
        with self._wake:
            self._adding.pop(added, None)
        ids: list[int] = []
        try:
            for request in requests:
                ids.append(self.engine.add(request))
        except Exception as error:
            for id in ids:
                self.engine.cancel(id)
            self._call(consumer[0], _settle, added, None, error)
            return
        self._consumers.update(dict.fromkeys(ids, consumer))
        self._call(consumer[0], _settle, added, ids, None)

    def _drive(self) -> None:
        """Step while there is work, and wait while there is none."""
        while True:
            with self._wake:
                while not (self._closed or self._commands or self.engine.busy):
                    self._wake.wait()
                if self._closed:
                    break
                commands = list(self._commands)
                self._commands.clear()
            try:
                for command in commands:
                    command()
                if self.engine.busy:
                    self._hand_out(self.engine.step())
            except BaseException as error:
                if not self._restart(error):
                    return
        self._stop(EngineStopped("the engine was closed"))
        self.engine.close()

    def _restart(self, error: BaseException) -> bool:
        """Send a fault to all consumers and reset the engine. Return False if that fails too."""
        self._end_all(error)
        try:
            self.engine.reset(error if isinstance(error, Exception) else None)
        except BaseException as fault:
            with self._wake:
                self._fault = fault
            self._stop(EngineStopped(_why(fault)))
            return False
        return True

    def _stop(self, error: EngineStopped) -> None:
        """Refuse requests that were not begun, and end those that run."""
        with self._wake:
            adding = list(self._adding.items())
            self._adding.clear()
            self._commands.clear()
        for added, consumer in adding:
            self._call(consumer[0], _settle, added, None, error)
        self._end_all(error)

    def _hand_out(self, events: list[Event]) -> None:
        """Give each consumer its events, and wake each loop once for all its consumers."""
        given: dict[asyncio.AbstractEventLoop, list[tuple[EventQueue, Event]]] = {}
        for event in events:
            consumer = self._consumers.get(event.id)
            if consumer is not None:
                given.setdefault(consumer[0], []).append((consumer[1], event))
        for loop, pairs in given.items():
            self._call(loop, _put, pairs)
        ended = {event.id for event in events if event.finish_reason is not None}
        for id in ended - {row.id for row in self.engine.rows} if ended else ():
            self._consumers.pop(id, None)

    def _end_all(self, error: BaseException) -> None:
        """Give every consumer the error once, however many requests it has."""
        consumers = {id(events): (loop, events) for loop, events in self._consumers.values()}
        for loop, events in consumers.values():
            self._call(loop, events.put_nowait, error)
        self._consumers.clear()

    def _call(
        self, loop: asyncio.AbstractEventLoop, function: Callable[..., Any], *arguments: Any
    ) -> None:
        """Call a function in a loop, if the loop still runs."""
        try:
            loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            # It is closed: no coroutine waits any more.
            return


def _put(pairs: list[tuple[EventQueue, Event]]) -> None:
    for events, event in pairs:
        events.put_nowait(event)


def _why(fault: BaseException) -> str:
    return f"the engine cannot be reset: {fault}"


def _settle(
    added: asyncio.Future[list[Any]], found: list[Any] | None, error: Exception | None
) -> None:
    if added.done():
        return
    if error is not None:
        added.set_exception(error)
    else:
        assert found is not None
        added.set_result(found)
