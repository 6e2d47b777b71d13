"""Cost of Ray Serve: one replica beside the plain server, with the same engine and requests.

    python -m bench.cluster.cost --out bench/results/cluster-cost.json

Three things are measured: a short request alone, a stream alone, and many streams at once. The
processor's time is that of all processes of the service. The model is the small checkpoint, so the
engine's own share is as small as it can be.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from bench.report.results import header, write

TINY = Path(__file__).resolve().parents[2] / "lfm2_fast" / "tiny"
BODY = {"prompt": "The csv module reads", "temperature": 0, "ignore_eos": True}


async def short(session: Any, url: str, count: int) -> list[float]:
    """Return the milliseconds of requests for one token, one after another."""
    found = []
    for _ in range(count):
        begin = time.perf_counter()
        async with session.post(f"{url}/v1/completions", json={**BODY, "max_tokens": 1}) as answer:
            await answer.read()
        found.append(1000 * (time.perf_counter() - begin))
    return found


async def streams(session: Any, url: str, count: int, tokens: int) -> tuple[float, float]:
    """Return the tokens a second of streams at once, and the milliseconds to the first token."""
    firsts: list[float] = []

    async def one() -> None:
        begin = time.perf_counter()
        body = {**BODY, "max_tokens": tokens, "stream": True}
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            text = await answer.content.readline()
            firsts.append(1000 * (time.perf_counter() - begin))
            async for line in answer.content:
                text = line if line.strip() else text
        if text != b"data: [DONE]\n":
            raise RuntimeError(f"a stream was cut: {text!r}")

    begin = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(count)))
    return count * tokens / (time.perf_counter() - begin), statistics.median(firsts)


def seconds_of(process: psutil.Process) -> float:
    """Return the processor's seconds of a process and of its living descendants."""
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        try:
            used = each.cpu_times()
            total += used.user + used.system
        except psutil.NoSuchProcess:
            continue
    return total


async def measured(url: str, process: psutil.Process) -> dict[str, float]:
    """Return the figures of a running service."""
    limit = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=limit) as session:
        await short(session, url, 20)
        waits = await short(session, url, 150)
        alone, first = await streams(session, url, 1, 400)
        await streams(session, url, 16, 40)
        before = seconds_of(process)
        many, first_of_many = await streams(session, url, 16, 200)
        used = seconds_of(process) - before
    return {
        "short_ms": round(statistics.median(waits), 2),
        "short_ms_p95": round(sorted(waits)[int(0.95 * len(waits))], 2),
        "stream_tokens_per_second": round(alone, 1),
        "first_token_ms": round(first, 2),
        "streams_16_tokens_per_second": round(many, 1),
        "streams_16_first_token_ms": round(first_of_many, 2),
        "streams_16_cpu_ms_per_token": round(1000 * used / (16 * 200), 3),
    }


def service(*options: str) -> dict[str, float]:
    """Start the command with options, and return its figures."""
    command = [sys.executable, "-m", "lfm2_fast", "serve", str(TINY), "--port", "0"]
    command += ["--device", "cpu", "--dtype", "float32", "--memory", "64MB", *options]
    with subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ}
    ) as process:
        assert process.stdout is not None
        url = ""
        for line in process.stdout:
            if found := re.search(r"ready at (\S+)", line):
                url = found[1]
                break
        try:
            time.sleep(3)
            return asyncio.run(measured(url, psutil.Process(process.pid)))
        finally:
            process.send_signal(signal.SIGTERM)
            process.stdout.read()


def main() -> None:
    """Measure both in turns, and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"uvicorn": [], "ray serve": []}
    for _ in range(given.rounds):
        found["uvicorn"].append(service())
        found["ray serve"].append(service("--replicas", "1"))
        print({name: each[-1] for name, each in found.items()}, flush=True)
    write(given.out, {**header("Ray Serve beside uvicorn", {"rounds": given.rounds}), **found})


if __name__ == "__main__":
    main()
