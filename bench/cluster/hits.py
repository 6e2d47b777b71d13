"""Prefix hits of conversations on four replicas: routing by prefix, and Ray Serve's own choice.

    python -m bench.cluster.hits --out bench/results/cluster-hits.json

Conversations of several turns run at once, all with one system prompt. Each turn's prompt has the
turns before it. A hit is a token of a prompt that did not run again, as the answers say.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from pathlib import Path
from typing import Any

import aiohttp

from bench.cluster.simulated import Simulated
from bench.report.results import header, write
from lfm2_fast.cluster.scale import Scale

WORDS = "index table row column query value file class method error test list".split()
STEP, ROWS = 0.03, 4


async def conversations(url: str, users: int, turns: int, seed: int) -> dict[str, float]:
    """Return the tokens of prompts, those found in a cache, and the longest wait for one token."""
    counts: dict[str, float] = {"prompt": 0, "cached": 0, "requests": 0}
    draw = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(count))

    system = words(60)
    begin = time.monotonic()

    async def user(session: Any) -> None:
        messages = [{"role": "system", "content": system}]
        for _ in range(turns):
            messages.append({"role": "user", "content": words(40)})
            body = {"messages": messages, "max_tokens": 12, "temperature": 0}
            async with session.post(f"{url}/v1/chat/completions", json=body) as response:
                response.raise_for_status()
                answer = await response.json()
            counts["requests"] += 1
            counts["prompt"] += answer["usage"]["prompt_tokens"]
            counts["cached"] += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            messages.append(answer["choices"][0]["message"])

    timeout = aiohttp.ClientTimeout(total=200)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        await asyncio.gather(*(user(session) for _ in range(users)))
    counts["seconds"] = round(time.monotonic() - begin, 2)
    counts["hit_rate"] = round(counts["cached"] / counts["prompt"], 3)
    return counts


def measured(simulated: Simulated, by_prefix: bool, users: int, turns: int) -> dict[str, float]:
    """Deploy four replicas with empty caches, and run conversations."""
    scale = Scale(replicas=4, cpus_per_replica=1, prefix_routing=by_prefix)
    simulated.remove()
    simulated.run(STEP, scale=scale, max_rows=ROWS)
    return asyncio.run(conversations(simulated.urls[0], users, turns, seed=int(by_prefix)))


def main() -> None:
    """Measure both, and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    simulated = Simulated(workers=2, cores=4)
    protocol = {"users": given.users, "turns": given.turns, "step": STEP, "rows": ROWS}
    found: dict[str, Any] = header("prefix hits of four replicas", protocol)
    try:
        for name, by_prefix in (("prefix", True), ("two random replicas", False)):
            found[name] = measured(simulated, by_prefix, given.users, given.turns)
            print(name, found[name], flush=True)
    finally:
        simulated.close()
    write(given.out, found)


if __name__ == "__main__":
    main()
