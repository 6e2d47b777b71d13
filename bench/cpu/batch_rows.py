"""Time decode steps of 1 to 64 rows beside a prefill of 512 tokens on a CPU, in bfloat16 and int8.

    python -m bench.cpu.batch_rows --size 350M

Both formats hold the same random weights in one process. All cases take turns, back and forth, so
that other load falls on every case. A sample of a step is the median of a turn's steps, the choice
of tokens included. Rates are tokens a second and multiply-adds a second: those of the projections,
the head's among them for the tokens that have logits. Attention is left out; contexts are short.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import lfm2_fast
from bench.cpu.engines import prompt
from bench.report import results
from bench.report.goals import goal_table, judged
from bench.report.markdown import markdown, number
from bench.report.results import Figure
from bench.report.stats import ratio
from bench.shapes import SIZES, checkpoint
from lfm2_fast.cli.machine_load import Neighbours
from lfm2_fast.engine.model_runner import ModelRunner, new_cache
from lfm2_fast.ops.sampling import SamplingParams, SamplingState
from lfm2_fast.weights.formats import Projection

ROWS = (1, 2, 4, 8, 16, 32, 64)
PREFILL = 512
CONTEXT = 1
# Engine's label -> must and aim, first of 64 rows over the prefill, then of 2 rows over 1.
GOALS = {"lfm2_fast": ((0.75, 0.9), (1.6, 1.85)), "lfm2_fast int8": ((0.95, 1.0), (1.6, 1.85))}


class Side:
    """One weight format: the model, a cache of 64 slots, and the seconds of every case by turn."""

    def __init__(
        self, label: str, folder: Path, prefill: int, rows: Sequence[int] = ROWS, **options: Any
    ) -> None:
        self.label, self.length, self.rows = label, prefill, tuple(rows)
        self.network = lfm2_fast.load(folder, device="cpu", **options).network
        self.cache = new_cache(self.network, max(rows), max(prefill, 256))
        self.runner = ModelRunner(self.network, self.cache)
        self.times: dict[str, list[float]] = {}

    def decode(self, rows: int, steps: int) -> list[float]:
        """Return the seconds of each of ``steps`` greedy steps of ``rows`` rows."""
        self.cache.reset()
        slots, state = list(range(rows)), SamplingState([SamplingParams()] * rows)
        logits = self.runner.prefill([prompt(slot, CONTEXT) for slot in slots], slots)
        tokens = self.network.ops.sample(logits, state).tolist()
        found = []
        for _ in range(steps):
            begin = time.perf_counter()
            tokens = self.network.ops.sample(self.runner.step(tokens, slots), state).tolist()
            found.append(time.perf_counter() - begin)
        return found

    def prefill(self) -> float:
        """Return the seconds of one prompt, its last token's logits included."""
        self.cache.reset()
        begin = time.perf_counter()
        self.runner.prefill([prompt(0, self.length)], [0])
        return time.perf_counter() - begin

    def turn(self, case: int, steps: int) -> None:
        """Time a case once: steps of ``case`` rows, or the prefill for 0."""
        took = median(self.decode(case, steps)) if case else self.prefill()
        self.times.setdefault(name_of(case, self.length), []).append(took)

    def figures(self) -> list[Figure]:
        """Return tokens a second and multiply-adds a second of every case."""
        body, head = multiply_adds(self.network)
        found = []
        for case in (*self.rows, 0):
            name, tokens = name_of(case, self.length), case or self.length
            products = tokens * body + (case or 1) * head
            for unit, amount in (("tokens/s", tokens), ("multiply-adds/s", products)):
                samples = [amount / took for took in self.times[name]]
                found.append(Figure(name, self.label, unit, samples))
        return found


def name_of(case: int, prefill: int) -> str:
    """Return the figure's name of a number of rows, or of the prefill for 0."""
    return f"decode, rows {case}" if case else f"prefill {prefill}"


def multiply_adds(network: torch.nn.Module) -> tuple[int, int]:
    """Return the multiply-adds of a token: those of all layers' projections, and the head's."""
    sizes = {
        name: part.weight.numel()
        for name, part in network.named_modules()
        if isinstance(part, Projection)
    }
    head = sizes.pop("lm_head", 0) or sizes["embed_tokens"]
    sizes.pop("embed_tokens", None)
    return sum(sizes.values()), head


def ratios(
    figures: Sequence[Figure], prefill: int, numbers: Sequence[int] = ROWS
) -> dict[str, dict[str, Any]]:
    """Return by label the ratio of each number of rows to the prefill and to one row.

    The first is of multiply-adds a second, the second of tokens a second.
    """
    known = {(each.engine, each.name, each.unit): each.samples for each in figures}
    found: dict[str, dict[str, Any]] = {}
    for label in dict.fromkeys(each.engine for each in figures):

        def over(a: int, b: int, unit: str, label: str = label) -> tuple[float, float, float]:
            mine, other = (known[label, name_of(case, prefill), unit] for case in (a, b))
            return ratio(mine, other, paired=True)

        found[label] = {
            f"{rows} rows over prefill": over(rows, 0, "multiply-adds/s") for rows in numbers
        }
        if 1 in numbers:
            for rows in numbers:
                found[label][f"{rows} rows over 1"] = over(rows, 1, "tokens/s")
    return found


def report(figures: Sequence[Figure], found: dict[str, dict[str, Any]]) -> str:
    """Return Markdown tables of the rates and of the goals."""
    known = {(each.engine, each.name, each.unit): each for each in figures}
    rows = []
    for (label, name, unit), each in known.items():
        if unit == "tokens/s":
            rate = known[label, name, "multiply-adds/s"].median
            spread = f"{number(min(each.samples))} to {number(max(each.samples))}"
            rows.append([label, name, number(each.median), spread, number(rate / 1e9)])
    head = ["engine", "case", "tokens/s", "least to most", "10^9 multiply-adds/s"]
    verdicts = []
    for label, pairs in GOALS.items():
        for what, (must, aim) in zip(("64 rows over prefill", "2 rows over 1"), pairs, strict=True):
            if what not in found[label]:
                continue
            value = found[label][what]
            verdicts.append(judged(f"{label}: {what}", must, aim, value, more_is_better=True))
    return f"{markdown(head, rows)}\n\n{goal_table(verdicts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="350M", choices=(*SIZES, "tiny"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4, help="steps per turn")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="numbers with commas")
    parser.add_argument("--prefill", type=int, default=PREFILL, help="tokens of the prompt")
    parser.add_argument("--out", type=Path, help="default: bench/results/batch-rows-SIZE.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    folder = checkpoint(given.size).resolve()
    rows = [int(each) for each in given.rows.split(",")]
    common: dict[str, Any] = {"rows": rows, "dtype": torch.bfloat16}
    sides = [
        Side("lfm2_fast", folder, given.prefill, **common),
        Side("lfm2_fast int8", folder, given.prefill, quantization="int8", **common),
    ]
    cases = [(side, case) for side in sides for case in (*rows, 0)]
    for side, case in cases:  # records the graphs, loads the libraries
        side.turn(case, 3)
    for side in sides:
        side.times.clear()
    others = Neighbours(own=[])
    for turn in range(given.rounds):
        for side, case in cases if turn % 2 else cases[::-1]:
            side.turn(case, given.steps)
    figures = [figure for side in sides for figure in side.figures()]
    compared = ratios(figures, given.prefill, rows)
    protocol = {name: value for name, value in vars(given).items() if name != "out"}
    protocol["order"] = "all cases in turns, back and forth; one turn each before does not count"
    found = results.header(f"LFM2-{given.size}'s shape on a CPU, by rows of a step", protocol)
    found |= {"others": others.seen(), "figures": results.as_json(figures), "ratios": compared}
    out = given.out or results.RESULTS / f"batch-rows-{given.size}.json"
    results.write(out, found)
    print(f"{report(figures, compared)}\n\nwritten: {out}; meanwhile: {found['others']}")


if __name__ == "__main__":
    main()
