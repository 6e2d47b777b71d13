"""Tuning, in Triton's interpreter: the loop, the gate, the kept tilings, the file it writes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import tune
from bench.gpu.tune_operations import Key, OneTokenRun, keys
from bench.shapes import SIZES, config_of
from lfm2_fast import Config
from lfm2_fast.kernels.tiling import Tiling

ROOT = Path(__file__).resolve().parents[3]
ON_CPU = torch.device("cpu")
H100 = 132
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton does not interpret where there is a GPU"
)


@pytest.fixture
def small(tmp_path: Path, tiny: Path) -> Path:
    """A config with small weights, which the interpreter multiplies quickly."""
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": 48, "intermediate_size": 40, "vocab_size": 60}
    config |= {"block_auto_adjust_ff_dim": False}
    config |= {"num_attention_heads": 3, "num_key_value_heads": 1}
    path = tmp_path / "small.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A copy of the file that tuning writes."""
    path = tmp_path / "tuned.py"
    path.write_text((ROOT / "kernels" / "tuned.py").read_text(encoding="utf-8"), encoding="utf-8")
    return path


def test_every_shape_of_the_published_sizes_is_there() -> None:
    found = keys(map(config_of, SIZES))
    assert len(found) == len(set(found)) == 23
    assert {key.operation for key in found} == {
        "norm_conv",
        "norm_linear",
        "norm_swiglu",
        "linear_add",
        "head_argmax",
    }
    assert found[0] == Key("norm_swiglu", 2 * 10752, 2048)


@pytest.mark.parametrize("key", keys(map(config_of, SIZES)), ids=str)
def test_candidates_stand_around_the_rule(key: Key) -> None:
    first, *others = key.candidates(H100, 16)
    assert first == key.default(H100, 16)
    assert 4 <= len(others) < 16 and len({first, *others}) == len(others) + 1
    for tiling in (first, *others):
        tiles = -(-key.outputs // tiling.block_n)
        assert 1 <= tiling.programs <= tiles
        assert -(-tiling.programs // H100) * tiling.warps <= 16


@interpreted
@pytest.mark.parametrize(
    "operation", ["norm_conv", "norm_linear", "norm_swiglu", "linear_add", "head_argmax"]
)
def test_a_wrong_tiling_is_not_timed(
    operation: str, quick_interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = OneTokenRun(Key(operation, 42, 64), torch.float32, ON_CPU, 2)
    assert not torch.equal(*operation.weights)
    tiling = Tiling(8, 64, 4, 2)
    assert operation.wrong(tiling) is None
    # The result is compared with that of the first weight; the second gives another one.
    launch = OneTokenRun.launch
    monkeypatch.setattr(
        OneTokenRun, "launch", lambda self, w, *more: launch(self, operation.weights[1], *more)
    )
    assert "wrong" in str(operation.wrong(tiling))


def test_only_what_wins_by_more_than_chance_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    key = Key("norm_linear", 42, 24)
    rule = key.default(1, 32)
    noise = [1.0, 1.02, 0.98, 1.01, 0.99]

    def kept(first: float, again: float) -> Any:
        def in_turns(
            operation: OneTokenRun, runs: dict[Tiling, Any], turns: int
        ) -> dict[Tiling, list[float]]:
            factor = first if turns == tune.TURNS else again
            us = {tiling: [10 * n for n in noise * 3] for tiling in runs}
            other = next(tiling for tiling in runs if tiling != rule)
            us[other] = [10 * factor * n for n in noise[::-1] * 3]
            return us

        monkeypatch.setattr(tune, "in_turns", in_turns)
        monkeypatch.setattr(OneTokenRun, "wrong", lambda self, tiling: None)
        return tune.tune(key, torch.float32, ON_CPU, False)

    found = kept(0.8, 0.8)
    assert found["kept"] and found["kept"] != found["rule"] and found["interval"][1] < 0.99
    assert kept(0.8, 0.995)["kept"] is None  # the luck of the first turns
    assert "ratio" not in kept(1.2, 1.2)


def test_plans_that_fail_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(self: OneTokenRun, weight: torch.Tensor, tiling: Tiling, pdl: bool) -> None:
        raise RuntimeError("out of resources: shared memory")

    monkeypatch.setattr(OneTokenRun, "launch", launch)
    found = tune.tune(Key("linear_add", 42, 24), torch.float32, ON_CPU, False)
    assert found["kept"] is None and "us" not in found
    assert "out of resources" in found["failed"][0]["why"]


@interpreted
def test_a_dry_run_writes_both_files(
    small: Path,
    table: Path,
    tmp_path: Path,
    quick_interpreter: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tune, "TURNS", 1)
    monkeypatch.setattr(tune, "CONFIRMED", 1)
    monkeypatch.setattr(tune, "MARGIN", -9.0)  # the fastest one wins
    out = tmp_path / "tune.json"
    monkeypatch.setattr(
        Key, "candidates", lambda key, *given: [key.default(*given), Tiling(8, 256, 4, 1)]
    )
    call = ["--device", "cpu", "--config", str(small), "--table", str(table), "--out", str(out)]
    tune.main(call)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert len(found["rows"]) == len(keys([Config.from_file(small)])) and not found["late"]
    assert all(len(row["us"]) >= 1 and not row["failed"] for row in found["rows"])
    text = table.read_text(encoding="utf-8")
    kept = {(r["operation"], r["N"], r["K"]): tuple(r["kept"]) for r in found["rows"] if r["kept"]}
    assert ast.literal_eval(text.partition("Tuned] = ")[2]) == (
        {"interpreter": kept} if kept else {}
    )
    tune.main([*call, "--seconds", "0"])
    found = json.loads(out.read_text(encoding="utf-8"))
    assert (
        len(found["rows"]) == 1 and len(found["late"]) == len(keys([Config.from_file(small)])) - 1
    )


def test_the_table_is_a_file_in_ruffs_form(table: Path) -> None:
    old = table.read_text(encoding="utf-8")
    made: tune.Table = {"B": {}, "A GPU": {}}
    tune.keep(made, "A GPU", row("norm_linear", 4, 2, [1, 4, 2]))
    tune.keep(made, "A GPU", row("linear_add", 4, 2, [2, 4, 2]))
    tune.keep(made, "A GPU", row("linear_add", 4, 2, None))  # measured again, and no longer better
    tune.keep(made, "C", row("linear_add", 3, 2, [8, 8, 132]))
    new = tune.table_text(old, made)
    assert new.startswith(old.partition("TUNED")[0])
    assert ast.literal_eval(new.partition("Tuned] = ")[2]) == {
        "A GPU": {("norm_linear", 4, 2): (1, 4, 2)},
        "C": {("linear_add", 3, 2): (8, 8, 132)},
    }
    assert tune.table_text(new, {}) == old.partition("TUNED")[0] + "TUNED: dict[str, Tuned] = {}\n"
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.is_file():
        pytest.skip("ruff is not installed")
    table.write_text(new, encoding="utf-8")
    command = [str(ruff), "format", "--check", "--config", str(ROOT / "pyproject.toml"), str(table)]
    assert subprocess.run(command, capture_output=True).returncode == 0


def row(operation: str, rows: int, columns: int, kept: list[int] | None) -> dict[str, Any]:
    return {"operation": operation, "N": rows, "K": columns, "kept": kept}


def test_a_cpus_timings_do_not_reach_the_table(small: Path) -> None:
    with pytest.raises(SystemExit, match="name another --table"):
        tune.main(["--device", "cpu", "--config", str(small)])
