"""Captured work: operations recorded once and replayed, as a CUDA graph or a CPU graph."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

import torch

from lfm2_fast.engine.cpu_graph import CpuGraph

logger = logging.getLogger(__name__)

# CUDA allows one capture at a time in a process.
_capturing = threading.Lock()


class Replayable(Protocol):
    """Captured graph."""

    def replay(self) -> None: ...


class Graphs:
    """Graphs by key. Their bodies use only tensors that never move.

    All share one memory pool, because none keeps results in it: a body writes its results to
    tensors of the caller. ``capture`` makes the graph of a body; tests replace it.
    """

    def __init__(
        self, device: torch.device, capture: Callable[[Graphs, Callable[[], None]], Replayable]
    ) -> None:
        self.device = device
        self.capture = capture
        # Never released: torch's stream pool is small, and libraries keep a workspace per stream.
        self.stream: Any = None
        self._uncaptured: set[Hashable] = set()
        # Graphs whose captures failed: torch's allocator for pinned memory may still use them.
        self._failed: list[Any] = []
        self.clear()

    def clear(self) -> None:
        """Free every graph."""
        self._graphs: dict[Hashable, Replayable] = {}
        self._warm: set[Hashable] = set()
        self.pool: Any = None

    def forget_capture(self, graph: Any) -> None:
        """Clean up after a failed capture: the next one gets another pool and stream.

        Torch's allocator still serves the failed graph's pool. That must end first.
        """
        pool, self.pool, self.stream = self.pool, None, None
        self._failed.append(graph)
        # A RuntimeError means that the capture's own end has done this already.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        torch.cuda.synchronize()

    def __contains__(self, key: Hashable) -> bool:
        """Return True if there is a graph of ``key``."""
        return key in self._graphs

    def run(self, key: Hashable, body: Callable[[], None]) -> None:
        """Run ``body``, as a graph if it has run before.

        The first time it runs uncaptured: this compiles and loads kernels, which a capture must not
        do. The second time it is captured, which runs nothing, and then replayed. Later calls are
        replays. Where the capture fails, a warning says so once, and the work runs as it is from
        then on.
        """
        graph = self._graphs.get(key)
        if graph is None and (key not in self._warm or key in self._uncaptured):
            body()
            self._warm.add(key)
            return
        if graph is None:
            try:
                graph = self.capture(self, body)
            except RuntimeError as error:
                logger.warning("work %s runs uncaptured from now on: %s", key, error)
                self._uncaptured.add(key)
                body()
                return
        graph.replay()
        # Kept only after it has run: a CPU graph is recorded by its first run, which may be
        # interrupted.
        self._graphs[key] = graph


def capture_cpu(graphs: Graphs, body: Callable[[], None]) -> Replayable:
    """Return the CPU graph of ``body``; its first replay records it."""
    return CpuGraph(body)


def capture_cuda(graphs: Graphs, body: Callable[[], None]) -> Replayable:
    """Return the CUDA graph of ``body``. Raises RuntimeError where the capture fails.

    Other threads may allocate and launch meanwhile (``thread_local``). Graphs that share a pool
    must be captured on one stream. torch's default capture stream belongs to the first device that
    was used, so each ``Graphs`` has its own stream.
    """
    begin = time.perf_counter()
    with torch.cuda.device(graphs.device), _capturing, _no_collection():
        graphs.stream = graphs.stream or torch.cuda.Stream()
        graphs.pool = graphs.pool or torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would leave its stream current if the capture fails at its end.
        with torch.cuda.stream(graphs.stream):
            # Each thread has a handle of cuBLAS, and a workspace for each stream. A capture
            # refuses to make them. (pytorch/pytorch#99397)
            torch.cuda.current_blas_handle()
            try:
                _record(graph, graphs.pool, body)
            except BaseException:
                graphs.forget_capture(graph)
                raise
    logger.info("captured in %.2f s", time.perf_counter() - begin)
    return graph


def _record(graph: Any, pool: Any, body: Callable[[], None]) -> None:
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        body()
    except BaseException:
        # Ending an invalid capture raises again.
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        raise
    graph.capture_end()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Let Python collect no cycles inside, because a capture may refuse to free their memory."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
