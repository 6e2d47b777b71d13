"""Tables of a GPU's figures, from bench/results/gpu.json and gpu-peers.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.report import gpu_goals
from bench.report.goals import OURS, goal_table
from bench.report.gpu_goals import cell
from bench.report.markdown import markdown, number
from bench.report.results import Figure, commit_of, read
from bench.report.stats import ratio

ENGINES = {
    "lfm2_fast": "lfm2_fast",
    "transformers": "Hugging Face",
    "transformers compiled": "Hugging Face, static cache, compiled",
}


def us(row: dict[str, Any]) -> list[str]:
    """Format the median of a row's microseconds, and their range."""
    times = row["us"]
    return [number(times["p50"]), f"{number(times['p10'])} to {number(times['p90'])}"]


def measured(found: dict[str, Any], kind: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Size, case and row of all that was measured of a kind."""
    sizes = found.get(kind, {})
    return [
        (size, case, sizes[size][case])
        for size in sizes
        for case in sizes[size]
        if cell(found, kind, size, case)
    ]


def kernels(found: dict[str, Any], size: str, case: str) -> str:
    """Number of a step's kernels, for a table; nothing where they were not counted."""
    row = cell(found, "kernels", size, case)
    return str(row["kernels"]) if row else ""


def decode_table(found: dict[str, Any]) -> str:
    """Write a table with one row for each size and context."""
    rows = [
        [
            size,
            case.removeprefix("context "),
            *us(row),
            number(1e6 / row["us"]["p50"]),
            f"{100 * row['share_of_copy']:.1f} %",
            kernels(found, size, case),
            f"{row['peak_bytes'] / 1e9:.2f}",
        ]
        for size, case, row in measured(found, "decode")
    ]
    head = ["", "context", "µs a token", "p10 to p90", "tokens/s", "of the copy", "kernels"]
    return markdown([*head, "GB at most"], rows)


def batch_table(found: dict[str, Any]) -> str:
    """Write a table with one row for each size and batch, smallest first."""
    rows = [
        [
            size,
            case,
            *us(row),
            number(1e6 * int(case) / row["us"]["p50"]),
            kernels(found, size, case),
        ]
        for size, case, row in sorted(
            measured(found, "batch"), key=lambda at: (list(found["batch"]).index(at[0]), int(at[1]))
        )
    ]
    return markdown(["", "batch", "µs a step", "p10 to p90", "tokens/s", "kernels"], rows)


def first_token_table(found: dict[str, Any]) -> str:
    """Write a table with one row for each size and length of prompt."""
    rows = [
        [size, case, *us(row), number(row["over_floor"])]
        for size, case, row in measured(found, "first token")
    ]
    return markdown(["", "prompt", "µs", "p10 to p90", "over the weights' floor"], rows)


def comparison_table(found: dict[str, Any]) -> str:
    """Steps of one kind over another's, a row a size."""
    kinds = {
        "sampled": "temperature, min-p and penalty over greedy",
        "dependent": "dependent launch over plain",
        "int8": "int8 over bfloat16",
    }
    rows = []
    for kind, what in kinds.items():
        for size in found.get(kind, {}):
            if row := cell(found, kind, size):
                low, high = row["interval"]
                times = [number(row["us"][side]["p50"]) for side in ("first", "second")]
                rows.append([what, size, *times, f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]"])
    return markdown(["", "", "µs a token", "against", "ratio"], rows)


def rest_table(found: dict[str, Any]) -> str:
    """Prefill on the device, and tokens as the host sees them."""
    rows = []
    for size in found.get("prefill", {}):
        if row := cell(found, "prefill", size):
            share = f"{100 * row['share']:.1f} % of the product's rate"
            rows.append(["prefill 8k", size, *us(row), share])
    for size in found.get("host", {}):
        if row := cell(found, "host", size):
            times = cell(found, "decode", size, "context 128")
            beside = f"{number(times['us']['p50'])} on the device" if times else ""
            rows.append(["a token, as the host sees it", size, *us(row), beside])
    return markdown(["", "", "µs", "p10 to p90", ""], rows)


def limits(found: dict[str, Any]) -> str:
    """Origin of a result file, and the limits of the GPU."""
    text = (
        f"Measured on {found['when'][:10]} on {found.get('gpu') or found['machine']['name']}, "
        f"{commit_of(found)}"
    )
    versions = found["versions"]
    text += "; " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    text += (
        f". A copy moves {number(found['copy_gb_s'])} GB/s, a large bfloat16 product runs at "
        f"{number(found['matmul_tflops'])} TFLOP/s."
    )
    if empty := cell(found, "empty_kernels"):
        plain, early = (empty["us"][name]["p50"] for name in ("plain", "dependent"))
        text += (
            f" A graph of {empty['kernels']} kernels that do nothing takes {number(plain)} µs, "
            f"{number(early)} with dependent launch."
        )
    return text


def peers_table(found: dict[str, Any], figures: Sequence[Figure]) -> str:
    """Write a table with a row for each size and engine; the last column is our relative speed."""
    rows = []
    for size, engines in found["sizes"].items():
        known = {f.engine: f for f in figures if f.name == f"decode {size}"}
        for name, row in engines.items():
            times = ""
            if name != OURS and OURS in known and name in known:
                value, low, high = ratio(known[name].samples, known[OURS].samples, paired=True)
                times = f"{value:.2f} [{low:.2f}, {high:.2f}]"
            rate = number(1e6 / row["us"]["p50"])
            rows.append([size, ENGINES.get(name, name), *us(row), rate, times])
    return markdown(
        ["", "engine", "µs a token", "p10 to p90", "tokens/s", "lfm2_fast is faster by"], rows
    )


def peers_conditions(found: dict[str, Any]) -> str:
    """Origin of the figures, and the engines that were left out."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(found["versions"].items()))
    protocol = found["protocol"]
    text = (
        f"Measured on {found['when'][:10]} on {found.get('gpu') or found['machine']['name']}, "
        f"{commit_of(found)}; {versions}. {protocol['order']}."
    )
    for size, how in found["how"].items():
        if way := how.get(gpu_goals.COMPILED):
            text += f" {size} compiled: {way}."
    for size, reasons in found["skipped"].items():
        text += "".join(f" Left out of {size}: {n} ({why})." for n, why in reasons.items())
    return text


def tables(folder: Path) -> dict[str, Callable[[], str]]:
    """Return the blocks for the result files in ``folder``."""
    made: dict[str, Callable[[], str]] = {}
    alone, beside = folder / "gpu.json", folder / "gpu-peers.json"
    gpu: dict[str, Any] = {}
    figures: list[Figure] = []
    if alone.is_file():
        gpu = json.loads(alone.read_text(encoding="utf-8"))
    if "copy_gb_s" in gpu:  # tokens were right
        made |= {
            "gpu-limits": lambda: limits(gpu),
            "gpu-decode": lambda: decode_table(gpu),
            "gpu-batch": lambda: batch_table(gpu),
            "gpu-first-token": lambda: first_token_table(gpu),
            "gpu-comparisons": lambda: comparison_table(gpu),
            "gpu-rest": lambda: rest_table(gpu),
        }
    if beside.is_file():
        found, figures = json.loads(beside.read_text(encoding="utf-8")), read(beside)
        made |= {
            "gpu-peers": lambda: peers_table(found, figures),
            "gpu-peers-conditions": lambda: peers_conditions(found),
        }
    if made:
        made["gpu-goals"] = lambda: goal_table(gpu_goals.verdicts(gpu, figures), "")
    return made
