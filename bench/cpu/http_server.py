"""Time ``lfm2-fast serve`` over HTTP, beside llama.cpp's server of the same weights.

    python -m bench.cpu.http_server --size 350M --quantization int8 --rounds 3

One client asks both over ``/v1/completions``, in turns. Figures: output tokens a second of requests
that come all at once, their times to a first token, one client's time between tokens, and the first
token of a second turn and of an edit in the middle. ``--cost`` runs our side alone: what HTTP and a
JSON schema add to a step. ``make peers`` builds llama.cpp.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch

import lfm2_fast
from bench.cpu.engines import prompt
from bench.cpu.llama_build import program
from bench.cpu.serving import ROWS, drain, llama_server
from bench.report import results
from bench.shapes import SIZES, TINY, checkpoint
from lfm2_fast.cli.machine_load import Neighbours, quantile

HOST = "127.0.0.1"
SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 10_000}


def with_tokenizer(folder: Path) -> Path:
    """A folder of the same checkpoint with a tokenizer, which random weights lack.

    It is the small checkpoint's, and every id beyond it has a text of its own, as a stream's event
    needs one.
    """
    if (folder / "tokenizer.json").is_file():
        return folder
    from transformers import AutoTokenizer

    made = folder.with_name(f"{folder.name}-with-tokenizer")
    if not (made / "tokenizer.json").is_file():
        made.mkdir(exist_ok=True)
        for file in folder.iterdir():
            (made / file.name).unlink(missing_ok=True)
            (made / file.name).symlink_to(file)
        size = json.loads((folder / "config.json").read_text())["vocab_size"]
        tokenizer = AutoTokenizer.from_pretrained(TINY)
        tokenizer.add_tokens([f"<{place}>" for place in range(len(tokenizer), size)])
        tokenizer.save_pretrained(made)
    return made


async def stream(port: int, ids: list[int], new: int, more: dict[str, Any]) -> list[float]:
    """Seconds from the request to each event that has text."""
    fields = {"prompt": ids, "max_tokens": new, "ignore_eos": True, "temperature": 0}
    body = json.dumps({**fields, "stream": True, **more}).encode()
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        begin = time.perf_counter()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        times: list[float] = []
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                told = json.loads(line[6:])
                if "error" in told:
                    raise RuntimeError(told["error"]["message"])
                # An event without text may stand for a token whose character is not whole.
                times.append(time.perf_counter() - begin)
            elif line.startswith(b"data: [DONE]"):
                return times
        raise RuntimeError("a stream ended without its mark")
    finally:
        writer.close()


async def together(
    port: int, prompts: list[list[int]], new: int, more: dict[str, Any]
) -> tuple[float, list[float]]:
    """Seconds until all have ended, and the time to each one's first token."""
    begin = time.perf_counter()
    found = await asyncio.gather(*(stream(port, ids, new, more) for ids in prompts))
    return time.perf_counter() - begin, [times[0] for times in found]


def ours(folder: Path, options: list[str]) -> tuple[subprocess.Popen[str], int]:
    """Start our server; its process and port."""
    command = [sys.executable, "-m", "lfm2_fast", "serve", str(folder), "--port", "0"]
    command += ["--device", "cpu", "--max-rows", str(ROWS), "--preset", "greedy", *options]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("our server did not start")
    return process, int(line.strip().rpartition(":")[2])


def figures(port: int, given: argparse.Namespace, turn: int) -> dict[str, Any]:
    """All figures of one server in one round; every round's prompts are new."""
    prompts = [prompt(1000 * turn + row, given.prompt) for row in range(given.requests)]
    seconds, first = asyncio.run(together(port, prompts, given.new, {}))
    alone = asyncio.run(stream(port, prompt(1000 * turn + 900, 64), given.new, {}))
    long = prompt(1000 * turn + 901, given.turn)
    asyncio.run(stream(port, long, 1, {}))
    again = asyncio.run(stream(port, [*long, *prompt(902, 64)], 1, {}))
    edited = [*long[: given.turn // 2], *prompt(903, 64), *long[given.turn // 2 + 64 :]]
    edit = asyncio.run(stream(port, edited, 1, {}))
    return {
        "output tokens/s": given.requests * given.new / seconds,
        "first token p50": median(first),
        "first token p99": quantile(first, 0.99),
        "between tokens": (alone[-1] - alone[0]) / (given.new - 1),
        "second turn": again[0],
        "edit": edit[0],
    }


def cost(folder: Path, given: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """Time a token takes at ROWS streams over HTTP and without, with a schema and without."""
    torch.set_num_threads(given.threads)
    model = lfm2_fast.load(folder, device="cpu", **options)
    prompts = [prompt(row, 64) for row in range(ROWS)]
    found: dict[str, list[float]] = {"engine": [], "http": [], "schema off": [], "schema on": []}
    server = lfm2_fast.serve(model, port=0, background=True, max_rows=ROWS, preset="greedy")
    assert server is not None
    port = int(server.url.rpartition(":")[2])
    engine = lfm2_fast.Engine(model, max_rows=ROWS)
    schema = {"guided_json": SCHEMA}
    for _ in range(given.rounds):
        for ids in prompts:
            engine.add(lfm2_fast.Request(ids, max_tokens=given.new, stream=True))
        found["engine"].append(sum(drain(engine)))
        engine.clear_prefix_cache()
        # A salt of its own keeps every round's prompts uncached.
        salt = {"cache_salt": str(time.time())}
        found["http"].append(asyncio.run(together(port, prompts, given.new, salt))[0])
        for name, more in (("schema off", {}), ("schema on", schema)):
            times = asyncio.run(stream(port, prompts[0], given.new, more))
            found[name].append((times[-1] - times[0]) / (len(times) - 1))
    server.close()
    middle = {name: median(values) for name, values in found.items()}
    return {
        **found,
        "http over engine": middle["http"] / middle["engine"],
        "schema on over off": middle["schema on"] / middle["schema off"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="350M", choices=(*SIZES, "tiny"))
    parser.add_argument("--quantization")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens of each request")
    parser.add_argument("--turn", type=int, default=4000, help="tokens of the conversation")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cost", action="store_true", help="our own cost alone")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    folder = checkpoint(given.size).resolve()
    options = {"quantization": given.quantization} if given.quantization else {}
    protocol = {name: value for name, value in vars(given).items() if name != "out"}
    found = results.header(f"LFM2-{given.size}'s shape over HTTP on a CPU", protocol)
    kind = {"int8": "Q8_0", "int4": "Q4_0"}.get(given.quantization or "", "BF16")
    name = f"{'http-cost' if given.cost else 'http'}-{given.size}-{given.quantization or 'plain'}"
    out = given.out or results.RESULTS / f"{name}.json"
    if given.cost:
        others = Neighbours([])
        found |= cost(with_tokenizer(folder), given, options)
        found["others"] = others.seen()
        print(json.dumps(found, indent=1, default=str))
        results.write(out, found)
        return
    with ExitStack() as stack:
        call = [f"--{key}={value}" for key, value in options.items()]
        process, port = ours(with_tokenizer(folder), call)
        stack.callback(process.terminate)
        length = max(given.prompt + given.new, given.turn + 256)
        peer = stack.enter_context(
            llama_server(program("llama-server"), folder, given.threads, length, kind)
        )
        sides = {"lfm2-fast serve": port, peer.name: peer.port}
        others = Neighbours([process.pid, peer.process.pid])
        for turn in range(given.rounds):
            for side in sides if turn % 2 == 0 else reversed(sides):
                made = figures(sides[side], given, turn)
                found.setdefault(side, []).append(made)
                print(side, json.dumps(made), flush=True)
            found["others"] = others.seen()
            results.write(out, found)


if __name__ == "__main__":
    main()
