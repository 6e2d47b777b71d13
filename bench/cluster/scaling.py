"""Throughput of replicas whose steps take a fixed time, by their number, on a simulated cluster.

    python -m bench.cluster.scaling --out bench/results/cluster-scaling.json

An engine's step is a sleep after the small checkpoint's own few milliseconds, so that replicas do
not compete for this machine's cores. A perfect service of n replicas has n times the tokens a
second of one. Each replica gets 1.5 times as many requests as it has rows.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

import aiohttp

from bench.cluster.load import ask
from bench.cluster.simulated import Simulated
from bench.report.results import header, write
from lfm2_fast.cluster.scale import Scale

# Seconds of a step, rows of a replica, tokens of an answer.
STEP, ROWS, TOKENS = 0.1, 4, 20


def throughput(simulated: Simulated, replicas: int, seconds: float) -> float:
    """Deploy replicas, and return the tokens a second that clients get, streams and whole answers.

    An answer counts with the share of its time that lies in the measured seconds.
    """
    simulated.remove()
    simulated.run(STEP, scale=Scale(replicas=replicas, cpus_per_replica=1), max_rows=ROWS)
    return asyncio.run(_measured(simulated.urls[0], round(1.5 * ROWS * replicas), seconds))


async def _measured(url: str, clients: int, seconds: float) -> float:
    begin = time.monotonic() + 3
    end = begin + seconds
    tokens = 0.0

    async def client(number: int, session: Any) -> None:
        nonlocal tokens
        asked = 0
        while (start := time.monotonic()) < end:
            asked += 1
            prompt = f"{number} {asked} The csv module"
            ending = await ask(session, url, tokens=TOKENS, stream=number % 2 == 0, prompt=prompt)
            if ending.kind != "complete":
                raise RuntimeError(f"a request failed without a cause: {ending}")
            now = time.monotonic()
            inside = max(min(now, end) - max(start, begin), 0)
            tokens += TOKENS * inside / (now - start)

    limit = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=limit) as session:
        await asyncio.gather(*(client(number, session) for number in range(clients)))
    return tokens / seconds


def plot(found: dict[str, Any], path: Path) -> None:
    """Write the plot of a result."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    numbers = [int(number) for number in found["tokens_per_second"]]
    rates = [statistics.median(each) for each in found["tokens_per_second"].values()]
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.plot(numbers, [rates[0] * each for each in numbers], "--", label="n times one replica")
    axes.plot(numbers, [0.85 * rates[0] * each for each in numbers], ":", label="0.85 of that")
    axes.plot(numbers, rates, "o-", label="measured")
    axes.set_xlabel("replicas")
    axes.set_ylabel("tokens a second")
    axes.set_xticks(numbers)
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left")
    axes.set_title(f"steps of {STEP:g} s, {ROWS} rows a replica, one proxy")
    # Without a date and random names, equal results make equal files.
    with matplotlib.rc_context({"svg.hashsalt": "cluster"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    """Measure, and write the figures and their plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    simulated = Simulated(workers=2, cores=4)
    rates: dict[str, list[float]] = {}
    try:
        for number in given.replicas:
            for _ in range(given.rounds):
                rate = throughput(simulated, number, given.seconds)
                rates.setdefault(str(number), []).append(round(rate, 1))
            print(number, rates[str(number)], flush=True)
    finally:
        simulated.close()
    protocol = {"step": STEP, "rows": ROWS, "tokens": TOKENS, "seconds": given.seconds}
    found = {**header("tokens a second by replicas", protocol), "tokens_per_second": rates}
    write(given.out, found)
    plot(found, given.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
