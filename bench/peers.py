"""Time this package beside Hugging Face and llama.cpp on a CPU: what ``make bench`` runs.

    python -m bench.peers [--size 350M]

All engines run one checkpoint of random weights, in turns A B C ... C B A, each in a process of its
own. Before anything is timed an engine's logits are held against the reference in float32: what
computes something else is not timed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import results
from bench.gate import PROMPT, ROUNDED, STEPS, distance, wrong_logits
from bench.goals import goal_table, verdicts
from bench.report import figure_table, memory_table
from bench.results import Figure
from bench.shapes import SIZES, checkpoint
from bench.worker import ENGINES, ROOT, EngineError, Remote
from lfm2_fast.measure import Neighbours, memory, memory_speed

# What 8 and 4 bits cost, by the last word of an engine's name; see ``gate.ROUNDED``.
# Random weights suffer more than trained ones; logits of another model are off by 1.4.
ALLOWED = {"Q4_0": 0.9, "Q8_0": 0.2, "int8": 0.2}


@dataclass(frozen=True)
class Case:
    """``steps`` tokens after ``context``, in each of ``batch`` sequences; no steps: the prompt.

    ``fresh`` cases start anew every turn; others go on from where the last turn ended.
    """

    batch: int
    context: int
    steps: int
    fresh: bool = True


CASES = {
    "decode": Case(1, 64, 32),
    "prefill 512": Case(1, 512, 0),
    "decode, batch 8": Case(8, 64, 8),
    "decode after 8k": Case(1, 8192, 16, fresh=False),
}
# Compiling takes a minute for each case, and changes none but single steps.
COMPILED_CASES = ("decode",)


def turn(engine: Remote, case: Case, room: int) -> float:
    """Tokens a second in one turn."""
    if case.fresh:
        seconds = engine.ask("start", batch=case.batch, context=case.context, room=room)
        if not case.steps:
            return case.batch * case.context / seconds
    times = engine.ask("decode", steps=case.steps)
    return case.batch * len(times) / sum(times)


def interleave(engines: Sequence[Remote], name: str, rounds: int) -> list[Figure]:
    """The case of that name on all engines, in turns, after one turn each that does not count."""
    case = CASES[name]
    room = (1 if case.fresh else rounds + 2) * (case.steps + 1)
    samples: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for engine in engines:
        if not case.fresh:
            engine.ask("start", batch=case.batch, context=case.context, room=room)
        turn(engine, case, room)
    for i in range(rounds):
        for engine in engines if i % 2 else list(reversed(engines)):
            samples[engine.name].append(turn(engine, case, room))
    return [Figure(name, engine, "tokens/s", found) for engine, found in samples.items()]


def import_seconds(rounds: int) -> Figure:
    """What importing all public names of the package adds to importing torch."""
    code = (
        "import time, torch; begin = time.perf_counter(); from lfm2_fast import *; "
        "print(time.perf_counter() - begin)"
    )
    command = [sys.executable, "-c", code]
    times = [
        float(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
        for _ in range(rounds + 1)
    ]
    return Figure("import", "lfm2_fast", "s", times[1:])


def open_engines(
    names: Sequence[str], folder: Path, threads: int, llama_python: str | None
) -> tuple[list[Remote], list[Figure], dict[str, str]]:
    """The engines that run here and are right, their load times, and why others are left out."""
    reference = Remote("reference")
    reference.ask("load", folder=str(folder), threads=threads)
    exact = reference.logits(PROMPT, STEPS)
    reference.close()
    engines, figures, skipped = [], [], {}
    for name in names:
        python = llama_python if name.startswith("llama.cpp") else None
        try:
            engine = Remote(name, python)
            engine.ask("prepare", folder=str(folder))
            empty = memory(pid=engine.process.pid).get("resident", 0)
            seconds = engine.ask("load", folder=str(folder), threads=threads)
            allowed = ALLOWED.get(name.split()[-1], ROUNDED)
            logits = engine.logits(PROMPT, STEPS)
            wrong = wrong_logits(logits, exact, allowed)
        except EngineError as error:
            wrong = str(error)
        if wrong:
            skipped[name] = wrong
            print(f"left out: {name}: {wrong}", flush=True)
            continue
        engines.append(engine)
        held = memory(pid=engine.process.pid)
        figures.append(Figure("load", name, "s", [seconds]))
        figures.append(Figure("memory after load", name, "bytes", [held["resident"] - empty]))
        figures.append(Figure("peak memory", name, "bytes", [held["peak"]]))
        figures.append(Figure("logits", name, "error", [distance(logits, exact)]))
        print(f"{name}: right, loaded in {seconds:.1f} s", flush=True)
    return engines, figures, skipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="350M", choices=SIZES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--engines", help="names with commas; default: all", default="")
    parser.add_argument("--cases", help="numbers from 1, with commas; default: all", default="")
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--out", type=Path, help="default: bench/results/cpu-SIZE.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    names = given.engines.split(",") if given.engines else [n for n in ENGINES if n != "reference"]
    every = list(CASES)
    wanted = [every[int(n) - 1] for n in given.cases.split(",")] if given.cases else every
    folder = checkpoint(given.size)
    print(f"{given.size}'s shape, {given.threads} threads, {given.rounds} rounds", flush=True)
    engines, figures, skipped = open_engines(names, folder, given.threads, given.llama_python)
    figures.append(import_seconds(5))
    speed = memory_speed(torch.device("cpu"))
    figures += [Figure(name, "machine", "bytes/s", [value]) for name, value in speed.items()]
    found = results.header(
        f"LFM2-{given.size}'s shape with random weights on a CPU, beside other engines",
        {
            "size": given.size,
            "threads": given.threads,
            "rounds": given.rounds,
            "order": "engines in turns, back and forth; one turn each before that does not count",
            "sample": "tokens a second of one turn, choice of the likeliest token included",
            "cases": {name: vars(CASES[name]) for name in wanted},
            "memory": "resident after loading and a few tokens, less what was before loading",
            "gate": "logits of a prompt and of steps after it against float32",
        },
    )
    found["versions"] |= {key: value for e in engines for key, value in e.versions.items()}
    found["skipped"] = skipped
    out = given.out or results.RESULTS / f"cpu-{given.size}.json"
    others = Neighbours(own=[engine.process.pid for engine in engines])
    for name in wanted:
        able = [e for e in engines if e.name != "transformers compiled" or name in COMPILED_CASES]
        figures += interleave(able, name, given.rounds)
        print(f"\n{figure_table(figures, [name])}", flush=True)
        found |= {"others": others.seen(), "figures": results.as_json(figures)}
        results.write(out, found)
    for engine in engines:
        engine.close()
    print(f"\n{goal_table(verdicts(figures))}\n\n{memory_table(figures)}")
    print(f"\nwritten: {out}; meanwhile: {found['others']}")


if __name__ == "__main__":
    main()
