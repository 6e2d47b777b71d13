"""Time this checkout beside another one of the same project, in turns.

    python -m bench.cpu.before_after ../before --size 350M

The other checkout needs an environment of its own, in ``.venv``, with its extension built. Both run
the same checkpoint, each in its own process. Their logits are compared before anything is timed.
Figures are ratios of medians, after over before.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.cpu.peers import CASES, interleave
from bench.cpu.references import ALLOWED
from bench.gate import PROMPT, STEPS, distance
from bench.report import results
from bench.report.markdown import markdown, number
from bench.report.results import Figure
from bench.report.stats import ratio
from bench.shapes import SIZES, checkpoint
from bench.worker import ROOT, EngineError, Remote
from lfm2_fast.cli.machine_load import Neighbours

ENGINES = ("lfm2_fast", "lfm2_fast int8")


def open_pair(name: str, before: Path, folder: Path, threads: int) -> list[Remote]:
    """Return the engine of that name from both checkouts, loaded, the older one first.

    Raises EngineError if one does not run, or if their logits differ by more than rounding.
    """
    pair = []
    for label, root in (("before", before), ("after", ROOT)):
        engine = Remote(name, str(root / ".venv" / "bin" / "python"), root=root)
        engine.name = f"{label}, {name}"
        engine.ask("load", folder=str(folder), threads=threads)
        pair.append(engine)
    apart = distance(*(engine.logits(PROMPT, STEPS) for engine in reversed(pair)))
    # In 8 bits a last bit decides how a token's number is rounded.
    if apart > ALLOWED.get(name.split()[-1], 1e-2):
        raise EngineError(f"its logits differ from those before by {apart:.3g} of their size", name)
    return pair


def table(figures: Sequence[Figure]) -> str:
    """Return a Markdown table: medians of both, and the ratio with its 95 percent interval."""
    rows = []
    for before, after in zip(figures[::2], figures[1::2], strict=True):
        middle, low, high = ratio(after.samples, before.samples, paired=True)
        rows.append(
            [
                after.engine.removeprefix("after, "),
                after.name,
                number(before.median),
                number(after.median),
                f"{middle:.3f} [{low:.3f}, {high:.3f}]",
            ]
        )
    return markdown(["engine", "tokens/s", "before", "after", "ratio"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="the other checkout's folder")
    parser.add_argument("--size", default="350M", choices=SIZES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--cases", default="decode,prefill 512", help="names with commas")
    parser.add_argument("--engines", default=",".join(ENGINES), help="names with commas")
    parser.add_argument("--out", type=Path, help="default: bench/results/before-after-SIZE.json")
    given = parser.parse_args()
    before, folder = given.before.resolve(), checkpoint(given.size).resolve()
    names = given.cases.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"--cases {unknown[0]!r} is not one of {', '.join(CASES)}")
    found = results.header(
        f"LFM2-{given.size}'s shape on a CPU, this commit beside an older one",
        {
            "size": given.size,
            "threads": given.threads,
            "rounds": given.rounds,
            "order": "both in turns, back and forth; one turn each before that does not count",
            "cases": {name: vars(CASES[name]) for name in names},
            "before": results.git("-C", str(before), "rev-parse", "--short=12", "HEAD"),
        },
    )
    figures: list[Figure] = []
    out = given.out or results.RESULTS / f"before-after-{given.size}.json"
    for name in given.engines.split(","):
        pair = open_pair(name, before, folder, given.threads)
        others = Neighbours(own=[engine.process.pid for engine in pair])
        for case in names:
            figures += interleave(pair, case, given.rounds, lambda text: print(text, flush=True))
        found |= {"others": others.seen(), "figures": results.as_json(figures)}
        results.write(out, found)
        for engine in pair:
            engine.close()
    print(f"\n{table(figures)}\n\nwritten: {out}; meanwhile: {found['others']}")


if __name__ == "__main__":
    main()
