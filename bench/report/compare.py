"""List the figures that got slower between two result files.

    python -m bench.report.compare BEFORE.json AFTER.json [--least 5]

A figure got slower when the 95 percent interval of its ratio lies beyond ``--least`` percent.
Exit code 1 if any did. Files are those of bench/results, or pytest-benchmark's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.report.results import Figure, read
from bench.report.stats import ratio


@dataclass(frozen=True)
class Change:
    """Ratio of the time now to the time before, with its interval."""

    figure: Figure
    factor: float
    low: float
    high: float

    def __str__(self) -> str:
        name = f"{self.figure.engine} {self.figure.name}".strip()
        return f"{name}: {self.factor:.2f} times [{self.low:.2f}, {self.high:.2f}]"


def changes(before: Sequence[Figure], after: Sequence[Figure]) -> list[Change]:
    """Return the change of each figure in both results; above 1 is slower, or bigger."""
    old = {(figure.engine, figure.name): figure for figure in before}
    found = []
    for new in after:
        was = old.get((new.engine, new.name))
        if was is not None and was.unit == new.unit:
            pair = (was.samples, new.samples) if new.more_is_better else (new.samples, was.samples)
            found.append(Change(new, *ratio(*pair, paired=False)))
    return found


def slower(found: Sequence[Change], least: float) -> list[Change]:
    """Return changes that are slower by ``least`` or more, chance excluded; the worst first."""
    return sorted((c for c in found if c.low > 1 + least), key=lambda c: -c.factor)


def faster(found: Sequence[Change], least: float) -> list[Change]:
    """Return changes that are faster in the same way."""
    return sorted((c for c in found if c.high < 1 / (1 + least)), key=lambda c: c.factor)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--least", type=float, default=5.0, help="percent that count")
    given = parser.parse_args(arguments)
    found = changes(read(given.before), read(given.after))
    worse = slower(found, given.least / 100)
    for title, some in (("slower", worse), ("faster", faster(found, given.least / 100))):
        for change in some:
            print(f"{title}: {change}")
    print(f"{len(found)} figures compared, {len(worse)} slower")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
