"""Time the engine under many requests on a CPU, beside llama.cpp's server and another checkout.

    python -m bench.cpu.serving --size 350M --quantization int8 --requests 32 --before ../before

``llama-server`` reads the same weights in BF16, or in Q8_0 beside int8; ``make peers`` builds it.
Its figures are the output tokens a second of many requests at once, and the time to a first token
with a cached beginning over that without. It also measures how long rows wait for a token while a
long prompt runs, and a step's cost beside the model. Weights are random, so texts mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

import lfm2_fast
from bench.cpu.engines import prompt
from bench.cpu.gguf_file import gguf_file
from bench.cpu.llama_build import program
from bench.cpu.llama_server import LlamaServer
from bench.cpu.references import reference
from bench.gate import PROMPT, STEPS
from bench.report import results
from bench.report.goals import judged
from bench.report.stats import ratio
from bench.shapes import SIZES, checkpoint
from bench.worker import EngineError
from lfm2_fast.cli.machine_load import Neighbours, quantile

# What the other checkout runs: its own generate, as many rows at a time as are given.
BEFORE = """
import json, sys, time, torch, lfm2_fast
folder, threads, rows = sys.argv[1], *map(int, sys.argv[2:4])
prompts, new = json.loads(sys.argv[4])
torch.set_num_threads(threads)
model = lfm2_fast.load(folder, device="cpu", **json.loads(sys.argv[5]))
options = dict(do_sample=False, eos_token_id=[], max_batch_size=rows)
model.generate(prompts[:2], max_new_tokens=4, **options)
begin = time.perf_counter()
model.generate(prompts, max_new_tokens=new, **options)
print(json.dumps(time.perf_counter() - begin))
"""

# Rows that the engine, the other checkout and the server run at once.
ROWS = 16
# The engine's int8 over the server's Q8_0, in output tokens a second.
Q8_0, MUST, AIM = "llama-server Q8_0", 2.4, 3.0
FIGURES = ("own", "first", "rates", "waits")


def drain(engine: lfm2_fast.Engine) -> list[float]:
    """Step until every request has ended, and return the seconds of each step."""
    times = []
    while engine.busy:
        begin = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begin)
    return times


def together(model: Any, prompts: list[list[int]], new: int, rows: int) -> float:
    """Return the seconds until many requests at once have all ended."""
    engine = lfm2_fast.Engine(model, max_rows=rows)
    for ids in prompts:
        engine.add(lfm2_fast.Request(ids, max_tokens=new))
    return sum(drain(engine))


def before(root: Path, folder: Path, threads: int, rows: int, given: str, options: str) -> float:
    """Return the seconds of the other checkout's ``generate`` for the same prompts."""
    python = str(root / ".venv" / "bin" / "python")
    call = [python, "-c", BEFORE, str(folder), str(threads), str(rows), given, options]
    done = subprocess.run(call, capture_output=True, text=True, check=True, cwd=root)
    return float(json.loads(done.stdout))


def llama_server(path: Path, folder: Path, threads: int, length: int, kind: str) -> LlamaServer:
    """Start ``llama-server`` on the checkpoint's file of a kind, with room for ``ROWS`` requests.

    Raises EngineError if its logits are not the reference's.
    """
    name = f"llama-server {kind}"
    right = reference(folder, threads).centred()
    file = gguf_file(folder, kind, path.with_name("llama-quantize"))
    server = LlamaServer(path, file, threads, ROWS, length, name)
    try:
        logits = server.logits(PROMPT, STEPS, right.exact.shape[-1])
        if wrong := right.wrong(name, logits):
            raise EngineError(wrong, name)
        server.together([PROMPT] * 2, 4)
    except BaseException:
        server.close()
        raise
    return server


def interleave(
    sides: dict[str, Callable[[], float]],
    tokens: int,
    rounds: int,
    tell: Callable[[str, Any], None],
) -> dict[str, list[float]]:
    """Return output tokens a second of every side, in turns, with a line after each round."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds):
        for name in sides if i % 2 == 0 else reversed(sides):
            rates[name].append(tokens / sides[name]())
        tell("output tokens/s", rates)
    return rates


def verdict(ours: list[float], theirs: list[float], name: str) -> dict[str, Any]:
    """Return the ratio of medians with its interval and, beside Q8_0, the reached goal."""
    found = ratio(ours, theirs, paired=True)
    if name != Q8_0:
        return dict(zip(("value", "low", "high"), found, strict=True))
    return asdict(judged(f"requests at once against {name}", MUST, AIM, found, more_is_better=True))


def first_token(model: Any, length: int, cached: int, rounds: int) -> dict[str, list[float]]:
    """Return seconds to a first token, with ``cached`` tokens known or not, in turns."""
    found: dict[str, list[float]] = {"hit": [], "miss": []}
    engine = lfm2_fast.Engine(model, max_rows=1)
    stem = prompt(0, cached)
    engine.add(lfm2_fast.Request([*stem, 5], max_tokens=1))
    drain(engine)
    for turn in range(rounds):
        rest = prompt(100 + turn, length - cached)
        for kind, ids in (("hit", stem + rest), ("miss", prompt(50 + turn, cached) + rest)):
            engine.add(lfm2_fast.Request(ids, max_tokens=1))
            found[kind].append(sum(drain(engine)))
    return found


def waits(model: Any, rows: int, length: int) -> dict[str, Any]:
    """Return the seconds that rows wait for a token while a prompt of ``length`` runs."""
    engine = lfm2_fast.Engine(model, max_rows=rows + 1)
    for row in range(rows):
        engine.add(lfm2_fast.Request(prompt(row, 64), max_tokens=engine.max_length - 64))
    for _ in range(20):
        engine.step()
    engine.add(lfm2_fast.Request(prompt(99, length), max_tokens=1))
    times = []
    while engine.scheduler.waiting or engine.scheduler.prefilling:
        begin = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begin)
    engine.reset()
    return {
        "steps": len(times),
        "seconds": [round(each, 4) for each in times],
        "median": median(times),
        "p99": quantile(times, 0.99),
        "longest": max(times),
        "longest over median": max(times) / median(times),
    }


def own_time(model: Any, rows: int, steps: int) -> dict[str, float]:
    """Return the engine's share of a step of ``rows``, without the model's run and the choice."""
    engine = lfm2_fast.Engine(model, max_rows=rows)
    for row in range(rows):
        engine.add(lfm2_fast.Request(prompt(row, 16), max_tokens=steps + 30))
    while engine.scheduler.waiting or engine.scheduler.prefilling:
        engine.step()
    inside: list[float] = []
    run_steps = engine.decode.buffers.run_steps

    def timed(*args: Any, **kwargs: Any) -> None:
        begin = time.perf_counter()
        run_steps(*args, **kwargs)
        inside.append(time.perf_counter() - begin)

    engine.decode.buffers.run_steps = timed  # type: ignore[method-assign]
    whole = []
    for _ in range(steps):
        begin = time.perf_counter()
        engine.step()
        whole.append(time.perf_counter() - begin)
    own = [a - b for a, b in zip(whole, inside, strict=True)]
    engine.reset()
    return {"step": median(whole), "own": median(own), "share": median(own) / median(whole)}


def arguments() -> argparse.Namespace:
    """Return the command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="350M", choices=(*SIZES, "tiny"))
    parser.add_argument(
        "--before", type=Path, help="another checkout, with an environment in .venv"
    )
    parser.add_argument(
        "--llama-server", type=Path, help="default: the one that `make peers` built"
    )
    parser.add_argument("--quantization", choices=("int8",))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens of each request")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--long", type=int, default=16_000, help="tokens of the long prompt")
    parser.add_argument("--figures", nargs="+", default=FIGURES, choices=FIGURES)
    parser.add_argument("--out", type=Path, help="default: bench/results/serving-SIZE.json")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    folder = checkpoint(given.size).resolve()
    options = {"quantization": given.quantization} if given.quantization else {}
    model = lfm2_fast.load(folder, device="cpu", **options)
    paths = ("out", "before", "llama_server")
    protocol = {name: value for name, value in vars(given).items() if name not in paths}
    found = results.header(f"LFM2-{given.size}'s shape on a CPU, many requests", protocol)
    prompts = [prompt(row, given.prompt) for row in range(given.requests)]
    new = given.new
    sides = {"engine": lambda: together(model, prompts, new, ROWS)}
    if given.before is not None:
        root, texts = given.before.resolve(), (json.dumps([prompts, new]), json.dumps(options))
        sides["before"] = lambda: before(root, folder, given.threads, ROWS, *texts)
    path = given.llama_server or program("llama-server")
    with ExitStack() as stack:
        own = []
        beside = "rates" in given.figures
        if beside and given.llama_server is None and not path.is_file():
            print("llama-server is left out: `make peers` builds it", flush=True)
        elif beside:
            kind, length = "Q8_0" if given.quantization else "BF16", given.prompt + new
            server = stack.enter_context(llama_server(path, folder, given.threads, length, kind))
            sides[server.name] = lambda: server.together(prompts, new)
            own.append(server.process.pid)
        others = Neighbours(own)

        def tell(name: str, value: Any) -> None:
            print(name, json.dumps(value), flush=True)
            found[name] = value
            found["others"] = others.seen()
            suffix = f"-{given.quantization}" if given.quantization else ""
            out = given.out or results.RESULTS / f"serving-{given.size}{suffix}.json"
            results.write(out, found)

        if "own" in given.figures:
            tell("own time, 64 rows", own_time(model, 64, 40))
        if "first" in given.figures:
            times = first_token(model, 1088, 1024, given.rounds + 3)
            hit, miss = median(times["hit"]), median(times["miss"])
            tell("first token", {**times, "hit over miss": hit / miss})
        if "rates" in given.figures:
            rates = interleave(sides, given.requests * new, given.rounds, tell)
            for name in rates:
                if name.startswith("llama-server"):
                    tell(f"engine over {name}", verdict(rates["engine"], rates[name], name))
        if "waits" in given.figures:
            tell("waits", waits(model, 8, given.long))


if __name__ == "__main__":
    main()
