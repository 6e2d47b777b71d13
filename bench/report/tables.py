"""Rewrite the tables in README.md and docs from the files in bench/results.

    python -m bench.report.tables [--check]

A table stands between ``<!-- bench:NAME -->`` and ``<!-- /bench -->``; nothing in it is typed by
hand. ``--check`` writes nothing, and fails if a table differs from the results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from bench.report import gpu_tables, http_table
from bench.report.goals import OURS, goal_table, verdicts
from bench.report.int4_table import int4_table
from bench.report.markdown import markdown, number
from bench.report.results import RESULTS, ROOT, Figure, commit_of, read
from bench.report.stats import ratio
from bench.shapes import SIZES, config_of
from lfm2_fast.cli.machine_load import quantile
from lfm2_fast.weights.fusion import num_parameters

DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", DOCS / "performance.md", DOCS / "usage" / "export.md")
BLOCK = re.compile(r"(<!-- bench:(\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
SPEEDS = ("decode", "prefill 512", "decode, batch 8", "decode after 8k")
NAMES = {
    "lfm2_fast": "lfm2_fast bf16",
    "transformers": "Hugging Face bf16",
    "transformers compiled": "Hugging Face bf16, static cache, compiled",
}
# Bytes of a weight; int8 has four more for each row, which is not shown.
DTYPES = {"float32": 4, "bfloat16": 2, "int8": 1}


def figure_table(figures: Sequence[Figure], names: Sequence[str]) -> str:
    """Write a row for each engine: its median and spread, and our ratio to it with the interval."""
    rows = []
    for name in names:
        mine = next((f for f in figures if (f.engine, f.name) == (OURS, name)), None)
        for figure in (f for f in figures if f.name == name):
            low, high = (quantile(figure.samples, q) for q in (0.1, 0.9))
            times = ""
            if mine is not None and figure is not mine:
                value, least, most = ratio(mine.samples, figure.samples, paired=True)
                times = f"{value:.2f} [{least:.2f}, {most:.2f}]"
            rows.append(
                [
                    name,
                    NAMES.get(figure.engine, figure.engine),
                    number(figure.median),
                    f"{number(low)} to {number(high)}",
                    times,
                ]
            )
    return markdown(["", "engine", "tokens/s", "p10 to p90", "lfm2_fast bf16 over it"], rows)


def summary_table(figures: Sequence[Figure], names: Sequence[str]) -> str:
    """Write the median tokens a second: one row for each engine, one column for each case."""
    known = {(f.engine, f.name): number(f.median) for f in figures}
    engines = dict.fromkeys(f.engine for f in figures if f.name in names)
    rows = [
        [NAMES.get(engine, engine), *(known.get((engine, name), "") for name in names)]
        for engine in engines
    ]
    return markdown(["tokens/s", *names], rows)


def memory_table(figures: Sequence[Figure]) -> str:
    """Write load times and memory, one row for each engine."""
    known = {(f.engine, f.name): f.median for f in figures}
    engines = dict.fromkeys(f.engine for f in figures if f.name == "load")
    rows = [
        [
            NAMES.get(engine, engine),
            f"{known[engine, 'load']:.2f}",
            f"{known[engine, 'memory after load'] / 1e9:.2f}",
            f"{known[engine, 'peak memory'] / 1e9:.2f}",
        ]
        for engine in engines
    ]
    return markdown(["engine", "load, s", "memory after load, GB", "peak of process, GB"], rows)


def floor_table(speed: dict[str, float]) -> str:
    """Fewest bytes that a step reads, and tokens a second at the memory's faster speed."""
    how = max(speed, key=lambda name: speed[name])
    bandwidth = speed[how]
    rows = []
    for size in SIZES:
        config = config_of(size)
        for dtype, item in DTYPES.items():
            weights = num_parameters(config) * item
            cached = config.cache_bytes(4 if dtype == "float32" else 2)
            rows.append(
                [
                    size,
                    dtype,
                    f"{weights / 1e9:.3f}",
                    f"{cached / 1e3:.1f}",
                    number(bandwidth / weights),
                    number(bandwidth / (weights + 8192 * cached)),
                ]
            )
    head = ["", "weights", "GB a step", "kB a token of context", "tokens/s", "after 8k"]
    return f"At {bandwidth / 1e9:.1f} GB/s, the speed of a {how}:\n\n{markdown(head, rows)}"


def profile_table(found: dict[str, Any]) -> str:
    """Write the shares of a decode step's time, one column for each backend."""
    sides = [name for name in ("eager", "native") if name in found]
    names = list(dict.fromkeys(name for side in sides for name in found[side]["operations"]))
    rows = []
    for name in names:
        cells = []
        for side in sides:
            row = found[side]["operations"].get(name)
            calls = f", {row['calls']} calls" if row and "calls" in row else ""
            cells.append(f"{row['median_us']:,.0f}{calls}" if row else "")
        rows.append([name, *cells])
    rows.append(["whole step", *(f"{found[side]['step']['median_us']:,.0f}" for side in sides)])
    return markdown(["µs", *sides], rows)


def quality_table(found: dict[str, Any]) -> str:
    """Loss of each kind of numbers."""
    rows = [
        [
            name,
            f"{row['loss']:.4f}",
            f"{100 * (row['loss'] / row['reference_loss'] - 1):.3f} %",
            f"{row['kl']:.5f}",
            f"{100 * row['agreement']:.2f} %",
        ]
        for name, row in found["kinds"].items()
    ]
    return markdown(["", "loss", "above float32", "KL", "same token likeliest"], rows)


def draws_table(found: dict[str, Any]) -> str:
    """Draws that differ from float32's, a row a kind of numbers, a column a method."""
    rows = [
        [name, f"{100 * row['inverse']:.2f} %", f"{100 * row['gumbel']:.2f} %"]
        for name, row in found["kinds"].items()
    ]
    return markdown(["", "inverse distribution function", "Gumbel's max"], rows)


def gguf_table(found: dict[str, Any]) -> str:
    """Errors of logits on files of llama.cpp's tools, a row a kind of file."""
    rows = [
        [f"{shape}, {kind}"]
        + [f"{row[name]:.5f}" for name in ("ours", "llama", "rounded", "apart")]
        + [f"{sum(row['written'])} of {len(row['written']) * found['protocol']['greedy_tokens']}"]
        for shape, kinds in found["files"].items()
        for kind, row in kinds.items()
    ]
    head = ["", "lfm2_fast", "llama.cpp", "its rounding alone", "between both"]
    return markdown([*head, "greedy tokens before the first other one"], rows)


def gguf_loss_table(found: dict[str, Any]) -> str:
    """KL and loss of 4 bits beside llama.cpp's."""
    rows = [
        [name, f"{row['loss']:.4f}", f"{row['reference_loss']:.4f}", f"{row['kl']:.5f}"]
        for name, row in found["kinds"].items()
    ]
    return markdown(["", "loss", "its reference's", "KL"], rows)


def speculation_table(found: dict[str, Any]) -> str:
    """Tokens a second with drafts and without, for each kind of text, then the cost of a step."""
    rows = []
    for name, case in found.items():
        if not isinstance(case, dict) or "verdict" not in case:
            continue
        own, rates, share = case["verdict"], case.get("tokens/s"), case.get("accepted")
        sides = ["", ""] if rates is None else [f"{median(r):.1f}" for r in rates.values()]
        rows.append(
            [
                name if rates else own["what"],
                *sides,
                "" if share is None else f"{100 * share:.0f} %",
                f"{own['value']:.2f} [{own['low']:.2f}, {own['high']:.2f}]",
                f"{own['must']:g}",
                f"{own['aim']:g}",
                own["reached"],
            ]
        )
    heads = ["", "plain tokens/s", "with drafts", "accepted", "ratio", "must", "aim", "reached"]
    return markdown(heads, rows)


def conditions(found: dict[str, Any]) -> str:
    """Origin of a result file, as a sentence."""
    machine, versions, protocol = found["machine"], found["versions"], found["protocol"]
    others = found.get("others", {}).get("processors_used_by_others")
    named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    text = (
        f"Measured on {found['when'][:10]} on {machine['name']} ({machine['features']}), "
        f"{protocol['threads']} threads, {commit_of(found)}"
    )
    text += f"; {named}. {protocol['rounds']} rounds, {protocol['order']}."
    if others is not None:
        text += f" Other programs used {others:.2f} processors meanwhile."
    if found.get("skipped"):
        reasons = "; ".join(f"{name} ({why})" for name, why in found["skipped"].items())
        text += f" Left out: {reasons}."
    return text


def tables() -> dict[str, Callable[[], str]]:
    """Return the blocks for the existing result files."""
    made: dict[str, Callable[[], str]] = {}
    for path in sorted(RESULTS.glob("cpu-*.json")):
        name = path.stem.removeprefix("cpu-")
        figures, whole = read(path), json.loads(path.read_text(encoding="utf-8"))
        speed = {f.name: f.median for f in figures if f.engine == "machine"}
        made |= {
            f"summary-{name}": lambda f=figures: summary_table(f, SPEEDS),
            f"speed-{name}": lambda f=figures: figure_table(f, SPEEDS),
            f"goals-{name}": lambda f=figures: goal_table(verdicts(f)),
            f"memory-{name}": lambda f=figures: memory_table(f),
            f"conditions-{name}": lambda w=whole: conditions(w),
            f"floor-{name}": lambda s=speed: floor_table(s),
        }
    for path in sorted(RESULTS.glob("profile-*.json")):
        whole = json.loads(path.read_text(encoding="utf-8"))
        made[path.stem] = lambda w=whole: profile_table(w)
    for path in sorted(RESULTS.glob("speculation-*.json")):
        whole = json.loads(path.read_text(encoding="utf-8"))
        made[path.stem] = lambda w=whole: speculation_table(w)
        made[f"conditions-{path.stem}"] = lambda w=whole: conditions(w)
    for path in sorted(RESULTS.glob("exports-*.json")):
        figures, whole = read(path), json.loads(path.read_text(encoding="utf-8"))
        cases = tuple(dict.fromkeys(figure.name for figure in figures))
        made[path.stem] = lambda f=figures, c=cases: summary_table(f, c)
        made[f"conditions-{path.stem}"] = lambda w=whole: conditions(w)
    others = {
        "quality": ("quality", quality_table),
        "draws": ("draws", draws_table),
        "gguf-llama": ("gguf-llama", gguf_table),
        "gguf-loss": ("gguf-loss", gguf_loss_table),
    }
    for name, (stem, table) in others.items():
        path = RESULTS / f"{stem}.json"
        if path.is_file():
            whole = json.loads(path.read_text(encoding="utf-8"))
            made[name] = lambda w=whole, t=table: t(w)
    made["int4"] = lambda: int4_table(RESULTS)
    return made | gpu_tables.tables(RESULTS) | http_table.tables(RESULTS)


def rewritten(text: str, made: dict[str, Callable[[], str]]) -> str:
    """Return ``text`` with all known tables written again."""

    def block(match: re.Match[str]) -> str:
        table = made.get(match[2])
        return match[0] if table is None else f"{match[1]}{table()}\n{match[3]}"

    return BLOCK.sub(block, text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args(arguments)
    made, stale = tables(), []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = rewritten(text, made)
        if new != text:
            stale.append(page.name)
            if not given.check:
                page.write_text(new, encoding="utf-8")
    print(f"{'stale' if given.check else 'rewritten'}: {', '.join(stale) or 'nothing'}")
    return 1 if given.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
