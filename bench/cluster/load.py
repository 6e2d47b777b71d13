"""Requests that are sent while parts of a service fail, and the end of each."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import aiohttp

PATH = "/v1/completions"
# Endings that a client can tell apart from a complete answer.
CLEAN = ("status", "event", "connection")


class Ending(NamedTuple):
    """End of a request: "complete", one of CLEAN, or what a client would take for complete."""

    kind: str
    text: str = ""
    answer: Any = None


async def ask(session: Any, url: str, *, tokens: int, stream: bool, **fields: Any) -> Ending:
    """Send a request for a number of tokens, and judge its end as a client can."""
    body = {"max_tokens": tokens, "ignore_eos": True, "stream": stream, "temperature": 0, **fields}
    if stream:
        body["stream_options"] = {"include_usage": True}
    try:
        async with session.post(url + PATH, json=body) as response:
            if response.status != 200:
                text = await response.text()
                return Ending("status", text, response.status)
            if not stream:
                answer = await response.json()
                choice = answer["choices"][0]
                whole = answer["usage"]["completion_tokens"] == tokens
                kind = "complete" if whole and choice["finish_reason"] == "length" else "cut"
                return Ending(kind, choice["text"], answer)
            return await _read(response, tokens)
    except (aiohttp.ClientError, ConnectionError) as error:
        return Ending("connection", str(error))


async def _read(response: Any, tokens: int) -> Ending:
    text, written, reason, done = "", 0, None, False
    async for line in response.content:
        data = line.decode().strip().removeprefix("data: ")
        if data == "[DONE]":
            done = True
        elif data:
            chunk = json.loads(data)
            if "error" in chunk:
                return Ending("event", text, chunk["error"])
            for choice in chunk["choices"]:
                text += choice["text"]
                reason = choice["finish_reason"] or reason
            if chunk.get("usage"):
                written = chunk["usage"]["completion_tokens"]
    whole = done and reason == "length" and written == tokens
    return Ending("complete" if whole else "cut", text)


async def load(
    urls: list[str], during: Callable[[], Any], *, clients: int, tokens: int, **fields: Any
) -> list[Ending]:
    """Let clients ask one request after another, streams and whole ones, until ``during`` returns.

    A client whose request fails goes on with the next URL, as behind a load balancer.
    """
    endings: list[Ending] = []
    over = False

    async def client(number: int) -> None:
        place = number
        asked = 0
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while not over:
                stream = (number + asked) % 2 == 0
                asked += 1
                url = urls[place % len(urls)]
                ending = await ask(session, url, tokens=tokens, stream=stream, **fields)
                endings.append(ending)
                if ending.kind != "complete":
                    await asyncio.sleep(0.2)
                    place += 1

    tasks = [asyncio.ensure_future(client(number)) for number in range(clients)]
    try:
        await asyncio.to_thread(during)
    finally:
        over = True
        await asyncio.gather(*tasks)
    return endings
