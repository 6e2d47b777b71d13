"""Counted instructions of AArch64's kernels: the goal, and that the counts are today's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench.cpu.arm_instructions import (
    CXX,
    MOST,
    OURS,
    PAIRS,
    QEMU,
    THEIRS,
    instructions,
    our_program,
)
from bench.report import results

COUNTED = {
    (figure.name, figure.engine): figure.median
    for figure in results.read(results.RESULTS / "arm-instructions.json")
}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.what)
def test_loops_need_no_more_than_llama_cpps(pair) -> None:
    assert COUNTED[pair.what, OURS] <= MOST * COUNTED[pair.what, THEIRS]


@pytest.mark.nightly
@pytest.mark.skipif(not shutil.which(CXX), reason=f"there is no {CXX}")
@pytest.mark.skipif(not shutil.which(QEMU), reason=f"there is no {QEMU}")
def test_counts_are_those_of_this_source(tmp_path: Path) -> None:
    program = our_program(tmp_path)
    for pair in PAIRS:
        found = instructions(program, pair.ours) / pair.bytes
        assert found == pytest.approx(COUNTED[pair.what, OURS], rel=0.05), pair.what
