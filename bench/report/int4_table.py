"""Table of the goals of 4 bits, each from the result file that has its figures."""

from __future__ import annotations

from pathlib import Path

from bench.report.goals import GOALS, INT4, INT4_AT_1_2B, INT8_AS_BEFORE, Q4_K_M, verdicts
from bench.report.markdown import markdown, number
from bench.report.results import read

_OF_INT4 = {goal.name: goal for goal in GOALS if goal.ours == INT4}
_OF_Q4_K_M = [goal for goal in GOALS if goal.ours == Q4_K_M]
# Result file -> the goals that it has figures of, and a note on its figures.
FILES = {
    "int4-350M": ([_OF_INT4["memory after load"]], ""),
    "batch-int4-350M": ([_OF_INT4["decode, batch 8"]], ""),
    "beside-Q4_0-350M": (
        [_OF_INT4[name] for name in ("decode", "prefill 512", "decode after 8k")],
        "",
    ),
    "beside-Q4_0-1.2B": ([INT4_AT_1_2B], ""),
    "beside-Q4_K_M-350M": (_OF_Q4_K_M, ""),
    "before-after-350M-int8": ([INT8_AS_BEFORE], ""),
}


def int4_table(folder: Path) -> str:
    """Return a row for each goal whose result file is in ``folder``."""
    rows = []
    for stem, (goals, note) in FILES.items():
        path = folder / f"{stem}.json"
        for v in verdicts(read(path), goals) if path.is_file() else ():
            measured = f"{number(v.value)} [{number(v.low)}, {number(v.high)}]"
            rows.append(
                [
                    v.what + note,
                    measured,
                    f"{v.must:,g}",
                    f"{v.aim:,g}",
                    v.reached,
                    f"`{path.name}`",
                ]
            )
    return markdown(["ratio of medians", "measured", "must", "aim", "reached", "file"], rows)
