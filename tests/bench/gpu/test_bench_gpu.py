"""GPU benchmarks, run on a CPU with a small model: there is no GPU to time here."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast
from bench.gpu import decode, isolated, peers, steps, tune
from bench.gpu.steps import Decoding, prefill_flops
from bench.report import gpu_goals, gpu_tables, tables
from bench.report.results import Figure
from bench.shapes import SIZES, config_of
from bench.worker import GPU_ENGINES, EngineError
from lfm2_fast.weights.fusion import num_parameters

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ROOT / "lfm2_fast" / "tiny" / "config.json"
ON_CPU = ["--device", "cpu", "--config", str(CONFIG)]


@pytest.fixture
def two_layers(tmp_path: Path) -> Path:
    """The small checkpoint's config, with a third of its layers."""
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    config |= {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def test_it_measures_and_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "GATE_TOKENS", 12)
    out = tmp_path / "results" / "gpu.json"
    decode.main([*ON_CPU, "--out", str(out), "--seconds", "0"])
    found = json.loads(out.read_text(encoding="utf-8"))
    assert all(found["gate"]["tokens_are_the_references"].values())
    decoded = found["decode"]["config"]["context 128"]
    assert decoded["us"]["p10"] > 0 and decoded["share_of_copy"] > 0
    late = {*found["batch"]["config"].values(), *found["first token"]["config"].values()}
    assert late == {isolated.LATE}


def test_it_measures_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in (("STEPS", 6), ("TURNS", 3), ("TURN_STEPS", 4), ("WARM", 3)):
        monkeypatch.setattr(steps, name, few)
    monkeypatch.setattr(decode, "BATCHES", (4, 2))
    monkeypatch.setattr(decode, "PROMPTS", (32, 128, 512))
    monkeypatch.setattr(decode, "CONTEXTS", (128, 256, 1024))
    monkeypatch.setattr(decode, "gate", lambda device: {"tokens_are_the_references": {}})
    monkeypatch.setattr(decode, "isolated", isolated.measure)  # here, where constants are few
    out = tmp_path / "gpu.json"
    decode.main([*ON_CPU, "--out", str(out)])
    found = json.loads(out.read_text(encoding="utf-8"))
    kinds = ("decode", "batch", "first token", "sampled", "prefill", "host", "int8")
    rows = [found[kind]["config"] for kind in kinds]
    assert [list(row) for row in rows[:3]] == [
        ["context 128", "context 1024", "context 256"],
        ["4", "2"],
        ["128 tokens", "32 tokens", "512 tokens"],
    ]
    for row in [*rows[0].values(), *rows[1].values(), *rows[2].values(), *rows[4:6]]:
        assert row["us"]["p10"] > 0, row
    assert rows[1]["4"]["nbytes"] > rows[1]["2"]["nbytes"]
    for kind in ("sampled", "int8"):
        low, high = found[kind]["config"]["interval"]
        assert 0 < low <= found[kind]["config"]["ratio"] <= high
    assert found["matmul_tflops"] > 0 and rows[4]["share"] > 0


def test_steps_are_those_of_generate(tiny: Path) -> None:
    model = lfm2_fast.load(tiny, device="cpu")
    decoding = Decoding(model, 2, 20, steps.WARM + 6)
    decoding.run(3)
    decoding.begin()  # again, with the same result
    decoding.run(4)
    decoding.end()
    asked = {"max_new_tokens": steps.WARM + 5, "eos_token_id": []}
    expected = model.generate([steps.prompt(20)], **asked)[0, 20:].tolist()
    for row in decoding.steps.places:
        assert row.written == expected


def test_drawn_steps_penalise_the_prompt(tiny: Path) -> None:
    model = lfm2_fast.load(tiny, device="cpu")
    decoding = Decoding(model, 1, 20, steps.WARM + 2, steps.SEEDS_SAMPLING)
    seen = decoding.steps.buffers.state.seen
    assert set(steps.prompt(20)) <= set(seen[0].nonzero()[:, 0].tolist())
    decoding.end()


@pytest.mark.parametrize("size", SIZES)
def test_flops_of_a_prompt(size: str) -> None:
    config = config_of(size)
    one, two = (prefill_flops(config, n) for n in (1, 2))
    head = 2 * config.vocab_size * config.hidden_size
    # Two for each weight that a token meets; what is no matrix is left out, and is little.
    assert one == pytest.approx(2 * num_parameters(config), rel=0.001)
    width = config.num_attention_heads * config.head_dim
    attention = 4 * width * config.layer_types.count("full_attention")
    assert two - one == one - head + attention


class StandIn:
    """An engine whose steps take ``seconds``; it fails in its ``fails``-th decoding."""

    def __init__(self, name: str, seconds: float, fails: int = 0) -> None:
        self.name, self.seconds, self.fails = name, seconds, fails
        self.decoded, self.closed = 0, False

    def ask(self, request: str, **arguments: Any) -> Any:
        if request == "decode":
            self.decoded += 1
            if self.decoded == self.fails:
                raise EngineError("it burned", self.name)
            return [self.seconds] * arguments["steps"]
        return 0.0

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def size(monkeypatch: pytest.MonkeyPatch) -> peers.Size:
    monkeypatch.setattr(peers, "judges", lambda path, device: (None, 0))
    found: dict[str, Any] = {"skipped": {}, "how": {}, "sizes": {}, "figures": [], "versions": {}}
    return peers.Size("350M", CONFIG, "cpu", found)


def test_engines_take_turns_and_one_that_fails_is_left_out(size: peers.Size) -> None:
    quick, slow = StandIn("lfm2_fast", 2e-4), StandIn("transformers", 6e-4)
    broken = StandIn("transformers compiled", 4e-4, fails=9)
    size.engines = [quick, slow, broken]  # type: ignore[list-item]
    size.measure(6, time.monotonic() + 60)
    assert size.skipped == {"transformers compiled": "it burned"} and broken.closed
    assert not (quick.closed or slow.closed)
    figures = [Figure(**row) for row in size.found["figures"]]
    assert [(f.engine, f.name, len(f.samples)) for f in figures] == [
        ("lfm2_fast", "decode 350M", 6),
        ("transformers", "decode 350M", 6),
    ]
    assert size.found["sizes"]["350M"]["transformers"]["us"]["p50"] == 600
    table = gpu_tables.peers_table(size.found, figures)
    assert "3.00 [3.00, 3.00]" in table and "Hugging Face" in table


def test_turns_end_when_the_time_is_up(size: peers.Size) -> None:
    size.engines = [StandIn("lfm2_fast", 2e-4)]  # type: ignore[list-item]
    size.measure(60, time.monotonic())
    assert size.found["sizes"]["350M"]["lfm2_fast"]["turns"] == peers.FEWEST


@pytest.mark.slow
@pytest.mark.parametrize(
    "engines",
    [
        ["lfm2_fast", "transformers compiled"],
        pytest.param(list(GPU_ENGINES), marks=pytest.mark.nightly),
    ],
    ids=len,
)
def test_peers_beside_hugging_face(
    engines: list[str],
    two_layers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, few in (("STEPS", 6), ("WARM", 2), ("CONTEXT", 20)):
        monkeypatch.setattr(peers, name, few)
    out = tmp_path / "gpu-peers.json"
    call = ["--device", "cpu", "--config", str(two_layers), "--out", str(out)]
    call += ["--engines", ",".join(engines)]
    peers.main([*call, "--rounds", "4", "--seconds", "0"])
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["skipped"] == {"config": {}}
    assert list(found["sizes"]["config"]) == engines
    assert found["how"]["config"]["transformers compiled"] == "traced alone"
    assert [(row["unit"], len(row["samples"])) for row in found["figures"]] == [("us", 4)] * len(
        engines
    )
    assert "Hugging Face, static cache, compiled" in capsys.readouterr().out


@pytest.mark.parametrize("program", [decode, peers, tune])
def test_without_a_gpu_it_says_so(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        program.main([])


def us(middle: float) -> dict[str, Any]:
    return {"us": {"p10": 0.9 * middle, "p50": middle, "p90": 1.2 * middle}}


def made_up() -> tuple[dict[str, Any], dict[str, Any]]:
    """Result files that no GPU has written."""
    head = {
        "when": "2020-01-01T00:00:00+00:00",
        "commit": "0" * 12,
        "changed_files": 0,
        "machine": {"name": "a GPU"},
        "versions": {"torch": "0.0"},
    }
    decoded = {"nbytes": 700e6, "share_of_copy": 0.5, "peak_bytes": 1e9}
    alone = {
        **head,
        "copy_gb_s": 3000.0,
        "matmul_tflops": 800.0,
        "empty_kernels": {"kernels": 73, "us": {"plain": us(90)["us"], "dependent": us(60)["us"]}},
        "decode": {
            "350M": {"context 128": {**us(466.667), **decoded}, "context 32768": isolated.LATE},
            "1.2B": {"context 128": {**us(900), **decoded, "nbytes": 2.4e9}},
        },
        "batch": {"1.2B": {"64": {**us(2560), **decoded}, "2": {**us(950), **decoded}}},
        "kernels": {"350M": {"context 128": {"kernels": 74}}, "1.2B": {"64": {"kernels": 99}}},
        "first token": {"1.2B": {"128 tokens": {**us(2000), "over_floor": 2.5}}},
        "sampled": {"350M": {"ratio": 1.02, "interval": [1.0, 1.05], "us": SIDES}},
        "int8": {"2.6B": {"ratio": 0.5, "interval": [0.49, 0.52], "us": SIDES}},
        "prefill": {"1.2B": {**us(40000), "flops": 16e12, "share": 0.5}},
        "host": {"350M": us(470)},
    }
    samples = {"lfm2_fast": [500.0] * 4, "transformers compiled": [1500.0] * 4}
    beside = {
        **head,
        "protocol": {"order": "In turns"},
        "skipped": {"1.2B": {"all": peers.LATE}},
        "how": {"350M": {"transformers compiled": "one graph"}, "1.2B": {}},
        "sizes": {"350M": {"lfm2_fast": us(500), "transformers compiled": us(1500)}},
        "figures": [
            {"name": "decode 350M", "engine": name, "unit": "us", "samples": found}
            for name, found in samples.items()
        ],
    }
    return alone, beside


SIDES = {"first": {"p50": 510.0}, "second": {"p50": 500.0}}


def test_goals_are_judged_from_both_files() -> None:
    alone, beside = made_up()
    figures = [Figure(**row) for row in beside["figures"]]
    found = {v.what: v for v in gpu_goals.verdicts(alone, figures)}
    reached = {what: verdict.reached for what, verdict in found.items()}
    assert reached == {
        "350M, % of the copy": "must",  # 50
        "1.2B, % of the copy": "aim",  # 89
        "350M, times Hugging Face compiled": "must",  # 3
        "350M, % slower when sampling": "must",  # 2
        "1.2B, % of a matmul in prefill 8k": "must",  # 50
        "1.2B, first token of 128, over its floor": "must",  # 2.5
        "1.2B, tokens/s at batch 64": "must",  # 25,000
        "2.6B, int8's time over bf16's": "aim",
    }
    share = found["350M, % of the copy"]
    assert (share.value, share.low, share.high) == pytest.approx((50, 41.67, 55.56), rel=1e-3)
    assert gpu_goals.verdicts({}, []) == []


def test_tables_come_from_the_files_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu_tables.tables(tmp_path) == {}
    red = {"gate": {"tokens_are_the_references": {"greedy": False}}}
    (tmp_path / "gpu.json").write_text(json.dumps(red), encoding="utf-8")
    assert gpu_tables.tables(tmp_path) == {}
    alone, beside = made_up()
    (tmp_path / "gpu.json").write_text(json.dumps(alone), encoding="utf-8")
    made = gpu_tables.tables(tmp_path)
    assert "gpu-peers" not in made
    (tmp_path / "gpu-peers.json").write_text(json.dumps(beside), encoding="utf-8")
    made = {name: make() for name, make in gpu_tables.tables(tmp_path).items()}
    assert "| 350M | 128     | 467        | 420 to 560   | 2,143" in made["gpu-decode"]
    assert isolated.LATE not in made["gpu-decode"] and "| 1.00 " in made["gpu-decode"]
    assert made["gpu-batch"].index("| 2 ") < made["gpu-batch"].index("| 64 ")
    assert " 74 " in made["gpu-decode"] and " 99 " in made["gpu-batch"]
    assert "None" not in made["gpu-decode"] + made["gpu-batch"]
    assert "25,000" in made["gpu-batch"] and "2.50" in made["gpu-first-token"]
    assert "1.020 [1.000, 1.050]" in made["gpu-comparisons"]
    assert "467 on the device" in made["gpu-rest"]
    assert "60.0 with dependent launch" in made["gpu-limits"]
    assert "3.00 [3.00, 3.00]" in made["gpu-peers"]
    assert "350M compiled: one graph." in made["gpu-peers-conditions"]
    assert f"Left out of 1.2B: all ({peers.LATE})" in made["gpu-peers-conditions"]
    assert "| aim     |" in made["gpu-goals"]

    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    new = tables.rewritten(page, tables.tables())
    for table in made.values():
        assert table in new
