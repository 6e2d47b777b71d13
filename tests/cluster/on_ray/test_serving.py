"""A service of replicas on several nodes: cancellation, updates, and parts that die."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from functools import partial
from typing import Any

import pytest

from bench.cluster.load import CLEAN, Ending, ask, load
from bench.cluster.simulated import Simulated, eventually
from lfm2_fast.cluster.scale import Scale
from lfm2_fast.cluster.serving import serve_replicas

REPLICA, PROXY = "ServeReplica:lfm2_fast:Replica", "ray::ProxyActor"
PROMPT = {"prompt": "The csv module reads and"}
TOKENS = 24


@pytest.fixture(scope="module")
def service(simulated: Simulated) -> Simulated:
    simulated.run()
    eventually(lambda: all(alone(url).kind == "complete" for url in simulated.urls))
    return simulated


def alone(url: str, **fields: Any) -> Ending:
    """The end of one request that nothing happens to."""

    async def work() -> Ending:
        import aiohttp

        async with aiohttp.ClientSession() as session:
            return await ask(session, url, tokens=TOKENS, **{"stream": False, **PROMPT, **fields})

    return asyncio.run(work())


def loaded(service: Simulated, during: Any, urls: list[str]) -> list[Ending]:
    """Return the endings of a load while something happens. No cut text may look complete."""
    whole = alone(service.urls[0]).text
    endings = asyncio.run(load(urls, during, clients=6, tokens=TOKENS, **PROMPT))
    kinds = {kind: sum(each.kind == kind for each in endings) for kind in ("complete", *CLEAN)}
    print(kinds)
    assert sum(kinds.values()) == len(endings), [e for e in endings if e.kind not in kinds]
    assert all(each.text == whole for each in endings if each.kind == "complete")
    for each in endings:
        if each.kind == "event":
            assert each.answer["code"] in ("replica_lost", "engine_stopped")
            assert whole.startswith(each.text)
        if each.kind == "status":
            # Those of our code are OpenAI's error objects. Ray Serve's own are plain text.
            assert each.answer in (500, 503, 404), each
            if each.answer == 503 and each.text.startswith("{"):
                assert set(json.loads(each.text)["error"]) >= {"message", "code"}
    return endings


def kill(processes: list[Any]) -> None:
    """Kill the last of some processes in the middle of a load, which goes on for a time."""
    time.sleep(2)
    processes[-1].kill()
    time.sleep(6)


def test_the_address_of_a_running_serve_is_reported(
    service: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Serve keeps its port; what the command asks for does not count."""
    monkeypatch.setattr("ray.serve.run", lambda *_, **__: None)
    told: list[str] = []
    address = service.cluster.address
    serve_replicas({"model": "x"}, host="0.0.0.0", port=1, address=address, ready=told.append)
    assert told == [f"{service.urls[0]} on each node with a proxy of Ray Serve"]


def test_a_client_that_leaves_frees_its_row(service: Simulated) -> None:
    host, port = service.urls[0].removeprefix("http://").split(":")
    body = json.dumps({**PROMPT, "max_tokens": 1500, "ignore_eos": True, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    links = []
    # Every row of both replicas, for 75 seconds, were the clients to stay.
    for _ in range(8):
        link = socket.create_connection((host, int(port)), timeout=30)
        link.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        links.append(link)
    for link in links:
        found = b""
        while b"data: " not in found:
            found += link.recv(1 << 16)
    for link in links:
        link.close()
    begin = time.monotonic()
    assert alone(service.urls[0]).kind == "complete"
    assert time.monotonic() - begin < 15


def test_a_killed_replica_costs_only_what_it_ran(service: Simulated) -> None:
    endings = loaded(service, lambda: kill(service.processes(REPLICA)), service.urls[:1])
    failed = [each for each in endings if each.kind != "complete"]
    # At most those that ran there, and what arrived before the others knew.
    assert 1 <= len(failed) <= 12
    assert {each.kind for each in failed} <= {"event", "status"}
    # The other replica took over.
    assert all(each.kind == "complete" for each in endings[-6:])
    eventually(lambda: len(service.processes(REPLICA)) == 2)


def test_a_killed_proxy_costs_only_its_own_connections(service: Simulated) -> None:
    endings = loaded(service, lambda: kill(service.processes(PROXY)), service.urls)
    assert any(each.kind == "connection" for each in endings)
    assert all(each.kind == "complete" for each in endings[-6:])
    eventually(lambda: all(alone(url).kind == "complete" for url in service.urls))


def test_an_update_fails_no_request(service: Simulated) -> None:
    before = {each.pid for each in service.processes(REPLICA)}

    def update() -> None:
        service.run()
        eventually(lambda: not before & {each.pid for each in service.processes(REPLICA)})

    endings = loaded(service, update, service.urls[:1])
    assert {each.kind for each in endings} == {"complete"}


def test_a_lost_node_costs_only_what_it_ran(service: Simulated) -> None:
    urls = [service.urls[0], service.urls[2]]

    def lose() -> None:
        time.sleep(2)
        service.cluster.remove_node(service.workers[0], allow_graceful=False)
        # Ray takes a node for dead that was silent for so long.
        time.sleep(12)
        eventually(lambda: all(alone(url).kind == "complete" for url in urls))

    endings = loaded(service, lose, urls)
    assert all(each.kind == "complete" for each in endings[-6:])
    eventually(lambda: len(service.processes(REPLICA)) == 2)


def test_replicas_follow_the_load(service: Simulated) -> None:
    scale = Scale(min_replicas=1, max_replicas=3, target_ongoing_requests=1.0, cpus_per_replica=1)
    service.run(scale=scale)
    grown = partial(eventually, lambda: len(service.processes(REPLICA)) == 3, 120)
    endings = loaded(service, grown, service.urls[:1])
    assert {each.kind for each in endings} == {"complete"}
