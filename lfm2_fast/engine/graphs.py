"""Captured work: operations recorded once and replayed, as a CUDA graph or a CPU graph."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

from lfm2_fast.engine.cpu_graph import CpuGraph

logger = logging.getLogger(__name__)

# CUDA allows one capture at a time in a process.
_capturing = threading.Lock()


class Replayable(Protocol):
    """A captured graph."""

    def replay(self) -> None: ...


class Graphs:
    """Graphs by key, of bodies that touch nothing but tensors which stay where they are.

    All share one memory pool, since none keeps results in it: a body writes what it gives to a
    tensor of the caller's. ``capture`` makes the graph of a body; it is another in tests.
    """

    def __init__(
        self, device: torch.device, capture: Callable[[Graphs, Callable[[], None]], Replayable]
    ) -> None:
        self.device = device
        self.capture = capture
        # Never released: torch's stream pool is small, and libraries keep a workspace per stream.
        self.stream: Any = None
        self.clear()

    def clear(self) -> None:
        """Free every graph."""
        self._graphs: dict[Hashable, Replayable] = {}
        self._warm: set[Hashable] = set()
        self.pool: Any = None

    def __contains__(self, key: Hashable) -> bool:
        """Return True if there is a graph of ``key``."""
        return key in self._graphs

    def run(self, key: Hashable, body: Callable[[], None]) -> None:
        """Do what ``body`` does.

        The first time it runs as it is: kernels are compiled and loaded then, which a capture must
        not do. The second time it is captured, which runs nothing, and from then on replayed.
        """
        graph = self._graphs.get(key)
        if graph is None and key not in self._warm:
            body()
            self._warm.add(key)
            return
        if graph is None:
            graph = self.capture(self, body)
        graph.replay()
        # Kept once it has run: a CPU's graph is recorded then, and may be interrupted.
        self._graphs[key] = graph


def capture_cpu(graphs: Graphs, body: Callable[[], None]) -> Replayable:
    """Return the CPU graph of ``body``; its first replay records it."""
    return CpuGraph(body)


def capture_cuda(graphs: Graphs, body: Callable[[], None]) -> Replayable:
    """The CUDA graph of ``body``.

    Other threads may allocate and launch meanwhile (``thread_local``). Graphs that share a pool
    must be captured on one stream, and torch's own default stream for that belongs to whichever
    device came first; so there is one for each ``graphs``.
    """
    begin = time.perf_counter()
    with torch.cuda.device(graphs.device), _capturing:
        graphs.stream = graphs.stream or torch.cuda.Stream()
        graphs.pool = graphs.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph,
            pool=graphs.pool,
            stream=graphs.stream,
            capture_error_mode="thread_local",
        ):
            body()
    logger.info("captured in %.2f s", time.perf_counter() - begin)
    return graph
