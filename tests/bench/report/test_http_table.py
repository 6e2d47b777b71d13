"""The table of the server over HTTP says what its files say, and which goals are reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.report.http_table import INT4, INT8, OURS, tables


def write(folder: Path, kind: str, rounds: dict[str, list[dict[str, Any]]]) -> None:
    others = {"others": {OURS: {"processors_used_by_others": 0.125}}}
    told = {row: [each | others for each in all_of_row] for row, all_of_row in rounds.items()}
    head = {
        "when": "2026-11-29T10:00:00",
        "commit": "abcdef",
        "changed_files": 0,
        "machine": {"name": "A processor", "features": "avx2"},
        "protocol": {"threads": 2},
    }
    (folder / f"http-350M-{kind}.json").write_text(json.dumps({**head, "rounds": told}))


def test_ratios_are_those_of_medians(tmp_path: Path) -> None:
    rate, first = "output tokens/s", "first token p50"
    requests = [
        {OURS: {rate: mine, first: 9.0, "first token p99": 10.0}, INT8: {rate: theirs, first: 30.0}}
        for mine, theirs in ((90.0, 40.0), (110.0, 60.0))
    ]
    for each in requests:
        each[INT8]["first token p99"] = 10.0
    write(tmp_path, "int8", {"requests": requests, "cost": [{OURS: {"http": 1.2, "engine": 1.0}}]})
    write(tmp_path, "int4", {"requests": [{OURS: {rate: 30.0}, INT4: {rate: 10.0}}]})
    made = tables(tmp_path)
    lines = [line.split(" | ") for line in made["http-350M"]().splitlines()[2:]]
    assert len(lines) == 5
    cells = [[cell.strip("| ") for cell in line] for line in lines]
    assert [(line[4], line[-1]) for line in cells] == [
        ("2.00", "no"),
        ("0.30", "aim"),
        ("1.00", "no"),
        ("3.00", "aim"),
        ("1.20", "no"),
    ]
    assert cells[0][1:4] == ["90.0, 110", INT8, "40.0, 60.0"]
    assert "A processor (avx2), 2 threads" in made["http-conditions-350M"]()
    assert "0.12 processors" in made["http-conditions-350M"]()
