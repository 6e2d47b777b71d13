"""Draw a soak's result file: memory, pages and rates over time, as SVG.

python -m bench.report.soak_plot [RESULT.json]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report.results import RESULTS

MIB = 2**20
# Samples that a rate is averaged over.
WIDTH = 10


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Return the slope and the value at x = 0 of the line of least squares."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    steep = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    return steep, mean_y - steep * mean_x


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the plot of a result. Raises ImportError where matplotlib is missing."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    series = found["series"]
    minutes = [seconds / 60 for seconds in series["seconds"]]
    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasSVG(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True)

    resident = [each / MIB for each in series["resident_bytes"]]
    top.plot(minutes, resident, linewidth=1)
    first = len(minutes) // 3
    if len(minutes) - first > 1:
        steep, base = slope(minutes[first:], resident[first:])
        ends = [minutes[first], minutes[-1]]
        label = f"last two thirds: {60 * steep:+.2f} MiB an hour"
        top.plot(ends, [base + steep * x for x in ends], "--", color="black", label=label)
        top.legend(loc="lower right")
    top.set_ylabel("resident memory, MiB")

    pages = [series[f"pages_{kind}"] for kind in ("used", "cached", "free")]
    middle.stackplot(minutes, *pages, labels=("owned", "cached", "free"), linewidth=0)
    middle.legend(loc="lower right")
    middle.set_ylabel("pages")

    steps = range(WIDTH, len(minutes))
    seconds, written = series["seconds"], series["new_tokens"]
    rates = [
        (written[at] - written[at - WIDTH]) / (seconds[at] - seconds[at - WIDTH]) for at in steps
    ]
    bottom.plot([minutes[at] for at in steps], rates, linewidth=1, label="new tokens a second")
    preempted = [series["preemptions"][at] for at in steps]
    bottom.plot([minutes[at] for at in steps], preempted, label="preemptions so far")
    bottom.legend(loc="lower right")
    bottom.set_xlabel("minutes")
    bottom.set_ylim(bottom=0)

    protocol = found["protocol"]
    figure.suptitle(
        f"{protocol['rate']:g} requests a second for {protocol['minutes']:g} minutes, "
        f"{protocol['dtype']}, {found['requests']} requests"
    )
    # Without a date and random names, equal results make equal files.
    with matplotlib.rc_context({"svg.hashsalt": "soak"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    """Draw a result file again."""
    path = Path(sys.argv[1]) if sys.argv[1:] else RESULTS / "soak.json"
    draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
