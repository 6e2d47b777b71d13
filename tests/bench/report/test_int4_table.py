"""The table of 4 bits says what its files say, each judged by the goals of its own shape."""

from __future__ import annotations

from pathlib import Path

from bench.report import results
from bench.report.int4_table import FILES, int4_table
from bench.report.results import Figure


def test_each_file_is_judged_by_its_goals(tmp_path: Path) -> None:
    ours, theirs = ("lfm2_fast int4", "llama.cpp Q4_0")
    rates = [
        Figure("decode", ours, "tokens/s", [105.0, 105.0]),
        Figure("decode", theirs, "tokens/s", [100.0, 100.0]),
    ]
    for size in ("350M", "1.2B"):
        found = {"figures": results.as_json(rates)}
        results.write(tmp_path / f"beside-Q4_0-{size}.json", found)
    lines = [
        [cell.strip() for cell in line.split("|")] for line in int4_table(tmp_path).splitlines()
    ]
    assert [(cells[3], cells[5], cells[6]) for cells in lines[2:]] == [
        ("1.1", "no", "`beside-Q4_0-350M.json`"),
        ("1.03", "must", "`beside-Q4_0-1.2B.json`"),
    ]
    assert all(goals for goals, _ in FILES.values())
