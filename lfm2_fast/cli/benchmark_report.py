"""Output of ``benchmark.measure``'s figures: a table on stdout, and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lfm2_fast.cli.environment import readable
from lfm2_fast.cli.options import check_new_file

COLUMNS = (
    *("prompt", "output", "batch", "first ms", "p50 ms", "p90 ms", "p99 ms", "tokens/s"),
    "of peak",
)

# Columns that a table of the largest figures needs.
WIDE = 160


def show(found: dict[str, Any], *, as_json: bool = False) -> None:
    """Print the figures of a run as JSON, or as a table with notes above and below it."""
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = Console(highlight=False)
    model, device = found["model"], found["device"]
    numbers = " and ".join(filter(None, (model["quantization"], model["dtype"])))
    threads = f", {device['threads']} threads" if "threads" in device else ""
    speed = {k: readable("bytes", v) for k, v in found["memory_bytes_per_second"].items()}
    used = found["memory"]  # not every system tells both
    words = {"resident": "memory", "peak": "at most"}
    sizes = (f", {words[k]} {readable('bytes', used[k])}" for k in words if k in used)
    lines = [
        f"{model['name']}, {numbers}, backend {model['backend']}, {device.get('name')}{threads}",
        f"weights {readable('weight_bytes', model['weight_bytes'])}{''.join(sizes)}; a copy moves "
        f"{speed['copy']}/s, a sum reads {speed['read']}/s",
        f"load {found['load_seconds']:.2f} s, warm-up {found['warm_up_seconds']:.2f} s",
    ]
    for line in lines:
        console.print(line, markup=False)
    table = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    table.add_column("")
    for row in found["rows"]:
        table.add_row(*cells(row), "unsafe" if row["doubts"] else "")
    # A narrow terminal wraps the lines: it must not cut a figure off.
    Console(highlight=False, width=WIDE).print(table)
    console.print(
        "first: from the call to the first token; p50, p90, p99: of the steps after it; of peak: "
        "bytes of weights and cache read a second, over the faster memory speed above",
        style="dim",
    )
    if found["others"]:
        console.print(f"meanwhile {other_programs(found['others'])}", style="dim", markup=False)
    for warning in warnings(found["rows"]):
        console.print(f"unsafe: {warning}", style="yellow", markup=False)


def cells(row: dict[str, Any]) -> list[str]:
    """Format a row of figures, in the order of ``COLUMNS``."""
    steps = row["step_seconds"]
    return [
        *(str(row[name]) for name in ("prompt", "output", "batch")),
        f"{1e3 * row['first_token_seconds']['p50']:.1f}",
        *(f"{1e3 * steps[name]:.2f}" for name in ("p50", "p90", "p99")),
        f"{row['tokens_per_second']:.1f}",
        f"{row['bandwidth_share']:.0%}",
    ]


def other_programs(others: dict[str, Any]) -> str:
    """Describe the other programs that ran."""
    busiest = ", ".join(f"{name} {share:.2f}" for name, share in others["busiest"].items())
    return (
        f"other programs used {others['processors_used_by_others']:.2f} processors"
        + (f" ({busiest})" if busiest else "")
        + f", the host took {others['processors_taken_by_the_host']:.2f}"
    )


def warnings(rows: list[dict[str, Any]]) -> list[str]:
    """List every doubt once, with its cases unless it concerns all of them."""
    about: dict[str, list[str]] = {}
    for row in rows:
        for doubt in row["doubts"]:
            about.setdefault(doubt, []).append(f"{row['prompt']}+{row['output']}x{row['batch']}")
    return [
        doubt if len(names) == len(rows) else f"{', '.join(names)}: {doubt}"
        for doubt, names in about.items()
    ]


def plot(found: dict[str, Any], path: Path) -> None:
    """Write a PNG: tokens a second by context and by batch, each with the floor's.

    Raises ValueError if matplotlib is missing, and OSError if the file cannot be written.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = found["rows"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    longest = max(row["output"] for row in rows)
    shown = [row for row in rows if row["output"] == longest]
    _lines(left, shown, "prompt", "batch", "context in tokens", longest)
    _lines(right, shown, "batch", "prompt", "sequences at once", longest)
    numbers = found["model"]["quantization"] or found["model"]["dtype"]
    figure.suptitle(
        f"decoding: {found['model']['name']}, {numbers}, {found['device'].get('name', '')}"
    )
    figure.savefig(path, dpi=150, format="png")


def check_plot(path: Path) -> None:
    """Raise ValueError, with the remedy, if matplotlib or the folder of ``path`` is missing."""
    check_new_file(path, "--plot")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'lfm2-fast[plot]'") from error


def _lines(axes: Any, rows: list[dict[str, Any]], x: str, by: str, label: str, tail: int) -> None:
    """Draw a line for each value of ``by``, with the spread of its steps, and its floor dashed."""
    shift = tail // 2 if x == "prompt" else 0
    for group in sorted({row[by] for row in rows}):
        mine = sorted((row for row in rows if row[by] == group), key=lambda row: row[x])
        places = [row[x] + shift for row in mine]
        rates = [row["tokens_per_second"] for row in mine]
        pairs = list(zip(rates, mine, strict=True))
        ends = [
            [max(0.0, rate - row["batch"] / row["step_seconds"]["p90"]) for rate, row in pairs],
            [max(0.0, row["batch"] / row["step_seconds"]["p10"] - rate) for rate, row in pairs],
        ]
        name = f"batch {group}" if by == "batch" else f"after {group} tokens"
        (line, *_) = axes.errorbar(places, rates, yerr=ends, marker="o", capsize=3, label=name)
        floor = [row["floor_tokens_per_second"] for row in mine]
        axes.plot(places, floor, "--", color=line.get_color(), alpha=0.6)
    axes.plot([], [], "--", color="gray", label="limit of memory")
    axes.set(xlabel=label, ylabel="tokens per second", ylim=(0, None))
    if x == "batch":
        axes.set_xticks(sorted({row[x] for row in rows}))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
