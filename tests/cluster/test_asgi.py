"""run_app(): an application's messages, for readers that stay and for one that leaves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra 'server' is not installed")

from lfm2_fast.cluster.asgi import run_app  # noqa: E402

START = {"type": "http.response.start", "status": 200, "headers": []}


def chunk(text: str, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


async def within(work: Any) -> Any:
    return await asyncio.wait_for(work, 10)


def test_the_body_arrives_and_all_messages_come_in_order() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked = await receive()
        await send(START)
        for letter in asked["body"].decode():
            await send(chunk(letter))
            await asyncio.sleep(0)
        await send(chunk("", more=False))

    async def work() -> list[Any]:
        return [each async for part in run_app(app, {}, b"hello") for each in part]

    messages = asyncio.run(within(work()))
    assert messages[0] == START
    assert b"".join(each["body"] for each in messages[1:]) == b"hello"
    assert [each["more_body"] for each in messages[1:]][-1] is False
    assert all(each["more_body"] for each in messages[1:-1])


def test_unread_messages_are_sent_in_one_piece() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        for letter in "abc":
            await send(chunk(letter))
        await send(chunk("d", more=False))

    async def work() -> list[Any]:
        return [part async for part in run_app(app, {}, b"")]

    assert asyncio.run(within(work())) == [[START, chunk("abcd", more=False)]]


def test_a_consumer_that_leaves_is_a_client_that_disconnects() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(START)
        try:
            seen.append((await receive())["type"])
        finally:
            seen.append("ended")

    async def work() -> None:
        messages = run_app(app, {}, b"")
        await anext(messages)
        await messages.aclose()

    asyncio.run(within(work()))
    assert seen == ["http.disconnect", "ended"]


def test_an_application_that_fails_is_an_error_after_its_messages() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        raise RuntimeError("oops")

    async def work(found: list[Any]) -> None:
        async for part in run_app(app, {}, b""):
            found += part

    found: list[Any] = []
    with pytest.raises(RuntimeError, match="oops"):
        asyncio.run(within(work(found)))
    assert found == [START]
