"""AsyncEngine: an engine in a thread of its own, for coroutines."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.request import Event, Request

# A coroutine's loop, and its queue of events, or of an error that ends it.
Consumer = tuple[asyncio.AbstractEventLoop, "asyncio.Queue[Event | BaseException]"]


class EngineStopped(RuntimeError):
    """The engine takes no more requests: it was closed, or could not be made anew after a fault."""


class AsyncEngine:
    """Drives ``engine`` in a thread; nothing else may use it meanwhile.

    ``generate`` is an asynchronous iterator over a request's events. A consumer that goes away
    cancels its request. An exception out of a step reaches every consumer, and the engine begins
    anew for the next request. Used as ``async with``, it is closed at the end.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: deque[Callable[[], None]] = deque()
        self._consumers: dict[int, Consumer] = {}
        # Requests that the thread has not added yet.
        self._adding: dict[asyncio.Future[int], Consumer] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._drive, name="lfm2_fast engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    async def generate(self, request: Request) -> AsyncIterator[Event]:
        """Yield the events of a request, until each of its continuations has ended.

        Raises what ``Engine.add`` raises, what a step raised meanwhile, and EngineStopped.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        added: asyncio.Future[int] = loop.create_future()
        consumer: Consumer = (loop, events)
        self._tell(lambda: self._add(request, consumer, added), adding=(added, consumer))
        left = request.n
        id: int | None = None
        try:
            id = await asyncio.shield(added)
            while left:
                event = await events.get()
                if isinstance(event, BaseException):
                    left = 0
                    raise event
                left -= event.finish_reason is not None
                yield event
        finally:
            if left and id is not None:
                self._forget(id)
            elif left:
                # Cancelled before the engine said the id: it is forgotten as soon as it is known.
                added.add_done_callback(self._forget_added)

    def _forget_added(self, added: asyncio.Future[int]) -> None:
        if not added.cancelled() and added.exception() is None:
            self._forget(added.result())

    def close(self) -> None:
        """End all requests and the thread, and give the engine's memory back.

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
        adding: tuple[asyncio.Future[int], Consumer] | None = None,
    ) -> None:
        """Have the thread do something before its next step. Raises EngineStopped when closed."""
        with self._wake:
            if self._fault is not None:
                raise EngineStopped(_why(self._fault)) from self._fault
            if self._closed:
                raise EngineStopped("the engine was closed")
            if adding is not None:
                self._adding.update([adding])
            self._commands.append(command)
            self._wake.notify()

    def _add(self, request: Request, consumer: Consumer, added: asyncio.Future[int]) -> None:
        with self._wake:
            self._adding.pop(added, None)
        try:
            id = self.engine.add(request)
        except Exception as error:
            self._call(consumer, _settle, added, None, error)
            return
        self._consumers[id] = consumer
        self._call(consumer, _settle, added, id, None)

    def _forget(self, id: int) -> None:
        """Cancel a request whose consumer has gone."""

        def cancel() -> None:
            self._consumers.pop(id, None)
            self.engine.cancel(id)

        try:
            self._tell(cancel)
        except EngineStopped:
            return

    def _drive(self) -> None:
        """Step while there is work, and sleep while there is none."""
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
                if not self._begin_anew(error):
                    return
        self._stop(EngineStopped("the engine was closed"))
        self.engine.close()

    def _begin_anew(self, error: BaseException) -> bool:
        """Tell everyone of a fault and empty the engine; False if that fails too."""
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
        """Refuse what was asked and not begun, and end what runs."""
        with self._wake:
            adding = list(self._adding.items())
            self._adding.clear()
            self._commands.clear()
        for added, consumer in adding:
            self._call(consumer, _settle, added, None, error)
        self._end_all(error)

    def _hand_out(self, events: list[Event]) -> None:
        for event in events:
            consumer = self._consumers.get(event.id)
            if consumer is not None:
                self._call(consumer, consumer[1].put_nowait, event)
        for id in {event.id for event in events} - {row.id for row in self.engine.rows}:
            self._consumers.pop(id, None)

    def _end_all(self, error: BaseException) -> None:
        for consumer in self._consumers.values():
            self._call(consumer, consumer[1].put_nowait, error)
        self._consumers.clear()

    def _call(self, consumer: Consumer, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a function in the consumer's loop, if that still runs."""
        try:
            consumer[0].call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            # Its loop is closed: no coroutine waits any more.
            return


def _why(fault: BaseException) -> str:
    return f"the engine does not begin anew: {fault}"


def _settle(added: asyncio.Future[int], id: int | None, error: Exception | None) -> None:
    if added.done():
        return
    if error is not None:
        added.set_exception(error)
    else:
        assert id is not None
        added.set_result(id)
