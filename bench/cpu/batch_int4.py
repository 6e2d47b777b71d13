"""Time decode steps of eight rows in int4 beside llama.cpp's server on its Q4_0 file, in turns.

    python -m bench.cpu.batch_int4 --size 350M

``llama-bench`` runs one sequence, so its server runs eight requests at once. A rate is that of the
steps alone: the seconds of requests for one token are subtracted from those of longer requests.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.cpu.engines import prompt
from bench.cpu.gguf_file import gguf_file
from bench.cpu.llama_build import program
from bench.cpu.llama_server import LlamaServer
from bench.cpu.peers import Workload, turn
from bench.report import results
from bench.report.goals import goal_table, judged
from bench.report.results import Figure
from bench.report.stats import ratio
from bench.shapes import SIZES, checkpoint
from bench.worker import Remote
from lfm2_fast.cli.machine_load import Neighbours

OURS, THEIRS = "lfm2_fast int4", "llama.cpp Q4_0"
MUST, AIM = 1.3, 1.8


def server_rate(server: LlamaServer, case: Workload) -> float:
    """Return the tokens a second of steps of the case, its prompts not counted."""
    prompts = [prompt(row, case.context) for row in range(case.batch)]
    first = server.together(prompts, 1)
    seconds = server.together(prompts, 1 + case.steps) - first
    return case.batch * case.steps / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="350M", choices=SIZES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument(
        "--llama", type=Path, default=program(""), help="the folder of llama.cpp's programs"
    )
    parser.add_argument("--out", type=Path, help="default: bench/results/batch-int4-SIZE.json")
    given = parser.parse_args()
    folder = checkpoint(given.size)
    case = Workload(given.rows, 64, given.steps)
    ours = Remote(OURS)
    ours.ask("load", folder=str(folder), threads=given.threads)
    samples: dict[str, list[float]] = {OURS: [], THEIRS: []}
    file = gguf_file(folder, "Q4_0", given.llama / "llama-quantize")
    length = case.context + case.steps + 1
    with LlamaServer(
        given.llama / "llama-server", file, given.threads, given.rows, length, THEIRS
    ) as server:
        others = Neighbours(own=[ours.process.pid, server.process.pid])
        for place in range(given.rounds + 1):
            mine, their = turn(ours, case, case.steps + 1), server_rate(server, case)
            if place:  # the first turn does not count
                samples[OURS].append(mine)
                samples[THEIRS].append(their)
    ours.close()
    figures = [Figure("decode, batch 8", name, "tokens/s", s) for name, s in samples.items()]
    protocol = {name: value for name, value in vars(given).items() if name not in ("out", "llama")}
    protocol["order"] = "both in turns; one turn each before does not count"
    found = results.header(f"LFM2-{given.size}'s shape on a CPU, {given.rows} rows", protocol)
    found |= {"others": others.seen(), "figures": results.as_json(figures)}
    out = given.out or results.RESULTS / f"batch-int4-{given.size}.json"
    results.write(out, found)
    value = ratio(samples[OURS], samples[THEIRS], paired=True)
    what = f"decode at batch {given.rows}, int4 against Q4_0"
    print(goal_table([judged(what, MUST, AIM, value, more_is_better=True)]))
    print(f"written: {out}; meanwhile: {found['others']}")


if __name__ == "__main__":
    main()
