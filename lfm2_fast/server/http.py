"""Answers over HTTP: limited bodies, streams of events, clients that disconnect."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from lfm2_fast.server.errors import ApiError, of_engine
from lfm2_fast.server.reply import Reply

T = TypeVar("T")
log = logging.getLogger("lfm2_fast.server")
# Seconds after which a silent stream sends a comment, so that proxies keep it open.
PING = 15.0
# Made once: the library's own dumps makes an encoder for each call with these options.
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
Begin = Callable[[bytes], Awaitable[Reply]]


class ClientGone(Exception):
    """Error of a client that closed the connection."""


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return an answer in JSON."""
    return JSONResponse(body, status, headers)


def error_response(error: ApiError) -> Response:
    """Return OpenAI's error object with its status."""
    return json_response(error.body, error.status, error.headers)


async def body_of(request: Request) -> bytes:
    """Return a request's body. Raises ApiError for another type than JSON."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    if kind.lower() != "application/json" and not kind.lower().endswith("+json"):
        # Any web page may send forms and plain text to this address without permission.
        raise ApiError(
            f"the body is of type {kind[:100]!r}: send JSON, with the header "
            "Content-Type: application/json",
            status=415,
            code="unsupported_media_type",
        )
    return await request.body()


async def answer(request: Request, begin: Begin) -> Response:
    """Return an endpoint's answer to a request. Its work ends when the client disconnects."""
    data = await body_of(request)
    reply: Reply | None = None

    async def work() -> Response | None:
        nonlocal reply
        reply = await begin(data)
        return None if reply.stream else json_response(await reply.complete())

    try:
        response = await while_connected(request.receive, work())
    except BaseException:
        if reply is not None:
            reply.close()
        raise
    assert reply is not None
    return EventStream(reply) if response is None else response


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of ``work``. If the client disconnects, cancel it and raise ClientGone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events of a reply. A failure after the first byte becomes an event."""

    media_type = "text/event-stream"

    def __init__(self, reply: Reply) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        # The length is not known.
        del self.headers["content-length"]
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, until it ends or the client disconnects."""
        try:
            await while_connected(receive, self._send(send))
        except ClientGone:
            return
        finally:
            self._reply.close()

    async def _send(self, send: Send) -> None:
        reply = self._reply
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        ticking = asyncio.ensure_future(self._tick())
        try:
            await _event(send, reply.first())
            while not reply.answers.done:
                parts = await reply.answers.next()
                if parts:
                    self._said = True
                    await _event(send, (each for part in parts for each in reply.news(part)))
                else:
                    await _chunk(send, b": ping\n\n")
            await _event(send, reply.last())
        except Exception as error:
            failed = of_engine(error)
            if failed.status == 500:
                log.error("a stream failed", exc_info=error)
            await _event(send, [self._reply.failed(failed)])
        finally:
            ticking.cancel()
        if reply.done_mark:
            await _chunk(send, b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tick(self) -> None:
        """Wake the stream after a time of silence."""
        while True:
            self._said = False
            await asyncio.sleep(PING)
            if not self._said:
                self._reply.answers.wake()


async def _event(send: Send, objects: Iterable[dict[str, Any]]) -> None:
    """Send objects as events, in one piece."""
    lines = []
    for each in objects:
        name = each.get("type") if isinstance(each.get("type"), str) else None
        lines.append(f"event: {name}\n" if name else "")
        lines.append(f"data: {ENCODER.encode(each)}\n\n")
    if lines:
        await _chunk(send, "".join(lines).encode())


async def _chunk(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
