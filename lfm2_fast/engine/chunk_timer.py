"""ChunkTimer: seconds that chunks of prompts take on the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lfm2_fast.engine.request import Row


class ChunkTimer:
    """Times chunks without waiting: by the clock on a CPU, by events in the stream on CUDA.

    Elsewhere the clock is read when the device has finished.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: deque[tuple[list[Row], int, Any, Any]] = deque()

    @contextmanager
    def time(self, rows: Sequence[Row], tokens: int) -> Iterator[None]:
        """Time the launches of the body: a chunk of ``tokens`` in all, of these rows."""
        begin = self._mark()
        yield
        self._pending.append((list(rows), tokens, begin, self._mark()))

    def finished(self) -> Iterator[tuple[list[Row], int, float]]:
        """Yield rows, tokens and seconds of each chunk that has ended since the last call."""
        while self._pending:
            rows, tokens, begin, end = self._pending[0]
            if isinstance(end, float):
                seconds = end - begin
            elif end.query():
                seconds = begin.elapsed_time(end) / 1000
            else:
                return
            self._pending.popleft()
            yield rows, tokens, seconds

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            if self._device.type != "cpu":
                torch.accelerator.synchronize(self._device)
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
