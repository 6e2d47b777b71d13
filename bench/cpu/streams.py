"""Cut off half of many concurrent streams at random, and compare the others with runs alone.

    python -m bench.cpu.streams --streams 500 --out bench/results/streams.json

The server is a separate process with the small checkpoint in float32. Memory is its resident set.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.report import results

ROOT = Path(__file__).resolve().parents[2]


def fields(place: int, tokens: int) -> dict[str, Any]:
    """Return a request with its own seed."""
    prompt = f"{'To create a new table, ' * (1 + place % 7)}{place}"
    return {"prompt": prompt, "max_tokens": tokens, "seed": place, "temperature": 1.0}


async def ask(port: int, place: int, tokens: int, cut: int | None, **more: str) -> str | None:
    """Return the text of a stream, or None if it was cut off after ``cut`` events."""
    body = json.dumps({**fields(place, tokens), **more, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        text, seen, ended = "", 0, False
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise RuntimeError(chunk["error"]["message"])
                text += chunk["choices"][0]["text"]
                seen += 1
            ended |= line.startswith(b"data: [DONE]")
            if cut is not None and seen >= cut:
                return None
        if not ended:
            raise RuntimeError("a stream ended without its mark")
        return text
    finally:
        writer.close()


async def run(port: int, count: int, tokens: int, seed: int) -> dict[str, Any]:
    """Run all streams at once; half are cut off. Raises if an answer differs from the run alone."""
    pick = random.Random(seed)
    cuts = [pick.randint(1, tokens // 2) if place % 2 else None for place in range(count)]
    begin = time.perf_counter()
    found = await asyncio.gather(*(ask(port, i, tokens, cut) for i, cut in enumerate(cuts)))
    seconds = time.perf_counter() - begin
    whole = [place for place, text in enumerate(found) if text is not None]
    different = []
    for place in whole:
        # A salt of its own: nothing of what ran before is used again.
        alone = await ask(port, place, tokens, None, cache_salt=f"alone {seed} {place}")
        if alone != found[place]:
            different.append(place)
    return {
        "seconds": seconds,
        "complete": len(whole),
        "cut": count - len(whole),
        "compared": len(whole),
        "different": different,
    }


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=results.RESULTS / "streams.json")
    given = parser.parse_args()
    protocol = {name: value for name, value in vars(given).items() if name != "out"}
    found = results.header("Concurrent streams, half of them cut off", protocol)
    command = [sys.executable, "-m", "lfm2_fast", "serve", "lfm2_fast/tiny", "--port", "0"]
    command += ["--device", "cpu", "--dtype", "float32", "--max-queue", str(given.streams)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=quiet, text=True
    ) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().strip().rpartition(":")[2])
            rounds = []
            for seed in range(given.rounds):
                made = asyncio.run(run(port, given.streams, given.tokens, seed))
                made["resident MB"] = round(resident(process.pid) / 1e6, 1)
                rounds.append(made)
                print(json.dumps(made), flush=True)
            found["rounds"] = rounds
            results.write(given.out, found)
            if any(made["different"] for made in rounds):
                raise SystemExit("an answer was not the one that its request has alone")
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
