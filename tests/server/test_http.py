"""Faults: clients that go, bodies that are wrong or too large, full queues, late answers."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.request import Event

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4}
LONG = {"prompt": "To create a new table,", "max_tokens": 1800, "ignore_eos": True}


def rows(client: Any) -> int:
    """Rows that run."""
    return sum(each["is_processing"] for each in client("/slots").body)


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never came")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"messages": [\xff]}', "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b"[1]", "invalid_type"),
        (b"null", "invalid_type"),
        (b'"text"', "invalid_type"),
    ],
    ids=["empty", "cut", "bytes", "surrogate", "deep", "list", "null", "string"],
)
def test_a_body_that_is_no_json_object(client, data: bytes, code: str) -> None:
    client.refused(client(CHAT, data, method="POST"), None, code)


def test_forms_and_plain_text_are_refused(client) -> None:
    """Web pages of anywhere may send those without asking."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = client(CHAT, json.dumps(HELLO).encode(), Content_Type=kind)
        client.refused(answer, None, "unsupported_media_type", 415)
    assert client(CHAT, HELLO, Content_Type="application/json; charset=utf-8").status == 200


def test_unknown_paths_methods_and_models_are_refused(client) -> None:
    assert "/nothing" in client.refused(client("/nothing"), None, "unknown_url", 404)
    client.refused(client(CHAT), None, "method_not_allowed", 405)
    client.refused(client("/v1/embeddings", {}), None, "unsupported_endpoint", 404)
    client.refused(client.chat(model="gpt-5"), "model", "model_not_found", 404)
    client.refused(client("/v1/models/gpt-5"), "model", "model_not_found", 404)
    assert client.chat(model="tiny").status == 200


def test_a_base_url_without_v1_is_one_too(client) -> None:
    assert client("/chat/completions", HELLO).body["object"] == "chat.completion"
    assert client("/completions", {"prompt": "a"}).body["object"] == "text_completion"
    assert client("/responses", {"input": "a", "max_output_tokens": 1}).status == 200
    assert client("/models").body == client("/v1/models").body
    assert client.send("/health", method="HEAD").status == 200


def test_a_request_has_an_id(client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lfm2_fast.server"):
        assert client("/health", X_Request_Id="abc-1").headers["x-request-id"] == "abc-1"
        made = [client("/health", X_Request_Id="a b\tc").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1] and all(each.startswith("req-") for each in made)
    lines = [record.getMessage() for record in caplog.records]
    assert any('"GET /health" 200 abc-1' in line for line in lines), lines


def test_large_bodies(client) -> None:
    """10 MB are read, and refused for what they say; 20 MB are not read."""
    client.refused(client.complete("a b " * 2_500_000), "prompt", "context_length_exceeded")
    client.refused(client.complete(["x"] * 3000), "prompt", "invalid_value")
    answer = client.send("/v1/completions", b" ", Content_Length=str(20 * 2**20))
    assert answer.status == 413
    assert json.loads(answer.read())["error"]["code"] == "body_too_large"


def test_a_body_that_grows_too_large_in_pieces(serving, model) -> None:
    client = serving(model, max_rows=1, max_body=1000)
    with socket.create_connection(client.host.split(":")) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(3):
            connection.sendall(b"190\r\n" + b" " * 400 + b"\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
    assert client.complete().status == 200


def test_a_client_that_goes_frees_its_rows_within_eight_steps(client) -> None:
    for stream in (True, False):
        connection = socket.create_connection(client.host.split(":"))
        body = json.dumps({**LONG, "n": 2, "stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        wait_for(lambda: rows(client) == 2)
        engine = client.service.engine.engine
        connection.close()
        wait_for(lambda: rows(client) == 0)
        steps = engine.statistics.steps
        assert client.complete().status == 200
        # Of 1,800 tokens each nearly all remained.
        assert engine.statistics.steps - steps < 100


def test_a_row_is_freed_within_eight_steps_of_its_cancellation(client, monkeypatch) -> None:
    """Counted between the moment at which the stream is closed and the row's end."""
    from lfm2_fast.engine.async_engine import AsyncEngine

    engine: Engine = client.service.engine.engine
    closed: list[int] = []
    ended: list[int] = []
    forget, leave = AsyncEngine.forget, engine.runner.leave

    def forgotten(self: Any, ids: Any) -> None:
        closed.append(engine.statistics.steps)
        forget(self, ids)

    def left(row: Any) -> None:
        ended.append(engine.statistics.steps)
        leave(row)

    monkeypatch.setattr(AsyncEngine, "forget", forgotten)
    monkeypatch.setattr(engine.runner, "leave", left)
    response = client.send("/v1/completions", {**LONG, "stream": True})
    response.fp.readline()
    response.close()
    wait_for(lambda: bool(ended))
    assert closed and ended[0] - closed[0] <= 8


def test_a_full_queue_is_503_and_says_when_to_come_back(serving, model) -> None:
    client = serving(model, max_rows=1, max_queue=1)
    held = [client.send("/v1/completions", {**LONG, "stream": True}) for _ in range(2)]
    answer = client.complete()
    assert "try again" in client.refused(answer, None, "queue_full", 503)
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    for each in held:
        each.close()
    wait_for(lambda: client.complete().status == 200)


def test_of_a_list_of_prompts_all_are_taken_or_none(serving, model) -> None:
    client = serving(model, max_rows=1, max_queue=2)
    client.refused(client.complete(["a"] * 9, max_tokens=500), None, "queue_full", 503)
    assert client.complete().status == 200


def test_a_late_answer_is_an_error_that_is_not_tried_again(serving, model) -> None:
    client = serving(model, max_rows=1, timeout=0.1)
    answer = client("/v1/completions", LONG)
    client.refused(answer, None, "deadline_exceeded", 504)
    assert answer.headers["x-should-retry"] == "false"
    events = client.stream("/v1/completions", **LONG)
    assert events[-1]["error"]["code"] == "deadline_exceeded"
    assert client.complete(max_tokens=2).status == 200


def test_an_error_after_the_first_byte_is_an_event(client, monkeypatch) -> None:
    engine: Engine = client.service.engine.engine
    wait_for(lambda: not rows(client))  # those of earlier tests, whose clients have left
    step, count = engine.step, 0

    def broken() -> list[Event]:
        # Steps without a token do not count: a slow machine runs a prompt in many.
        nonlocal count
        if count == 3:
            raise MemoryError("gone")
        events = step()
        count += bool(events)
        return events

    monkeypatch.setattr(engine, "step", broken)
    events = client.stream("/v1/completions", **LONG)
    assert events[0]["choices"] and set(events[-1]) == {"error"}
    assert events[-1]["error"]["type"] == "server_error"
    count = 0
    client.refused(client("/v1/completions", LONG), None, "engine_error", 500)
    monkeypatch.undo()
    assert client.complete().status == 200


@pytest.mark.slow
def test_a_client_that_does_not_read_delays_no_other_one(client) -> None:
    """The client's row ends in time, and it gets all of its text at the end."""
    slow = client.send("/v1/completions", {**LONG, "stream": True, "logprobs": 20})
    wait_for(lambda: rows(client) == 1)
    assert client.complete().status == 200
    wait_for(lambda: rows(client) == 0)
    text = slow.read().decode()
    assert text.endswith("data: [DONE]\n\n")
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    told = [each["choices"][0]["logprobs"]["tokens"] for each in events]
    assert sum(map(len, told)) == 1800


def test_a_silent_stream_sends_comments(client, monkeypatch) -> None:
    monkeypatch.setattr("lfm2_fast.server.http.PING", 0.01)
    engine: Engine = client.service.engine.engine
    step = engine.step

    def slow() -> list[Event]:
        time.sleep(0.05)
        return step()

    monkeypatch.setattr(engine, "step", slow)
    response = client.send(CHAT, {**HELLO, "stream": True})
    text = response.read().decode()
    assert ": ping\n\n" in text and text.endswith("data: [DONE]\n\n")


def test_keys(serving, model) -> None:
    client = serving(model, max_rows=1, api_key=["first", "sécond"], cors_origins=["https://a.b"])
    for headers in ({}, {"Authorization": "Bearer firs"}, {"Authorization": "Basic first"}):
        for path, body in ((CHAT, HELLO), ("/v1/models", None), ("/metrics", None)):
            answer = client(path, body, **headers)
            client.refused(answer, None, "invalid_api_key", 401)
            assert answer.headers["www-authenticate"] == "Bearer"
    assert client(CHAT, HELLO, Authorization="Bearer first").status == 200
    assert client(CHAT, HELLO, Authorization="bearer sécond".encode()).status == 200
    for name in ("Api_Key", "X_Api_Key"):
        assert client(CHAT, HELLO, **{name: "first"}).status == 200
        assert client(CHAT, HELLO, **{name: "third"}).status == 401
    assert client("/health").status == 200


def test_web_pages_of_other_origins(serving, model) -> None:
    client = serving(model, max_rows=1, api_key="key", cors_origins=["https://a.b"])
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "x-a"}
    for origin, allowed in (("https://a.b", True), ("https://evil", False)):
        answer = client.send(CHAT, None, "OPTIONS", Origin=origin, **asked)
        answer.read()
        assert (answer.headers.get("access-control-allow-origin") == origin) is allowed
    refused = client(CHAT, HELLO, Origin="https://a.b")
    assert refused.status == 401
    assert refused.headers["access-control-allow-origin"] == "https://a.b"


def test_metrics_count_what_was_done(client) -> None:
    def value(name: str) -> float:
        page = client("/metrics").body
        own = [line for line in page.splitlines() if line.startswith(f"vllm:{name}")]
        assert len(own) == 1, own
        return float(own[0].split()[-1])

    # A row whose client left in an earlier test may still run.
    end = time.monotonic() + 60
    while client.service.engine.engine.statistics.running and time.monotonic() < end:
        time.sleep(0.01)
    names = ["prompt_tokens_total", "generation_tokens_total"]
    names.append('request_success_total{finished_reason="length"')
    names.append("time_to_first_token_seconds_count")
    before = [value(name) for name in names]
    assert client.complete(max_tokens=7).status == 200
    changed = [value(name) - was for name, was in zip(names, before, strict=True)]
    assert changed == [6, 7, 1, 1]
    hits = value("prefix_cache_hits_total")
    for _ in range(2):
        assert client.complete("a b " * 100, cache_salt="metrics", max_tokens=1).status == 200
    assert value("prefix_cache_hits_total") - hits >= 128
    assert value("num_requests_running") == value("num_requests_waiting") == 0


def test_many_at_once_get_what_each_gets_alone(client) -> None:
    asks = [
        {"prompt": f"{i} times", "max_tokens": 8, "seed": i, "temperature": 1} for i in range(16)
    ]
    alone = [client("/v1/completions", ask).body["choices"][0]["text"] for ask in asks]
    found: dict[int, str] = {}

    def ask(place: int) -> None:
        events = client.stream("/v1/completions", **asks[place])
        found[place] = "".join(each["choices"][0]["text"] for each in events)

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(asks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[place] for place in range(len(asks))] == alone
