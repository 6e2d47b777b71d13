"""Time ``lfm2-fast serve`` over HTTP, beside llama.cpp's server of the same weights.

    python -m bench.cpu.http_server client schema --quantization int8 --rounds 2

A call measures rows, and adds their rounds to those that the file has. ``requests`` come all at
once; ``client`` is alone; ``conversation`` has a second turn, and an edit in its middle. These ask
both servers, in turns. ``cost`` is the time that HTTP adds to the engine, ``schema`` the time that
a JSON schema adds. ``gate`` compares the peer's logits with the reference, once. ``make peers``
builds llama.cpp.
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
from bench.cpu.gguf_file import gguf_file
from bench.cpu.llama_build import program
from bench.cpu.llama_server import LlamaServer
from bench.cpu.serving import ROWS, drain, llama_server
from bench.report import results
from bench.shapes import SIZES, TINY, checkpoint
from lfm2_fast.cli.machine_load import Neighbours, quantile

HOST = "127.0.0.1"
# An array that is longer than any stream.
SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 10_000}


def with_tokenizer(folder: Path) -> Path:
    """Return a folder of the same checkpoint with a tokenizer, which random weights lack.

    It is the small checkpoint's. Every further id has its own text, because a stream's event needs
    one.
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
        tokenizer.save_pretrained(made)
        content = json.loads((made / "tokenizer.json").read_text(encoding="utf-8"))
        # In the vocabulary and without merges: as added tokens they take a minute to load.
        words = content["model"]["vocab"]
        words |= {f"<{place}>": place for place in range(len(tokenizer), size)}
        (made / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return made


async def stream(port: int, ids: list[int], new: int, more: dict[str, Any]) -> list[float]:
    """Return the seconds from the request to each event with text."""
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
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise RuntimeError(chunk["error"]["message"])
                # An event without text may be a token with an incomplete character.
                times.append(time.perf_counter() - begin)
            elif line.startswith(b"data: [DONE]"):
                return times
        raise RuntimeError("a stream ended without its mark")
    finally:
        writer.close()


async def together(
    port: int, prompts: list[list[int]], new: int, more: dict[str, Any]
) -> tuple[float, list[float]]:
    """Return the seconds until all have ended, and the time to each one's first token."""
    begin = time.perf_counter()
    found = await asyncio.gather(*(stream(port, ids, new, more) for ids in prompts))
    return time.perf_counter() - begin, [times[0] for times in found]


def ours(folder: Path, options: dict[str, Any], length: int | None) -> tuple[Any, int]:
    """Start our server, and return its process and port."""
    command = [sys.executable, "-m", "lfm2_fast", "serve", str(folder), "--port", "0"]
    command += ["--device", "cpu", "--max-rows", str(ROWS), "--preset", "greedy"]
    command += [f"--{key}={value}" for key, value in options.items()]
    command += [] if length is None else ["--max-model-len", str(length)]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("our server did not start")
    return process, int(line.strip().rpartition(":")[2])


def requests_at_once(port: int, given: argparse.Namespace, turn: int) -> dict[str, float]:
    """Output tokens a second of requests that come all at once, and their first tokens."""
    prompts = [prompt(1000 * turn + row, given.prompt) for row in range(given.requests)]
    seconds, first = asyncio.run(together(port, prompts, given.new, {}))
    return {
        "output tokens/s": given.requests * given.new / seconds,
        "first token p50": median(first),
        "first token p99": quantile(first, 0.99),
    }


def one_client(port: int, given: argparse.Namespace, turn: int) -> dict[str, float]:
    """Seconds between the tokens of one client."""
    times = asyncio.run(stream(port, prompt(1000 * turn + 900, 64), given.new, {}))
    return {"between tokens": (times[-1] - times[0]) / (len(times) - 1)}


def alone(model: Any) -> Any:
    """Return the row of ``one_client``, of an engine in here, without HTTP."""

    def row(port: int, given: argparse.Namespace, turn: int) -> dict[str, float]:
        engine = lfm2_fast.Engine(model, max_rows=1)
        ids = prompt(1000 * turn + 900, 64)
        engine.add(lfm2_fast.Request(ids, max_tokens=given.new, stream=True))
        times = drain(engine)
        engine.close()
        # The first step runs the prompt.
        return {"between tokens": sum(times[1:]) / (len(times) - 1)}

    return row


def conversation(port: int, given: argparse.Namespace, turn: int) -> dict[str, float]:
    """Seconds to the first token of a second turn, and of an edit in the middle of the first."""
    long = prompt(1000 * turn + 901, given.turn)
    asyncio.run(stream(port, long, 1, {}))
    again = asyncio.run(stream(port, [*long, *prompt(902, 64)], 1, {}))
    half = given.turn // 2
    edited = [*long[:half], *prompt(903, 64), *long[half + 64 :]]
    edit = asyncio.run(stream(port, edited, 1, {}))
    return {"second turn": again[0], "edit": edit[0]}


BESIDE = {"requests": requests_at_once, "client": one_client, "conversation": conversation}


def schema(port: int, given: argparse.Namespace, turn: int) -> dict[str, float]:
    """Seconds between the tokens of one client, with a JSON schema and without."""
    found = {}
    sides: dict[str, dict[str, Any]] = {"no schema": {}, "schema": {"guided_json": SCHEMA}}
    for name in sides if turn % 2 == 0 else reversed(sides):
        times = asyncio.run(stream(port, prompt(turn, 64), given.new, sides[name]))
        found[name] = (times[-1] - times[0]) / (len(times) - 1)
    return found


def cost(model: Any) -> Any:
    """Return a row of ROWS streams over HTTP beside the same requests of an engine in here."""

    def row(port: int, given: argparse.Namespace, turn: int) -> dict[str, float]:
        prompts = [prompt(1000 * turn + row, 64) for row in range(ROWS)]

        def direct() -> float:
            engine = lfm2_fast.Engine(model, max_rows=ROWS)
            for ids in prompts:
                engine.add(lfm2_fast.Request(ids, max_tokens=given.new, stream=True))
            seconds = sum(drain(engine))
            engine.close()
            return seconds

        sides = {
            "engine": direct,
            "http": lambda: asyncio.run(together(port, prompts, given.new, {}))[0],
        }
        order = sides if turn % 2 == 0 else reversed(sides)
        return {name: sides[name]() for name in order}

    return row


def gate(file: Path, folder: Path, threads: int, kind: str) -> None:
    """Raise EngineError if llama.cpp's logits of the file are not the reference's."""
    with llama_server(program("llama-server"), folder, threads, 384, kind):
        print(f"the logits of {file.name} are right")


class Rounds:
    """Rounds of every row, kept in a file; ``add`` measures one more of a row, and writes it."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self._path, self._head = path, head
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self._rounds: dict[str, list[Any]] = before.get("rounds", {})

    def add(self, row: str, sides: dict[str, Any], given: argparse.Namespace, pids: Any) -> None:
        """Measure ``sides`` in turns; those that ran one at a time share a round."""
        mine = self._rounds.setdefault(row, [])
        turn = next((i for i, each in enumerate(mine) if not sides.keys() & each), len(mine))
        if turn == len(mine):
            when = {name: self._head[name] for name in ("when", "commit")}
            mine.append({**when, "others": {}})
        others = Neighbours(pids)
        for side in sides if turn % 2 == 0 else reversed(sides):
            port, work = sides[side]
            mine[turn][side] = work(port, given, turn)
        mine[turn]["others"] |= dict.fromkeys(sides, others.seen())
        print(row, json.dumps(mine[turn]), flush=True)
        results.write(self._path, {**self._head, "rounds": self._rounds})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", choices=("gate", *BESIDE, "cost", "schema"))
    parser.add_argument("--size", default="350M", choices=(*SIZES, "tiny"))
    parser.add_argument("--quantization", default="int8", choices=("int8", "int4"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens of each request")
    parser.add_argument("--turn", type=int, default=4000, help="tokens of the conversation")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--side", choices=("ours", "theirs"), help="one of both, for long rows")
    parser.add_argument("--out", type=Path, help="default: bench/results/http-SIZE-KIND.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    folder = checkpoint(given.size).resolve()
    kind = {"int8": "Q8_0", "int4": "Q4_0"}[given.quantization]
    options = {"quantization": given.quantization}
    own = with_tokenizer(folder)
    file = gguf_file(folder, kind, program("llama-quantize"))
    if "gate" in given.rows:
        gate(file, folder, given.threads, kind)
        return
    unsaid = ("out", "rows", "side", "rounds")
    protocol = {name: value for name, value in vars(given).items() if name not in unsaid}
    head = results.header(f"LFM2-{given.size}'s shape over HTTP on a CPU", protocol)
    out = given.out or results.RESULTS / f"http-{given.size}-{given.quantization}.json"
    kept = Rounds(out, head)
    length = given.prompt + given.new
    if "conversation" in given.rows:
        length = max(length, given.turn + 256)
    ports: dict[str, int] = {}
    pids = []
    with ExitStack() as stack:
        if given.side != "theirs":
            process, ports["lfm2-fast serve"] = ours(own, options, length)
            stack.callback(process.terminate)
            pids.append(process.pid)
        if given.side != "ours" and BESIDE.keys() & set(given.rows):
            path, name = program("llama-server"), f"llama-server {kind}"
            peer = stack.enter_context(LlamaServer(path, file, given.threads, ROWS, length, name))
            pids.append(peer.process.pid)
            ports[name] = peer.port
        model = None
        if {"client", "cost"} & set(given.rows):
            model = lfm2_fast.load(folder, device="cpu", **options)
        few = {"requests": 2, "prompt": 16, "new": 4, "turn": 128}
        warm = argparse.Namespace(**{**vars(given), **few})
        for row in given.rows:
            both = ports if row in BESIDE else {name: ports[name] for name in list(ports)[:1]}
            work = {**BESIDE, "schema": schema}.get(row) or cost(model)
            sides = {name: (port, work) for name, port in both.items()}
            if row == "client":
                sides["engine"] = 0, alone(model)
            for port, asked in sides.values():
                asked(port, warm, 999)
            for _ in range(given.rounds):
                kept.add(row, sides, given, pids)


if __name__ == "__main__":
    main()
