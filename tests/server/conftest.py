"""A server of the small checkpoint, in a thread, that all tests of a process share."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import lfm2_fast

EXTRA = "the extra 'server' is not installed"


class Answer(NamedTuple):
    status: int
    body: Any
    headers: dict[str, str]


class Client:
    """Sends requests to a server, over a connection each."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.service = server.app.state.service
        self.host = server.url.removeprefix("http://")

    def send(
        self, path: str, body: Any = None, method: str | None = None, **headers: str
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self.host, timeout=60)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} if data is not None else {}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("GET" if data is None else "POST"), path, data, given)
        return connection.getresponse()

    def __call__(self, path: str, body: Any = None, **options: Any) -> Answer:
        response = self.send(path, body, **options)
        data = response.read()
        kind = response.headers.get("content-type", "")
        found = json.loads(data) if kind.startswith("application/json") else data.decode()
        return Answer(response.status, found, dict(response.headers.items()))

    def chat(self, text: str = "What is an index?", **fields: Any) -> Answer:
        messages = fields.pop("messages", [{"role": "user", "content": text}])
        return self("/v1/chat/completions", {"messages": messages, "max_tokens": 12, **fields})

    def complete(self, prompt: Any = "The csv module", **fields: Any) -> Answer:
        return self("/v1/completions", {"prompt": prompt, "max_tokens": 12, **fields})

    def stream(self, path: str, **body: Any) -> list[Any]:
        """The events of a stream, which ends as it should."""
        response = self.send(path, {**body, "stream": True})
        text = response.read().decode()
        assert response.status == 200, text
        assert response.headers["content-type"].startswith("text/event-stream")
        assert text.endswith("\n\n")
        events = [line.removeprefix("data: ") for line in text.splitlines() if "data: " in line]
        if events[-1] == "[DONE]":
            events.pop()
        return [json.loads(event) for event in events]

    def refused(self, answer: Answer, param: str | None, code: str, status: int = 400) -> str:
        """The message of an error of this kind."""
        assert answer.status == status, answer
        error = answer.body["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["param"], error["code"]) == (param, code), error
        return str(error["message"])


@pytest.fixture(scope="session")
def serving(tiny: Path) -> Iterator[Callable[..., Client]]:
    """Starts a server, and stops it at the end."""
    pytest.importorskip("fastapi", reason=EXTRA)
    pytest.importorskip("uvicorn", reason=EXTRA)
    pytest.importorskip("prometheus_client", reason=EXTRA)
    servers = []

    def start(model: Any = tiny, **options: Any) -> Client:
        if not isinstance(model, lfm2_fast.Lfm2ForCausalLM):
            options = {"device": "cpu", "dtype": "float32", **options}
        server = lfm2_fast.serve(model, port=0, background=True, **options)
        servers.append(server)
        return Client(server)

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def model(tiny: Path) -> lfm2_fast.Lfm2ForCausalLM:
    return lfm2_fast.load(tiny, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def client(serving: Callable[..., Client], model: lfm2_fast.Lfm2ForCausalLM) -> Client:
    """A client of a server of 8 rows, that at most 24 wait for."""
    return serving(model, max_rows=8, max_queue=24)
