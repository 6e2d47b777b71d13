"""Time exports in their own runtimes beside this package, on a CPU.

    python -m bench.cpu.exports CHECKPOINT --export DIR[=ENVIRONMENT] --export ...

Each export runs in its runtime's process, with the runtime's defaults. All engines take turns: a
prompt at once, then decode steps of one row. A sample of decoding is the median of a turn's steps.
An export hands all logits of a token through a pipe, which takes about 0.3 ms of a step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import torch

import lfm2_fast
from bench.cpu.engines import prompt
from bench.report import results
from bench.report.results import Figure
from lfm2_fast.cli.machine_load import Neighbours
from lfm2_fast.engine.model_runner import ModelRunner, new_cache
from lfm2_fast.export.answering import read_record
from lfm2_fast.export.environment import vendor_python
from lfm2_fast.export.runtime import Runtime
from lfm2_fast.export.vendors import VENDORS

OURS: tuple[tuple[str, str | None], ...] = (
    ("lfm2_fast bfloat16", None),
    ("lfm2_fast int8", "int8"),
    ("lfm2_fast int4", "int4"),
)
# Runs a prompt, or one token if there is none.
Run = Callable[[list[int] | None], object]


def ours(folder: Path, quantization: str | None, room: int) -> Run:
    """Return a function that runs this package's model on token ids."""
    model = lfm2_fast.load(folder, device="cpu", dtype="bfloat16", quantization=quantization)
    cache = new_cache(model.network, 1, room)
    runner = ModelRunner(model.network, cache)

    def run(ids: list[int] | None) -> object:
        if ids is not None:
            cache.reset()
            return runner.prefill([ids], [0])
        return runner.step([7], [0])

    return run


@contextmanager
def exported(folder: Path, environment: Path | None, room: int) -> Iterator[tuple[Run, Runtime]]:
    """Give a function that runs an export on token ids, and its runtime."""
    record = read_record(str(folder))
    if record is None:
        raise SystemExit(f"{folder} is not an export: write one with lfm2-fast export")
    vendor = VENDORS[record["runtime"]]
    python = vendor_python(vendor.name, vendor.modules[-1:], environment, print)
    with Runtime(python, vendor.name, folder, context=room) as runtime:

        def run(ids: list[int] | None) -> object:
            return runtime.feed([7] if ids is None else ids, restart=ids is not None)

        yield run, runtime


def turn(run: Run, ids: list[int], steps: int) -> tuple[float, float]:
    """Return tokens a second of the prompt and of the decode steps."""
    begin = time.perf_counter()
    run(ids)
    prefill = len(ids) / (time.perf_counter() - begin)
    found = []
    for _ in range(steps):
        begin = time.perf_counter()
        run(None)
        found.append(time.perf_counter() - begin)
    return prefill, 1 / median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="the one that was exported")
    parser.add_argument("--export", action="append", default=[], help="folder, with environment")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--what", default="a checkpoint")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    room, ids = given.prompt + given.steps + 8, prompt(0, given.prompt)
    with ExitStack() as opened:
        runtimes: list[Runtime] = []
        runs = {name: ours(given.checkpoint, kind, room) for name, kind in OURS}
        for text in given.export:
            folder, _, environment = text.partition("=")
            record = read_record(folder) or {}
            name = f"{record.get('runtime')} {record.get('type')}"
            place = Path(environment) if environment else None
            runs[name], runtime = opened.enter_context(exported(Path(folder), place, room))
            runtimes.append(runtime)
        for run in runs.values():
            turn(run, ids, 3)
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        others = Neighbours([runtime.pid for runtime in runtimes])
        for number in range(given.rounds):
            for name, run in list(runs.items())[:: -1 if number % 2 else 1]:
                rates[name].append(turn(run, ids, given.steps))
    figures = [
        Figure(what, name, "tokens/s", [pair[place] for pair in pairs])
        for place, what in enumerate((f"prefill, {given.prompt} tokens", "decode, 1 row"))
        for name, pairs in rates.items()
    ]
    protocol = {"prompt": given.prompt, "steps": given.steps, "rounds": given.rounds}
    protocol |= {"threads": given.threads, "order": "engines in turns, back and forth"}
    found = results.header(f"{given.what} on a CPU: exports in their runtimes", protocol)
    found["versions"] |= dict(runtime.facts["runtime"].split() for runtime in runtimes)
    found |= {"others": others.seen(), "figures": results.as_json(figures)}
    results.write(given.out, found)
    for figure in figures:
        print(f"{figure.name}: {figure.engine}: {figure.median:.1f} {figure.unit}")
    print(f"written: {given.out}; meanwhile: {found['others']}")


if __name__ == "__main__":
    main()
