"""Times of chunks: known at once on a CPU, when the device has come there on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lfm2_fast.engine.chunk_timer import ChunkTimer
from lfm2_fast.engine.request import Request, Row


def row() -> Row:
    return Row(0, Request([1]), 0, limit=1, arrival=0)


def test_a_cpu_knows_at_once() -> None:
    timer, one = ChunkTimer(torch.device("cpu")), row()
    with timer.time([one], 7):
        pass
    ((rows, tokens, seconds),) = timer.finished()
    assert rows == [one] and tokens == 7 and 0 <= seconds < 1
    assert list(timer.finished()) == []


def test_a_gpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.reached = False

        def record(self, stream: Any) -> None:
            marks.append(self)

        def query(self) -> bool:
            return self.reached

        def elapsed_time(self, other: Any) -> float:
            return 1000.0 * (marks.index(other) - marks.index(self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    timer, first, second = ChunkTimer(torch.device("cuda")), row(), row()
    for one, tokens in ((first, 3), (second, 5)):
        with timer.time([one], tokens):
            pass
    assert list(timer.finished()) == []
    marks[3].reached = True
    assert list(timer.finished()) == [], "chunks are told in their order"
    marks[1].reached = True
    assert list(timer.finished()) == [([first], 3, 1.0), ([second], 5, 1.0)]
