"""Pytest plugin that records a run of ``make nightly``: outcomes of all long proofs, as JSON.

pytest -p bench.report.nightly --nightly-record bench/results/nightly.json
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

# A report's keywords do not tell a mark from a folder's name.
MARKED = ("nightly", True)


class Recorder:
    """Counts the outcomes of all tests, and keeps outcome and seconds of those marked nightly."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begin = time.time()
        self.outcomes: Counter[str] = Counter()
        self.proofs: dict[str, dict[str, object]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A skip or an error may come from the set-up; a test that runs reports its call.
        if report.when != "call" and report.outcome == "passed":
            return
        outcome = "error" if report.when != "call" and report.failed else report.outcome
        self.outcomes[outcome] += 1
        if MARKED in report.user_properties:
            self.proofs[report.nodeid] = {"outcome": outcome, "s": round(report.duration, 1)}

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return
        from bench.report import results  # imports torch, which the workers may do without

        option = session.config.option
        asked = {"marks": option.markexpr, "left out": option.deselect or []}
        found = results.header("tests, the long proofs too", asked)
        found |= {
            "seconds": round(time.time() - self.begin),
            "outcomes": dict(sorted(self.outcomes.items())),
            "proofs": dict(sorted(self.proofs.items())),
        }
        results.write(self.path, found)


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("nightly"):
        item.user_properties.append(MARKED)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly-record", type=Path, help="JSON file to write")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--nightly-record")
    # Under pytest-xdist the controller receives every report.
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(path))
