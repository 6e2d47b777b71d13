"""The soak serves its traffic, reports what it measured, and fails if something is wrong."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

import lfm2_fast
from bench.cpu import soak
from bench.cpu.traffic import LONGEST, Ask, Traffic
from bench.report.soak_plot import draw, slope
from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.request import Request
from lfm2_fast.models.lfm2 import Lfm2

pytestmark = pytest.mark.bench
IDS = list(range(100, 3000))


@pytest.fixture(scope="module")
def model(tiny: Path) -> Lfm2:
    return lfm2_fast.load(tiny, device="cpu", dtype="float32").network


def made(model: Lfm2, **options: Any) -> soak.Soak:
    return soak.Soak(Engine(model, max_rows=2, pages=24, **options), Traffic(3, IDS), checks=3)


def test_a_short_soak_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "soak.json"
    few = ["--minutes", "0.04", "--rate", "15", "--checks", "3", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["soak", *few])
    with pytest.raises(SystemExit) as ended:
        soak.main()
    found = json.loads(out.read_text())
    assert ended.value.code == 0 and found["failures"] == [] and found["finished"]
    assert found["protocol"]["dtype"] == "bfloat16" and found["commit"]
    assert found["requests"] > 10 and found["new_tokens"] > 100
    assert found["greedy"]["checked"] == 3
    assert found["pages"]["used"] == 0 and found["pages"]["limit"] == 16
    lengths = {len(values) for values in found["series"].values()}
    assert len(lengths) == 1 and min(lengths) >= 3
    assert found["memory"]["last_mib"] > 50
    pytest.importorskip("matplotlib")
    drawn = out.with_suffix(".svg").read_bytes()
    draw(found, out.with_suffix(".svg"))
    assert out.with_suffix(".svg").read_bytes() == drawn and b"<svg" in drawn


def test_an_interrupt_keeps_what_there_is(model: Lfm2) -> None:
    begun = made(model)
    threading.Timer(1.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert not asyncio.run(begun.run(minutes=5, rate=10, seed=0))
    assert begun.requests and not begun.failures
    assert 2 <= len(begun.series["seconds"]) < 60


def test_a_leak_is_a_failure(model: Lfm2) -> None:
    begun = made(model)
    begun.engine.cache.pool.take(1)
    asyncio.run(begun.run(minutes=0.005, rate=1, seed=0))
    assert any("pages are not accounted for" in message for message in begun.failures)


def test_a_wrong_answer_is_a_failure(model: Lfm2, tiny: Path) -> None:
    exact = lfm2_fast.load(tiny, device="cpu", dtype="float64", backend="eager").network
    begun = made(model)
    ask = Ask(Request(IDS[:20], max_tokens=5), leaves_after=None, plain=True)
    right = soak.alone(model, ask.request)[0]
    for answer in (right, [*right[:3], 4000, right[4]], right[:4]):
        begun.kept.append((ask, answer))
    found = begun.check(model, exact)
    assert [each["place"] for each in found["differ"]] == [3] and not found["differ"][0]["near_tie"]
    assert "more than a near-tie" in begun.failures[0]
    assert begun.failures[1:] == ["an answer has 4 tokens, 5 alone"]


def test_clients_that_leave_are_counted(model: Lfm2) -> None:
    begun = made(model)
    leaving = iter([0, 1, 3] * 100)

    def ask() -> Ask:
        return Ask(Request(IDS[:300], max_tokens=200), leaves_after=next(leaving), plain=False)

    begun.traffic.next = ask  # type: ignore[method-assign]
    asyncio.run(begun.run(minutes=0.01, rate=20, seed=0))
    assert begun.failures == [] and begun.ends["left"] and begun.ends["left at once"]


def test_traffic_is_mixed_and_bounded() -> None:
    first, second = Traffic(0, IDS), Traffic(0, IDS)
    for number in range(2000):
        ask, again = first.next(), second.next()
        assert ask.request.prompt == again.request.prompt and ask.plain == again.plain
        ask.request.check(4096, 1024)
        assert 1 <= len(ask.request.prompt) <= LONGEST
        for traffic in (first, second):
            traffic.answered(ask, [number] * 50)
    assert min(first.kinds.values()) > 20 and len(first.kinds) == 16


def test_a_slope_is_that_of_least_squares() -> None:
    assert slope([0, 1, 2, 3], [1, 3, 5, 7]) == pytest.approx((2, 1))
    assert slope([0, 1, 2], [0, 1, 0]) == pytest.approx((0, 1 / 3))
