"""Tools of benchmarks: spread, other programs, the gate, peers, goals, tables, the command."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lfm2_fast
from bench import gate
from bench.operations import OPERATIONS, Setup, least_bytes
from bench.report import compare, results, tables
from bench.report.goals import GOALS, verdicts
from bench.report.results import Figure
from bench.report.stats import ratio
from bench.shapes import SIZES, config_of
from bench.worker import EngineError, Remote
from lfm2_fast import __main__
from lfm2_fast.cli.benchmark import bytes_read_per_step
from lfm2_fast.cli.benchmark_report import cells, show
from lfm2_fast.cli.machine_load import Neighbours, doubts, quantile, spread
from lfm2_fast.ops.select import why_not

STEP = {"tokens": 1, "sequences": 2, "context": 24, "layers": 3}


def test_quantiles_interpolate() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.9) == pytest.approx(9.0)
    assert spread([5.0]) == {"p50": 5.0, "p10": 5.0, "p90": 5.0, "p99": 5.0}


def test_doubts_name_spread_and_other_programs() -> None:
    quiet = {
        "processors_used_by_others": 0.01,
        "processors_taken_by_the_host": 0.0,
        "busiest": {},
    }
    assert doubts([1.0] * 20, quiet) == []
    assert doubts([1.0] * 20, {}) == []
    assert len(doubts([1.0] * 10 + [2.0] * 10, quiet)) == 1
    busy = {**quiet, "processors_used_by_others": 0.8, "busiest": {"compiler": 0.8}}
    assert "compiler" in doubts([1.0] * 20, busy)[0]
    taken = {**quiet, "processors_taken_by_the_host": 0.5}
    assert "host" in doubts([1.0] * 20, taken)[0]


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="it reads Linux's /proc")
def test_neighbours_see_another_program_and_not_our_own() -> None:
    spin = "import time\nend = time.process_time() + 0.6\nwhile time.process_time() < end: pass"
    with subprocess.Popen(
        [sys.executable, "-c", f"{spin}\nimport sys; sys.stdin.read()"], stdin=subprocess.PIPE
    ) as other:
        before, mine = Neighbours(), Neighbours(own=[other.pid])
        time.sleep(1.2)
        found, without = before.seen(), mine.seen()
        assert other.stdin is not None
        other.stdin.close()
    assert found["processors_used_by_others"] > 0.2
    assert any(name.startswith("python") for name in found["busiest"])
    assert without["processors_used_by_others"] < found["processors_used_by_others"] - 0.1


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="it reads Linux's /proc")
def test_a_program_that_we_started_and_that_has_ended_is_our_own() -> None:
    spin = "import time\nwhile time.process_time() < 0.4: pass"
    subprocess.run([sys.executable, "-c", spin], check=True)
    user, system, *children, _ = os.times()
    assert sum(children) > 0.3
    _, ticks = Neighbours().each[os.getpid()]
    assert ticks / os.sysconf("SC_CLK_TCK") > user + system + sum(children) - 0.1


def test_bench_writes_figures_that_fit_together(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["bench", str(tiny), "--prompt", "4,9", "--output", "3", "--batch", "1,2"]
    with pytest.raises(SystemExit) as ended:
        __main__.main([*call, "--rounds", "2", "--json", "--device", "cpu"])
    out, err = capsys.readouterr()
    assert not ended.value.code, err
    found = json.loads(out)
    model = lfm2_fast.load(tiny, device="cpu")
    assert found["model"]["weight_bytes"] == model.num_parameters() * model.dtype.itemsize
    assert found["load_seconds"] > 0 and found["warm_up_seconds"] > 0
    assert [(row["batch"], row["prompt"]) for row in found["rows"]] == [
        (1, 4),
        (1, 9),
        (2, 4),
        (2, 9),
    ]
    for row in found["rows"]:
        cached = model.network.config.cache_bytes(2, row["batch"] * (row["prompt"] + 1))
        assert row["step_bytes"] == found["model"]["weight_bytes"] + cached
        steps = row["step_seconds"]
        assert 0 < steps["p10"] <= steps["p50"] <= steps["p90"] <= steps["p99"]
        assert row["bandwidth_share"] == pytest.approx(
            row["tokens_per_second"] / row["floor_tokens_per_second"]
        )
        assert row["batch"] / steps["p99"] <= row["tokens_per_second"] * 1.001


def test_bench_shows_a_table(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["bench", str(tiny), "--prompt", "4", "--output", "2", "--batch", "1", "--rounds", "1"]
    with pytest.raises(SystemExit):
        __main__.main(call)
    out, err = capsys.readouterr()
    assert "tokens/s" in out and "warm-up" in out
    assert "meanwhile" in out
    assert "loading" in err and "loading" not in out


def figures() -> dict[str, Any]:
    """Return figures of one case, without facts about memory and other programs."""
    steps = dict.fromkeys(("p50", "p10", "p90", "p99"), 1.23456)
    row = {"prompt": 131072, "output": 1024, "batch": 256, "tokens_per_second": 12345.67}
    more = {"bandwidth_share": 0.5, "floor_tokens_per_second": 24691.34, "doubts": ["it is noisy"]}
    model = {"name": "x", "quantization": None, "dtype": "bfloat16", "backend": "eager"}
    return {
        "load_seconds": 1.0,
        "warm_up_seconds": 1.0,
        "model": {**model, "weight_bytes": 5000},
        "device": {"name": "a CPU", "threads": 2},
        "memory_bytes_per_second": {"copy": 1e10, "read": 2e10},
        "memory": {},
        "others": {},
        "rows": [{**row, "first_token_seconds": steps, "step_seconds": steps, **more}],
    }


def test_bench_shows_figures_where_memory_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    show(figures())
    out = capsys.readouterr().out
    assert "weights 5 kB; a copy moves 10 GB/s" in out


def test_bench_shows_what_is_known_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """Some kernels report the memory of a process, but not its peak."""
    show(figures() | {"memory": {"resident": 7000}})
    assert "weights 5 kB, memory 7 kB; a copy moves" in capsys.readouterr().out
    show(figures() | {"memory": {"peak": 9000, "resident": 7000}})
    assert "weights 5 kB, memory 7 kB, at most 9 kB; a copy" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_bench_cuts_no_figure_off(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    found = figures()
    show(found)
    words = capsys.readouterr().out.split()
    assert {*cells(found["rows"][0]), "unsafe"} <= set(words)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--batch", "0", "--batch must be counts"),
        ("--prompt", "1,x", "--prompt must be counts"),
        ("--plot", "no/folder/x.png", "--plot no/folder/x.png: there is no folder no/folder"),
        ("--prompt", "4000", "do not fit into the context of 2048"),
    ],
)
def test_bench_refuses_what_it_cannot_run(
    tiny: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        __main__.main(["bench", str(tiny), option, value])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_plot_names_its_extra(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as ended:
        __main__.main(["bench", str(tiny), "--plot", str(tmp_path / "x.png")])
    assert ended.value.code == 2
    assert "pip install 'lfm2-fast[plot]'" in capsys.readouterr().err


def test_plot_draws(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "x.png"
    call = ["bench", str(tiny), "--prompt", "4,8", "--output", "2", "--batch", "1,2"]
    with pytest.raises(SystemExit) as ended:
        __main__.main([*call, "--rounds", "1", "--plot", str(path)])
    assert not ended.value.code
    assert path.read_bytes().startswith(b"\x89PNG")


def test_figures_are_shown_where_the_plot_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    matplotlib = pytest.importorskip("matplotlib.figure")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lfm2_fast.cli.benchmark.load_and_measure", lambda *_, **__: figures())
    monkeypatch.setattr(matplotlib.Figure, "savefig", full)
    with pytest.raises(SystemExit) as ended:
        __main__.main(["bench", "x", "--plot", str(tmp_path / "a.svg")])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and "No space left" in err
    assert "12345.7" in out


def test_a_plot_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder is refused before anything is loaded."""
    with pytest.raises(SystemExit) as ended:
        __main__.main(["bench", "nowhere/at-all", "--plot", str(tmp_path)])
    assert ended.value.code == 2 and f"{tmp_path} is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("size", SIZES)
def test_floor_counts_the_tied_head_once(size: str) -> None:
    config = config_of(size)
    assert config.tie_word_embeddings
    assert config.cache_bytes(2) == (16384 if size == "2.6B" else 12288)


def test_weight_bytes_leave_an_untied_embedding_out(random_checkpoint: Any) -> None:
    tied = lfm2_fast.load(random_checkpoint(), device="cpu")
    untied = lfm2_fast.load(random_checkpoint(tie_word_embeddings=False), device="cpu")
    assert bytes_read_per_step(tied) == bytes_read_per_step(untied) == tied.num_parameters() * 4


@pytest.fixture(scope="module")
def exact() -> Setup:
    return Setup("350M", dtype=torch.float64, **STEP)


@pytest.fixture(scope="module")
def plain() -> Setup:
    return Setup("350M", **STEP)


def test_every_timed_operation_passes_its_gate(exact: Setup, plain: Setup) -> None:
    if lacking := why_not("native", torch.device("cpu"), torch.bfloat16):
        pytest.skip(f"the C++ bodies: {lacking}")
    native = Setup("350M", backend="native", **STEP)
    with torch.no_grad():
        for name, call in OPERATIONS.items():
            outs = call(native), call(exact), call(plain)
            assert len({len(out) for out in outs}) == 1
            for out, oracle, other in zip(*outs, strict=True):
                assert gate.wrong_operation(out, oracle, other) is None, name
            assert least_bytes(name, native) > 0


def test_the_gate_stops_what_is_wrong(plain: Setup, exact: Setup) -> None:
    with torch.no_grad():
        (good, *_), (oracle, *_) = OPERATIONS["swiglu"](plain), OPERATIONS["swiglu"](exact)
    assert gate.wrong_operation(good, oracle, good) is None
    assert gate.wrong_operation(good * 1.1, oracle, good) is not None
    assert gate.wrong_operation(torch.full_like(good, math.nan), oracle, good) is not None
    right = np.ones((2, 5), np.float32)
    allowed = gate.rounding(right, right * 1.01)
    assert gate.wrong_logits(right * 0.985, right, allowed) is None
    assert gate.wrong_logits(right * 1.03, right, allowed) is not None
    assert gate.wrong_logits(np.full_like(right, np.nan), right, allowed) is not None


def test_a_slowed_operation_is_named(
    plain: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("rms_norm", "swiglu", "gated_conv", "attention")
    body = plain.ops.swiglu

    def slowed(x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return body(x)

    times: dict[str, dict[str, list[float]]] = {side: {n: [] for n in names} for side in "ab"}
    with torch.no_grad():
        for turn in range(14):
            for side, name in ((side, name) for name in names for side in "ab"):
                plain.ops.swiglu = slowed if side == "b" else body  # type: ignore[method-assign]
                begin = time.perf_counter()
                OPERATIONS[name](plain)
                if turn > 1:
                    times[side][name].append(time.perf_counter() - begin)
    plain.ops.swiglu = body  # type: ignore[method-assign]
    for side, found in times.items():
        figures = [Figure(name, "eager", "s", samples) for name, samples in found.items()]
        results.write(tmp_path / side, {"figures": results.as_json(figures)})
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("slower: eager swiglu: ")
    assert compare.main([str(tmp_path / "b"), str(tmp_path / "a")]) in (0, 1)
    assert "faster: eager swiglu: " in capsys.readouterr().out


def test_compare_judges_by_interval_and_direction() -> None:
    steady = [1.0, 1.01, 0.99] * 4
    noisy = [1.0, 3.0, 0.5] * 4
    before = [
        Figure("rate", "x", "tokens/s", steady),
        Figure("time", "x", "s", steady),
        Figure("noise", "x", "s", noisy),
        Figure("gone", "x", "s", steady),
    ]
    after = [
        Figure("rate", "x", "tokens/s", [v / 2 for v in steady]),
        Figure("time", "x", "s", [v / 2 for v in steady]),
        Figure("noise", "x", "s", [v * 1.2 for v in noisy]),
        Figure("new", "x", "s", steady),
    ]
    found = compare.changes(before, after)
    assert [change.figure.name for change in compare.slower(found, 0.05)] == ["rate"]
    assert [change.figure.name for change in compare.faster(found, 0.05)] == ["time"]
    assert found[0].factor == pytest.approx(2.0, rel=0.05)


def test_compare_reads_pytest_benchmark(tmp_path: Path) -> None:
    bench = tmp_path / "bench_it.py"
    bench.write_text("def bench_sum(benchmark):\n    benchmark.pedantic(sum, ([1],), rounds=3)\n")
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(bench)]
    options = ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]
    subprocess.run(
        [*command, *options, f"--benchmark-json={out}"],
        check=True,
        cwd=tmp_path,
        capture_output=True,
    )
    (figure,) = results.read(out)
    assert figure.name == "bench_sum" and figure.unit == "s" and len(figure.samples) == 3


def test_ratios_have_intervals() -> None:
    assert ratio([2.0] * 5, [1.0] * 5, paired=True) == (2.0, 2.0, 2.0)
    turns = np.linspace(1, 4, 12)
    value, low, high = ratio(list(2 * turns), list(turns), paired=True)
    assert value == low == high == pytest.approx(2.0)
    _, low, high = ratio(list(2 * turns), list(turns), paired=False)
    assert low < 1.7 and high > 2.3
    with pytest.raises(ValueError, match="must have the same number"):
        ratio([1.0], [1.0, 2.0], paired=True)


def test_goals_are_judged_in_their_direction() -> None:
    figures = [
        Figure("decode", "lfm2_fast", "tokens/s", [70.0] * 4),
        Figure("decode", "transformers", "tokens/s", [30.0] * 4),
        Figure("decode", "llama.cpp BF16", "tokens/s", [100.0] * 4),
        Figure("import", "lfm2_fast", "s", [0.05] * 3),
    ]
    told = {verdict.what: verdict.reached for verdict in verdicts(figures)}
    assert told == {
        "decode against Hugging Face bf16": "must",
        "decode against llama.cpp BF16": "no",
        "seconds that import adds to torch's": "aim",
    }
    assert len({(goal.what) for goal in GOALS}) == len(GOALS)


def test_report_rewrites_only_what_it_knows() -> None:
    text = "a\n<!-- bench:x -->\nold\n<!-- /bench -->\nb\n<!-- bench:y -->\nkept\n<!-- /bench -->\n"
    new = tables.rewritten(text, {"x": lambda: "| t |"})
    assert new == text.replace("old", "| t |")
    assert tables.rewritten(new, {"x": lambda: "| t |"}) == new


def test_tables_are_what_the_results_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


@pytest.fixture(scope="module")
def remote(tiny: Path) -> Iterator[Remote]:
    engine = Remote("lfm2_fast")
    engine.ask("load", folder=str(tiny), threads=1)
    yield engine
    engine.close()


def test_an_engine_in_its_own_process_is_the_same_model(remote: Remote, tiny: Path) -> None:
    model = lfm2_fast.load(tiny, device="cpu")
    with torch.no_grad():
        assert np.array_equal(remote.logits(gate.PROMPT, 2), gate.logits(model, steps=2))
    assert remote.ask("start", batch=2, context=5, room=12) > 0
    assert len(remote.ask("decode", steps=3)) == 3
    assert len(remote.ask("decode", steps=3)) == 3


def test_an_engine_that_fails_says_why(remote: Remote, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="config.json"):
        remote.ask("load", folder=str(tmp_path), threads=1)
    assert remote.versions["torch"] == metadata.version("torch")
