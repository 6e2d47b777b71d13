"""Front: which bodies it reads, and of whom."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from ray.exceptions import RayError
from starlette.datastructures import Headers
from starlette.requests import Request

from lfm2_fast.cluster.front import Front

KEY = [(b"authorization", b"Bearer secret")]
LONG = [(b"content-length", b"1001")]
PATH, PAGE = "/v1/completions", "https://page.example"


class Answer:
    """Answer of a replica, which says how long the body was."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def __aiter__(self) -> Any:
        yield [{"type": "http.response.start", "status": 200, "headers": []}]
        yield [{"type": "http.response.body", "body": str(len(self._body)).encode()}]

    def cancel(self) -> None:
        pass


class Replicas:
    """Handle of replicas."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def options(self, **_: Any) -> Any:
        return self

    @property
    def answer(self) -> Any:
        return self

    def remote(self, scope: Any, body: bytes) -> Any:
        return self._answer(body)


class Lost(Answer):
    """Answer of a replica that dies first."""

    def __aiter__(self) -> Any:
        return self

    async def __anext__(self) -> Any:
        raise RayError("lost")


def answered(
    path: str, headers: Any = (), method: str = "POST", parts: int = 4, answer: Any = Answer
) -> tuple[list[Any], int]:
    """Messages to a client whose body has parts of 200 bytes, and how many of them were read."""
    scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
    sent: list[Any] = []
    read = 0

    async def receive() -> Any:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": b"x" * 200, "more_body": read < parts}

    async def send(message: Any) -> None:
        sent.append(message)

    async def work() -> None:
        front = Front(Replicas(answer), lambda: ("secret",), 1000, [PAGE])
        response = await front(Request(scope, receive))
        await response(scope, receive, send)

    asyncio.run(work())
    return sent, read


def told(*arguments: Any, **options: Any) -> tuple[int, str, int]:
    """Status and text of an answer, and how many parts of the body were read."""
    sent, read = answered(*arguments, **options)
    text = b"".join(each.get("body", b"") for each in sent).decode()
    return sent[0]["status"], text, read


@pytest.mark.parametrize("headers", [[], LONG, [(b"authorization", b"Bearer wrong")]], ids=str)
@pytest.mark.parametrize("path", [PATH, "/metrics", "/nowhere"])
def test_without_a_key_no_body_is_read(path: str, headers: Any) -> None:
    status, text, read = told(path, headers)
    assert (status, read) == (401, 0)
    assert json.loads(text)["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/health"), ("GET", "/"), ("OPTIONS", PATH)], ids=str
)
def test_open_endpoints_read_no_body(method: str, path: str) -> None:
    assert told(path, method=method) == (200, "0", 0)


def test_with_a_key_a_body_is_read_up_to_its_limit() -> None:
    assert told(PATH, KEY) == (200, "800", 4)
    for headers, parts, read in ((KEY, 9, 6), (KEY + LONG, 1, 0)):
        status, text, found = told(PATH, headers, parts=parts)
        assert (status, found) == (413, read)
        assert json.loads(text)["error"]["code"] == "body_too_large"


def test_pages_that_may_call_can_read_errors() -> None:
    for headers, answer, status in (([], Answer, 401), (KEY, Lost, 503)):
        for origin, allowed in ((PAGE, PAGE), ("https://other.example", None)):
            asked = [*headers, (b"origin", origin.encode())]
            start = answered(PATH, asked, answer=answer)[0][0]
            assert start["status"] == status
            assert Headers(raw=start["headers"]).get("access-control-allow-origin") == allowed
