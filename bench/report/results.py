"""Result files: what was measured, where, by which commit and protocol, as JSON.

A figure is a name, a unit and its samples, so that a reader can judge its spread.
pytest-benchmark's own files are read as well.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lfm2_fast.cli.environment import hardware, versions

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


def made_here() -> Path:
    """Return the folder for a run's files: ``$OUT`` if it is set."""
    return Path(os.environ.get("OUT") or RESULTS)


@dataclass(frozen=True)
class Figure:
    """Samples of one quantity: of tokens/s more is better, of s, us and bytes less."""

    name: str
    engine: str
    unit: str
    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def more_is_better(self) -> bool:
        return self.unit.endswith("/s")


def header(
    what: str, protocol: dict[str, Any], device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Header of every result file. ``device`` was measured, by the code of ``commit()``."""
    return {
        "what": what,
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **commit(),
        "machine": hardware(torch.device(device)),
        "versions": versions(),
        "protocol": protocol,
    }


def commit() -> dict[str, Any]:
    """Return the commit that runs, and the number of changed files, None without git.

    For a copy without ``.git``, ``$LFM2_FAST_COMMIT`` has the result of ``git describe --always
    --dirty`` in the original. Without it the commit is "unknown".
    """
    if known := os.environ.get("LFM2_FAST_COMMIT"):
        return {"commit": known, "changed_files": None}
    found = git("rev-parse", "--short=12", "HEAD")
    if not found:
        return {"commit": "unknown", "changed_files": None}
    changed = git("status", "--porcelain", "--untracked-files=no").count("\n")
    return {"commit": found, "changed_files": changed}


def commit_of(found: dict[str, Any]) -> str:
    """Write the commit of a result file, for a sentence."""
    changed = found["changed_files"]
    return f"commit {found['commit']}" + (f" with {changed} files changed" if changed else "")


def write(path: Path, found: dict[str, Any]) -> None:
    """Write a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def as_json(figures: list[Figure]) -> list[dict[str, Any]]:
    """Figures for a file, to six digits."""
    rows = [asdict(figure) for figure in figures]
    for row in rows:
        row["samples"] = [float(f"{x:.6g}") for x in row["samples"]]
    return rows


def read(path: Path) -> list[Figure]:
    """Figures of a result file, or of pytest-benchmark's ``--benchmark-json``."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if "benchmarks" in found:
        return [
            Figure(row["name"], row["group"] or "", "s", _samples(row["stats"]))
            for row in found["benchmarks"]
        ]
    return [Figure(**row) for row in found["figures"]]


def git(*command: str) -> str:
    """Return the output of git, or "" without a repository or git."""
    try:
        done = subprocess.run(["git", *command], capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return ""
    return done.stdout if command[0] == "status" else done.stdout.strip()


def _samples(stats: dict[str, Any]) -> list[float]:
    return stats.get("data") or [stats["q1"], stats["median"], stats["q3"]]
