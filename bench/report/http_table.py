"""Table of the server over HTTP, from the files http-SIZE-KIND.json in bench/results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report.goals import judged
from bench.report.markdown import markdown, number
from bench.report.results import commit_of
from bench.report.stats import ratio

OURS, INT8, INT4 = "lfm2-fast serve", "llama-server Q8_0", "llama-server Q4_0"


@dataclass(frozen=True)
class Goal:
    """Ratio of a measured row's figure to the same figure of ``peer``, with its goal.

    Where one side of the row is the other's baseline, ``figure`` and ``peer`` are their names.
    ``scale`` turns the file's seconds into the unit that ``what`` names.
    """

    what: str
    kind: str
    row: str
    figure: str
    peer: str
    must: float
    aim: float
    more_is_better: bool = False
    scale: float = 1.0


RATE, FIRST = "output tokens/s", "first token"
GOALS = (
    Goal("32 requests at once, int8: tokens/s", "int8", "requests", RATE, INT8, 2.2, 3.0, True),
    Goal("the same: s to a first token, p50", "int8", "requests", f"{FIRST} p50", INT8, 0.6, 0.4),
    Goal("the same, p99", "int8", "requests", f"{FIRST} p99", INT8, 0.6, 0.4),
    Goal("32 requests at once, int4: tokens/s", "int4", "requests", RATE, INT4, 2.0, 2.8, True),
    Goal(
        "one client, int8: ms between tokens",
        "int8",
        "client",
        "between tokens",
        INT8,
        0.9,
        0.75,
        scale=1000.0,
    ),
    Goal("second turn: s to a first token", "int8", "conversation", "second turn", INT8, 1.0, 0.7),
    Goal("edit in the middle: the same", "int8", "conversation", "edit", INT8, 1.0, 0.7),
    Goal("16 streams, int8: s over HTTP", "int8", "cost", "http", "engine", 1.1, 1.04),
    Goal(
        "a JSON schema, one client: ms between tokens",
        "int8",
        "schema",
        "schema",
        "no schema",
        1.15,
        1.03,
        scale=1000.0,
    ),
)


def samples(goal: Goal, rounds: list[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Return our figure of each round, and the peer's."""
    if goal.peer in (INT8, INT4):
        mine, theirs = ([each[side][goal.figure] for each in rounds] for side in (OURS, goal.peer))
    else:
        both = [each[OURS] for each in rounds]
        mine, theirs = ([each[side] for each in both] for side in (goal.figure, goal.peer))
    return mine, theirs


def http_table(found: Mapping[str, Any]) -> str:
    """Return the table of the files of all kinds, by their kind."""
    lines = []
    for goal in GOALS:
        rounds = found.get(goal.kind, {}).get("rounds", {}).get(goal.row)
        rounds = [
            each for each in rounds or () if OURS in each and goal.peer in {*each, *each[OURS]}
        ]
        if not rounds:
            continue
        mine, theirs = samples(goal, rounds)
        value = ratio(mine, theirs, paired=True)
        verdict = judged(goal.what, goal.must, goal.aim, value, more_is_better=goal.more_is_better)
        sides = [", ".join(number(goal.scale * each) for each in side) for side in (mine, theirs)]
        goals = [f"{goal.must:,g}", f"{goal.aim:,g}", verdict.reached]
        lines.append([goal.what, sides[0], goal.peer, sides[1], number(value[0]), *goals])
    head = ["", "each round", "beside", "each round", "ratio of medians", "must", "aim", "reached"]
    return markdown(head, lines)


def conditions(found: Mapping[str, Any]) -> str:
    """Origin of the figures, as a sentence."""
    sentences = []
    for kind, own in found.items():
        machine, protocol = own["machine"], own["protocol"]
        rounds = [each for row in own["rounds"].values() for each in row]
        seen = [side for each in rounds for side in each["others"].values()]
        most = max(side["processors_used_by_others"] for side in seen)
        sentences.append(
            f"{kind}: {own['when'][:10]}, {machine['name']} ({machine['features']}), "
            f"{protocol['threads']} threads, {commit_of(own)}; others used {most:.2f} processors "
            "at most."
        )
    return " ".join(sentences)


def tables(folder: Path) -> dict[str, Callable[[], str]]:
    """Return the blocks that can be written from the files in a folder, a table a size."""
    sizes: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("http-*-int[48].json"), reverse=True):
        _, size, kind = path.stem.split("-")
        sizes.setdefault(size, {})[kind] = json.loads(path.read_text(encoding="utf-8"))
    made: dict[str, Callable[[], str]] = {}
    for size, found in sizes.items():
        made[f"http-{size}"] = lambda f=found: http_table(f)
        made[f"http-conditions-{size}"] = lambda f=found: conditions(f)
    return made
