"""Limits of a GPU: a copy's bandwidth, a product's rate, the gap between kernels."""

from __future__ import annotations

import subprocess
import time
from typing import Any

import torch

from lfm2_fast.cli.machine_load import quantile

# As many launches as a step of the 16-layer models has: 4 a conv layer, 5 an attention layer.
EMPTY_KERNELS = 73
REPLAYS = 100


class DeviceClock:
    """Events on the device, in its own order of work."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.moments: list[Any] = []

    def mark(self) -> None:
        if not self.cuda:
            self.moments.append(time.perf_counter())
            return
        moment = torch.cuda.Event(enable_timing=True)
        moment.record()
        self.moments.append(moment)

    def microseconds(self) -> list[float]:
        """Return the time from each event to the next; waits for the last."""
        pairs = list(zip(self.moments, self.moments[1:], strict=False))
        if not self.cuda:
            return [1e6 * (end - begin) for begin, end in pairs]
        torch.cuda.synchronize()
        return [1e3 * begin.elapsed_time(end) for begin, end in pairs]


def quantiles(values: list[float]) -> dict[str, float]:
    return {f"p{q}": round(quantile(values, q / 100), 2) for q in (10, 50, 90)}


def copy_bandwidth(device: torch.device, nbytes: int) -> float:
    """Gigabytes a second, read and written, of the device copying its memory."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target, clock = torch.empty_like(source), DeviceClock(device)
    for _ in range(20):
        clock.mark()
        target.copy_(source)
    clock.mark()
    return round(2 * nbytes / quantiles(clock.microseconds())["p50"] / 1e3, 1)


def matmul_rate(device: torch.device, size: int) -> float:
    """Teraflops a second of the library's product of two random bfloat16 matrices of that size."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    clock = DeviceClock(device)
    for _ in range(25):
        clock.mark()
        torch.mm(a, b)
    clock.mark()
    # The first ones choose the library's kernel and raise the clocks.
    # Rounded to digits, because a busy CPU's rate must not become 0: others divide by it.
    return float(f"{2 * size**3 / quantiles(clock.microseconds()[5:])['p50'] / 1e6:.4g}")


def empty_kernels(device: torch.device) -> dict[str, Any]:
    """Microseconds of a graph of kernels that do nothing, with and without dependent launch."""
    import triton
    import triton.language as tl

    @triton.jit
    def nothing(x_ptr, DEPENDENT: tl.constexpr):
        if DEPENDENT:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()

    x, found = torch.empty(1, device=device), {}
    for dependent in (False, True):
        options = {"launch_pdl": True} if dependent else {}
        nothing[(1,)](x, DEPENDENT=dependent, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(EMPTY_KERNELS):
                nothing[(1,)](x, DEPENDENT=dependent, **options)
        clock = DeviceClock(device)
        for _ in range(REPLAYS):
            clock.mark()
            graph.replay()
        clock.mark()
        found["dependent" if dependent else "plain"] = quantiles(clock.microseconds())
    return {"kernels": EMPTY_KERNELS, "us": found}


def told_by_driver() -> str:
    """Return the GPU's name, driver, clocks and power limit, from its driver."""
    query = "name,driver_version,clocks.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
