"""Measure tilings of the few-token operations on this GPU, and rewrite ``kernels/tuned.py``.

    python -m bench.gpu.tune --seconds 500

It covers every shape of the published sizes, largest first. A tiling is timed as one graph of
launches, over weights that do not all fit into the cache. The graphs take turns. The fastest tiling
takes turns with the rule's own once more, and is kept only if it wins by more than chance and
MARGIN. Tables and timings are written after each shape. A tiling whose result is wrong is not
timed.

``--device cpu --config FILE`` runs the same code in Triton's interpreter, to see that it runs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu.limits import DeviceClock, quantiles, told_by_driver
from bench.gpu.tune_operations import Key, OneTokenRun, keys
from bench.report.results import ROOT, header, made_here, write
from bench.report.stats import ratio
from bench.shapes import SIZES, config_of
from lfm2_fast import Config
from lfm2_fast.kernels import tuned
from lfm2_fast.kernels.tiling import Tiling, chip
from lfm2_fast.ops.select import has_dependent_launch

TABLE = ROOT / "kernels" / "tuned.py"
# Several times the cache of any GPU.
ROTATED = 1 << 28
MOST_COPIES = 64
MARGIN = 0.01
TURNS, CONFIRMED, REPLAYS = 7, 15, 5

Table = dict[str, dict[tuple[str, int, int], tuple[int, int, int, int, int]]]


def replayed(operation: OneTokenRun, tiling: Tiling, pdl: bool) -> Callable[[], None]:
    """Return a function that launches every copy once: on a GPU the replay of a graph."""
    if operation.device.type == "cpu":
        return lambda: operation.launch_all(tiling, False)
    operation.launch_all(tiling, pdl)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        operation.launch_all(tiling, pdl)
    return graph.replay


def in_turns(
    operation: OneTokenRun, runs: dict[Tiling, Callable[[], None]], turns: int
) -> dict[Tiling, list[float]]:
    """Microseconds a launch of each tiling, a sample a turn, back and forth."""
    found: dict[Tiling, list[float]] = {tiling: [] for tiling in runs}
    again = REPLAYS if operation.device.type == "cuda" else 1
    for turn in range(turns):
        for tiling, run in runs.items() if turn % 2 else reversed(list(runs.items())):
            run()
            clock = DeviceClock(operation.device)
            clock.mark()
            for _ in range(again):
                run()
            clock.mark()
            found[tiling].append(clock.microseconds()[0] / again / len(operation.weights))
    return found


def tune(key: Key, dtype: torch.dtype, device: torch.device, pdl: bool) -> dict[str, Any]:
    """Result for a key; ``kept`` is the tiling that beats the rule's, or None."""
    nbytes = key.rows * key.columns * dtype.itemsize
    copies = min(MOST_COPIES, max(2, -(-ROTATED // nbytes))) if device.type == "cuda" else 2
    operation = OneTokenRun(key, dtype, device, copies)
    processors = chip(device)[1] or 1
    runs: dict[Tiling, Callable[[], None]] = {}
    failed = {}
    for tiling in key.candidates(processors, 8 * dtype.itemsize):
        try:
            wrong = operation.wrong(tiling)
            if wrong is None:
                runs[tiling] = replayed(operation, tiling, pdl)
        except Exception as error:  # a tile for which a program has not the room
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        if wrong:
            failed[tiling] = wrong
    rule = key.default(processors, 8 * dtype.itemsize)
    found: dict[str, Any] = {
        "operation": key.operation,
        "N": key.rows,
        "K": key.columns,
        "nbytes": nbytes,
        "rule": fields(rule),
        "kept": None,
        "failed": [{"tiling": fields(tiling), "why": why} for tiling, why in failed.items()],
    }
    if rule not in runs:
        return found
    times = in_turns(operation, runs, TURNS)
    found["us"] = [{"tiling": fields(tiling), **quantiles(us)} for tiling, us in times.items()]
    best = min(times, key=lambda tiling: quantiles(times[tiling])["p50"])
    if best != rule:
        # The best of many samples looks better than it is.
        again = in_turns(operation, {tiling: runs[tiling] for tiling in (best, rule)}, CONFIRMED)
        value, low, high = ratio(again[best], again[rule], paired=True)
        found |= {"best": fields(best), "ratio": value, "interval": [low, high]}
        found["kept"] = fields(best) if high < 1 - MARGIN else None
    return found


def fields(tiling: Tiling) -> list[int]:
    return [tiling.block_n, tiling.block_k, tiling.warps, tiling.programs, tiling.depth]


def table_text(text: str, table: Table) -> str:
    """File's text with its table replaced, in ruff's form."""
    lines = []
    for name in sorted(name for name in table if table[name]):
        lines.append(f'    "{name}": {{')
        for (operation, rows, columns), tiling in sorted(table[name].items()):
            lines.append(f'        ("{operation}", {rows}, {columns}): {tiling},')
        lines.append("    },")
    body = "{\n" + "\n".join(lines) + "\n}" if lines else "{}"
    head, found, _ = text.partition("TUNED: dict[str, Tuned] = ")
    assert found, "the file has no table"
    return f"{head}{found}{body}\n"


def keep(table: Table, name: str, found: dict[str, Any]) -> None:
    """Put the result for a key into the table, in place."""
    key = (found["operation"], found["N"], found["K"])
    table.setdefault(name, {}).pop(key, None)
    if found["kept"]:
        table[name][key] = tuple(found["kept"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--config", type=Path, help="a config.json, instead of the four sizes")
    parser.add_argument(
        "--pdl",
        action=argparse.BooleanOptionalAction,
        help="launch before the predecessor's end; default: as captured steps do there",
    )
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--out", type=Path, help="default: tune-GPU.json in bench/results or $OUT")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; there is nothing to tune")

    if device.type == "cpu" and given.table == TABLE:
        sys.exit("a CPU's timings say nothing: name another --table")

    pdl = given.pdl
    if pdl is None:
        pdl = has_dependent_launch(device)
    begin = time.monotonic()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    configs = [config_of(size) for size in SIZES]
    if given.config:
        configs = [Config.from_file(given.config)]
    name = chip(device)[0]
    out = given.out or made_here() / f"tune-{re.sub(r'[^a-z0-9]+', '-', name.lower())}.json"
    table: Table = {gpu: dict(entry) for gpu, entry in tuned.TUNED.items()}
    protocol = {
        "dtype": str(dtype).removeprefix("torch."),
        "pdl": pdl,
        "sample": "microseconds a launch of one turn, of a graph of launches over other weights",
        "kept": f"where the interval of {CONFIRMED} more turns is below {1 - MARGIN}",
    }
    results = header("tilings of the few-token operations", protocol, device)
    results |= {"gpu": name, "rows": [], "late": []}
    if device.type == "cuda":
        results["driver"] = told_by_driver()
    longest = 0.0
    for key in keys(configs):
        now = time.monotonic()
        if longest and now - begin + longest > given.seconds:
            results["late"].append([key.operation, key.rows, key.columns])
            write(out, results)
            continue
        found = tune(key, dtype, device, pdl)
        longest = max(longest, time.monotonic() - now)
        results["rows"].append(found)
        write(out, results)
        keep(table, name, found)
        text = given.table.read_text(encoding="utf-8")
        given.table.write_text(table_text(text, table), encoding="utf-8")
        if os.environ.get("OUT"):
            shutil.copy(given.table, out.parent)
        shown = f"{found['kept']}, {found['ratio']:.3f} of" if found["kept"] else "nothing beats"
        print(f"{key.operation} {key.rows} x {key.columns}: {shown} {found['rule']}", flush=True)
    print(f"written: {given.table} and {out}; not reached: {len(results['late'])}")


if __name__ == "__main__":
    main()
