"""Servers behind ``vllm-router``: prefixes stay where they are, and one that dies is left out."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bench.cluster.simulated import eventually, free_port

ROOT = Path(__file__).resolve().parents[3]
ROUTER = shutil.which("vllm-router", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
pytestmark = pytest.mark.skipif(ROUTER is None, reason="vllm-router is not installed")


class Routed(NamedTuple):
    url: str
    servers: list[tuple[str, subprocess.Popen[str]]]


def get(url: str, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    except OSError:
        return 0, ""
    finally:
        connection.close()


def sent(url: str, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    data = json.dumps(body)
    connection.request("POST", path, data, {"Content-Type": "application/json"})
    return connection.getresponse()


def post(url: str, path: str, body: dict[str, Any]) -> tuple[int, str]:
    response = sent(url, path, body)
    return response.status, response.read().decode()


def rest(response: http.client.HTTPResponse) -> str:
    """Rest of a stream, also of one that is cut."""
    try:
        return response.read().decode()
    except http.client.IncompleteRead as cut:
        return cut.partial.decode(errors="replace") + " cut"
    except ConnectionError:
        return " cut"


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Routed]:
    """Two servers of the small checkpoint, and the router before them."""
    serve = [sys.executable, "-m", "lfm2_fast", "serve", "lfm2_fast/tiny", "--port", "0"]
    serve += ["--device", "cpu", "--dtype", "float32", "--memory", "64MB", "--max-rows", "4"]
    folder = tmp_path_factory.mktemp("router")
    quiet = subprocess.DEVNULL
    processes = [
        subprocess.Popen(serve, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=quiet)
        for _ in range(2)
    ]
    try:
        servers = []
        for process in processes:
            assert process.stdout is not None
            servers.append((process.stdout.readline().split()[-1], process))
        port = free_port()
        route = [str(ROUTER), "--port", str(port), "--policy", "cache_aware", "--worker-urls"]
        route += [url for url, _ in servers]
        route += ["--prometheus-port", str(free_port()), "--cb-failure-threshold", "2"]
        with (folder / "log").open("w") as log:
            processes.append(subprocess.Popen(route, text=True, stdout=log, stderr=log))
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: get(url, "/v1/models")[0] == 200)
        yield Routed(url, servers)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def metric(url: str, name: str) -> int:
    found = re.search(rf"vllm:{name}\{{[^}}]*\}} ([\d.]+)", get(url, "/metrics")[1])
    return int(float(found[1])) if found else 0


def prompts_of(url: str) -> int:
    """Number of prompts that a server has answered."""
    return metric(url, "request_prompt_tokens_count")


def cached_of(text: str) -> int:
    return int(json.loads(text)["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_conversation_stays_where_its_prefix_is(routed: Routed) -> None:
    """Four conversations of five turns: each turn but the first finds all that was said before."""
    before = sum(prompts_of(url) for url, _ in routed.servers)
    found: Counter[str] = Counter()
    for user in range(4):
        text = f"{user} " * 20 + "The csv module reads and writes tabular data. " * 6
        for turn in range(5):
            text += f" Then {user} said {turn}."
            body = {"prompt": text, "max_tokens": 4, "temperature": 0}
            status, answer = post(routed.url, "/v1/completions", body)
            assert status == 200, answer
            if turn:
                found["hit" if cached_of(answer) >= 64 else "miss"] += 1
    assert found == {"hit": 16}
    assert sum(prompts_of(url) for url, _ in routed.servers) - before == 20


def test_streams_and_chats_go_through(routed: Routed) -> None:
    body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 5, "stream": True}
    status, text = post(routed.url, "/v1/chat/completions", body)
    assert status == 200 and text.endswith("data: [DONE]\n\n")
    status, text = post(routed.url, "/v1/completions", {"prompt": "x", "temperature": -1})
    assert status == 400 and json.loads(text)["error"]["param"] == "temperature"
    assert [each["id"] for each in json.loads(get(routed.url, "/v1/models")[1])["data"]] == ["tiny"]


def test_a_killed_server_costs_its_streams_and_no_later_request(routed: Routed) -> None:
    fields = {"max_tokens": 1500, "ignore_eos": True, "stream": True}
    streams = [
        sent(routed.url, "/v1/completions", {"prompt": f"{number} is", **fields})
        for number in range(4)
    ]
    assert all(each.readline().startswith(b"data: ") for each in streams)
    running = {each: metric(each[0], "num_requests_running") for each in routed.servers}
    assert sum(running.values()) == 4
    victim = max(running, key=lambda each: running[each])
    victim[1].kill()
    victim[1].wait()
    texts = [rest(each) for each in streams]
    print([text[-60:] for text in texts])
    # A stream of the other server is whole. One that is cut has neither of a whole one's marks.
    assert sum(text.endswith("data: [DONE]\n\n") for text in texts) == 4 - running[victim]
    assert sum('"finish_reason":"length"' in text for text in texts) == 4 - running[victim]
    statuses = Counter()
    begin = time.monotonic()
    for number in range(12):
        body = {"prompt": f"{number} {number}", "max_tokens": 3}
        statuses[post(routed.url, "/v1/completions", body)[0]] += 1
    # The router repeats a request whose server is gone, and by then knows that it is.
    assert statuses == {200: 12} and time.monotonic() - begin < 60
