"""Time this package beside Hugging Face and llama.cpp on a CPU: what ``make bench`` runs.

    python -m bench.cpu.peers [--size 350M]

All engines run one checkpoint of random weights, in turns A B C ... C B A, each in a process of its
own. Before it is timed, an engine's logits are compared with the reference in float32. An engine
with wrong logits is not timed. llama.cpp's programs are those that ``make peers`` builds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.cpu.gguf_file import KINDS
from bench.cpu.llama_bench import PREFIX, LlamaBench
from bench.cpu.llama_build import program
from bench.cpu.references import Reference, reference
from bench.gate import PROMPT, STEPS, distance
from bench.report import results
from bench.report.goals import goal_table, verdicts
from bench.report.results import Figure
from bench.report.tables import figure_table, memory_table
from bench.shapes import SIZES, checkpoint
from bench.worker import ENGINES, ROOT, EngineError, Remote
from lfm2_fast.cli.machine_load import Neighbours, memory, memory_speed

Engine = Remote | LlamaBench
# Q4_K_M is compared with the same file, by ``beside_llama``.
NAMES = (*ENGINES, *(PREFIX + kind for kind in KINDS if kind != "Q4_K_M"))


@dataclass(frozen=True)
class Opened:
    """Seconds and bytes that an engine needed to load a checkpoint."""

    logits: np.ndarray
    seconds: float
    resident: float
    peak: float


@dataclass(frozen=True)
class Workload:
    """``steps`` tokens after ``context``, in each of ``batch`` sequences; without steps the prompt.

    ``fresh`` cases start over every turn. Others continue from the end of the last turn.
    """

    batch: int
    context: int
    steps: int
    fresh: bool = True


CASES = {
    "decode": Workload(1, 64, 32),
    "prefill 512": Workload(1, 512, 0),
    "decode, batch 8": Workload(8, 64, 8),
    "decode after 8k": Workload(1, 8192, 16, fresh=False),
}
# Compiling takes a minute for each case, and only changes single steps.
COMPILED_CASES = ("decode",)


def why_not(engine: Engine, name: str) -> str | None:
    """Return why an engine does not run the case of that name, or None."""
    if engine.name == "transformers compiled" and name not in COMPILED_CASES:
        return "compiling takes a minute for each case"
    if isinstance(engine, LlamaBench) and CASES[name].batch > 1:
        return "llama-bench runs one sequence"
    return None


def turn(engine: Engine, case: Workload, room: int) -> float:
    """Return tokens a second in one turn."""
    if isinstance(engine, LlamaBench):
        return engine.rate(case.context, case.steps)
    if case.fresh:
        seconds = engine.ask("start", batch=case.batch, context=case.context, room=room)
        if not case.steps:
            return case.batch * case.context / seconds
    times = engine.ask("decode", steps=case.steps)
    return case.batch * len(times) / sum(times)


def interleave(
    engines: Sequence[Engine], name: str, rounds: int, tell: Callable[[str], None]
) -> list[Figure]:
    """Run the case of that name on all engines, in turns, after one turn each that does not count.

    ``tell`` gets a line before every round, with an estimate of what is left. Raises EngineError.
    """
    case = CASES[name]
    room = (1 if case.fresh else rounds + 2) * (case.steps + 1)
    samples: dict[str, list[float]] = {engine.name: [] for engine in engines}
    tell(f"{name}: a turn each that does not count")
    for engine in engines:
        if not case.fresh and isinstance(engine, Remote):
            engine.ask("start", batch=case.batch, context=case.context, room=room)
    begin = time.monotonic()
    for engine in engines:
        turn(engine, case, room)
    for i in range(rounds):
        left = (rounds - i) * (time.monotonic() - begin) / (i + 1)
        tell(f"{name}: round {i + 1} of {rounds}, about {left:.0f} s left of this case")
        for engine in engines if i % 2 else list(reversed(engines)):
            samples[engine.name].append(turn(engine, case, room))
    return [Figure(name, engine, "tokens/s", found) for engine, found in samples.items()]


def measure(
    engines: list[Engine], name: str, rounds: int, skipped: dict[str, str], tell: Any
) -> list[Figure]:
    """``interleave`` the engines that run here. If one fails, the others start over without it."""
    while True:
        able = []
        for engine in engines:
            if why := why_not(engine, name):
                skipped[f"{engine.name}, {name}"] = why
            else:
                able.append(engine)
        try:
            return interleave(able, name, rounds, tell)
        except EngineError as error:
            skipped[f"{error.engine}, from {name} on"] = str(error)
            tell(f"left out from here on: {error.engine}: {error}")
            (failed,) = (engine for engine in engines if engine.name == error.engine)
            engines.remove(failed)
            failed.close()


def import_seconds(rounds: int) -> Figure:
    """Return the time that importing all public names adds to importing torch."""
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


def open_remote(name: str, folder: Path, threads: int) -> tuple[Remote, Opened]:
    """Load an engine in its own process, and run the gate's prompt."""
    engine = Remote(name)
    try:
        empty = memory(pid=engine.process.pid).get("resident", 0)
        seconds = engine.ask("load", folder=str(folder), threads=threads)
        logits = engine.logits(PROMPT, STEPS)
    except EngineError:
        engine.close()
        raise
    held = memory(pid=engine.process.pid)
    return engine, Opened(logits, seconds, held["resident"] - empty, held["peak"])


def open_llama(
    kind: str, folder: Path, threads: int, programs: Path, size: int
) -> tuple[LlamaBench, Opened]:
    """Make llama.cpp's file of a kind, and run the gate's prompt in its server.

    ``size`` is the vocabulary's.
    """
    engine = LlamaBench(programs, kind, folder, threads)
    logits, seconds, held = engine.inspect(size)
    return engine, Opened(logits, seconds, held["resident"], held["peak"])


def open_engines(
    names: Sequence[str], folder: Path, threads: int, programs: Path, right: Reference
) -> tuple[list[Engine], list[Figure], dict[str, str]]:
    """Open the engines. Return the correct ones, their load times, and the reasons for the others.

    ``programs`` is the folder of llama.cpp's.
    """
    engines: list[Engine] = []
    figures, skipped = [], {}
    for name in names:
        engine: Engine
        held = right.centred() if name.startswith(PREFIX) else right
        try:
            if name.startswith(PREFIX):
                kind, size = name.removeprefix(PREFIX), right.exact.shape[-1]
                engine, found = open_llama(kind, folder, threads, programs, size)
            else:
                engine, found = open_remote(name, folder, threads)
        except EngineError as error:
            wrong: str | None = str(error)
        else:
            wrong = held.wrong(name, found.logits)
            if wrong:
                engine.close()
        if wrong:
            skipped[name] = wrong
            print(f"left out: {name}: {wrong}", flush=True)
            continue
        engines.append(engine)
        figures.append(Figure("load", name, "s", [found.seconds]))
        figures.append(Figure("memory after load", name, "bytes", [found.resident]))
        figures.append(Figure("peak memory", name, "bytes", [found.peak]))
        figures.append(Figure("logits", name, "error", [distance(found.logits, held.exact)]))
        print(f"{name}: right, loaded in {found.seconds:.1f} s", flush=True)
    return engines, figures, skipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="350M", choices=SIZES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--engines", help="names with commas; default: all", default="")
    parser.add_argument("--cases", help="numbers from 1, with commas; default: all", default="")
    parser.add_argument(
        "--llama", type=Path, default=program(""), help="the folder of llama.cpp's programs"
    )
    parser.add_argument("--out", type=Path, help="default: bench/results/cpu-SIZE.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    names = given.engines.split(",") if given.engines else list(NAMES)
    every = list(CASES)
    wanted = [every[int(n) - 1] for n in given.cases.split(",")] if given.cases else every
    folder = checkpoint(given.size)
    print(f"{given.size}'s shape, {given.threads} threads, {given.rounds} rounds", flush=True)
    print("engines load, and their logits are compared with the reference's", flush=True)
    right = reference(folder, given.threads)
    engines, figures, skipped = open_engines(names, folder, given.threads, given.llama, right)
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
            "sample": "tokens a second of one turn, choice of the most likely token included",
            "cases": {name: vars(CASES[name]) for name in wanted},
            "memory": "resident after loading and a few tokens, less what was before loading; "
            "of llama.cpp all of its server's",
            "gate": "logits of a prompt and of steps after it against float32",
        },
    )
    found["skipped"] = skipped
    out = given.out or results.RESULTS / f"cpu-{given.size}.json"
    remotes = [engine for engine in engines if isinstance(engine, Remote)]
    others = Neighbours(own=[engine.process.pid for engine in remotes])
    for place, name in enumerate(wanted):

        def tell(text: str, place: int = place) -> None:
            print(f"[{place + 1} of {len(wanted)}] {text}", flush=True)

        figures += measure(engines, name, given.rounds, skipped, tell)
        print(f"\n{figure_table(figures, [name])}\n", flush=True)
        found["versions"] |= {key: value for e in engines for key, value in e.versions.items()}
        found |= {"others": others.seen(), "figures": results.as_json(figures)}
        results.write(out, found)
    for engine in engines:
        engine.close()
    print(f"\n{goal_table(verdicts(figures))}\n\n{memory_table(figures)}")
    print(f"\nwritten: {out}; meanwhile: {found['others']}")


if __name__ == "__main__":
    main()
