"""run_app(): what an ASGI application sends, as an iterator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import ASGIApp, Message

# Seconds that an application has to end after its client has left.
LEAVING = 1.0


async def run_app(app: ASGIApp, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[Message]]:
    """Yield the messages of an ASGI application that is called with a whole body."""
    sent: list[Message] = []
    news, gone = asyncio.Event(), asyncio.Event()
    bodies = [body]

    async def receive() -> Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        # Bytes that were not read yet go out together: each item costs a call between processes.
        last = sent[-1] if sent else None
        if last is not None and "body" in last and "body" in message:
            sent[-1] = {**message, "body": last["body"] + message["body"]}
        else:
            sent.append(message)
        news.set()

    work = asyncio.ensure_future(app(scope, receive, send))
    work.add_done_callback(lambda _: news.set())
    try:
        while not (work.done() and not sent):
            await news.wait()
            news.clear()
            if sent:
                ready, sent[:] = list(sent), []
                yield ready
        await work
    finally:
        gone.set()
        if not work.done():
            # An application that waits for its client sees it leave.
            await asyncio.wait({work}, timeout=LEAVING)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
