"""Time decode steps in one format beside llama.cpp on one kind of GGUF file, in turns.

    python -m bench.cpu.beside_llama --kind Q4_K_M
    python -m bench.cpu.beside_llama --size 1.2B --kind Q4_0 --quantization int4

Both run the same GGUF file; with ``--quantization`` this package quantizes the checkpoint that the
file was made of. Before anything is timed, logits are compared with those of llama.cpp's server.
So no reference in float32 has to run. ``peers`` has one, and more engines.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench.cpu.gguf_file import KINDS
from bench.cpu.llama_bench import LlamaBench
from bench.cpu.llama_build import program
from bench.cpu.peers import CASES, interleave
from bench.cpu.references import ALLOWED
from bench.gate import PROMPT, STEPS, wrong_logits
from bench.report import results
from bench.report.goals import GOALS, INT4_AT_1_2B, goal_table, verdicts
from bench.report.results import Figure
from bench.report.tables import figure_table
from bench.shapes import SIZES, checkpoint, config_of
from bench.worker import EngineError, Remote
from lfm2_fast.cli.machine_load import Neighbours, memory_speed


def open_pair(
    folder: Path, kind: str, quantization: str | None, threads: int, programs: Path, size: int
) -> tuple[Remote, LlamaBench]:
    """Return this package's engine and llama.cpp's, whose logits agree.

    ``size`` is the vocabulary's. Raises EngineError if one does not run, or if they differ.
    """
    theirs = LlamaBench(programs, kind, folder, threads)
    exact, _, _ = theirs.inspect(size)
    ours = Remote(f"lfm2_fast {quantization}" if quantization else "lfm2_fast")
    try:
        source = folder if quantization else theirs.file
        ours.ask("load", folder=str(source), threads=threads)
        found = ours.logits(PROMPT, STEPS)
        # The server's have a mean of 0.
        centred = found - found.mean(-1, keepdims=True)
        allowed = ALLOWED["int4" if quantization else "Q8_0"]
        if wrong := wrong_logits(centred, exact, allowed):
            raise EngineError(wrong, ours.name)
    except EngineError:
        ours.close()
        raise
    ours.name = f"lfm2_fast {quantization or kind}"
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="350M", choices=SIZES)
    parser.add_argument("--kind", default="Q4_K_M", choices=KINDS)
    parser.add_argument("--quantization", help="quantize the checkpoint, do not read the file")
    parser.add_argument("--cases", default="decode", help="names with commas")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--llama", type=Path, default=program(""), help="the folder of llama.cpp's programs"
    )
    parser.add_argument("--out", type=Path, help="default: bench/results/beside-KIND-SIZE.json")
    given = parser.parse_args()
    names = given.cases.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"--cases {unknown[0]!r} is not one of {', '.join(CASES)}")
    torch.set_num_threads(given.threads)
    folder, vocabulary = checkpoint(given.size), config_of(given.size).vocab_size
    ours, theirs = open_pair(
        folder, given.kind, given.quantization, given.threads, given.llama, vocabulary
    )
    others = Neighbours(own=[ours.process.pid])
    figures: list[Figure] = []
    for name in names:
        figures += interleave(
            [ours, theirs], name, given.rounds, lambda text: print(text, flush=True)
        )
    ours.close()
    speed = memory_speed(torch.device("cpu"))
    figures += [Figure(name, "machine", "bytes/s", [value]) for name, value in speed.items()]
    found = results.header(
        f"LFM2-{given.size}'s shape on a CPU, beside llama.cpp's {given.kind}",
        {
            "size": given.size,
            "kind": given.kind,
            "quantization": given.quantization,
            "threads": given.threads,
            "rounds": given.rounds,
            "order": "both in turns, back and forth; one turn each before that does not count",
            "cases": {name: vars(CASES[name]) for name in names},
            "gate": "logits of a prompt and of steps after it against llama.cpp's server",
        },
    )
    found["versions"] |= ours.versions | theirs.versions
    found |= {"others": others.seen(), "figures": results.as_json(figures)}
    out = given.out or results.RESULTS / f"beside-{given.kind}-{given.size}.json"
    results.write(out, found)
    goals = GOALS if given.size == "350M" else [INT4_AT_1_2B]
    print(f"{figure_table(figures, names)}\n\n{goal_table(verdicts(figures, goals))}")
    print(f"written: {out}; meanwhile: {found['others']}")


if __name__ == "__main__":
    main()
