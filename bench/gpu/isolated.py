"""Cases in separate processes, because a process cannot go on after a kernel's fault.

Results come back one by one. After a case that failed or ended its process, the other cases get a
new process.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import lfm2_fast
from bench.report.results import write
from bench.shapes import random_weights
from lfm2_fast.cli.machine_load import memory

LATE = "not measured: the time was up"
# Seconds after which a case on a GPU counts as hanging; they include the compilation of kernels.
PATIENCE = 120

Name = tuple[str, ...]
# What is measured takes the model of its size.
Case = tuple[Name, partial[dict[str, Any]]]


def isolated(
    config: lfm2_fast.Config, device: torch.device, cases: list[Case], until: float
) -> Iterator[tuple[Name, Any]]:
    """Yield results of ``measure``, in as many processes as all cases need.

    Only the first case may begin after ``until``, a time of ``time.monotonic()``.
    """
    spawn, left = multiprocessing.get_context("spawn"), list(cases)
    while left:
        ours, theirs = spawn.Pipe(duplex=False)
        process = spawn.Process(target=send, args=(theirs, config, device, left, until))
        process.start()
        theirs.close()
        try:
            while True:
                answer = ours.recv()
                del left[0]
                yield answer
        except EOFError:
            process.join()
        if left and process.exitcode:
            name, _ = left.pop(0)
            yield name, f"not measured: its process ended with code {process.exitcode}"
        if time.monotonic() > until:
            yield from too_late(left)
            return


def keep(found: Iterable[tuple[Name, Any]], results: dict[str, Any], out: Path) -> None:
    """Put each result into ``results`` by the parts of its name, write ``out``, and print it."""
    for name, value in found:
        place = results
        for part in name[:-1]:
            place = place.setdefault(part, {})
        place[name[-1]] = value
        write(out, results)
        print(*name, value, flush=True)


def send(pipe: Connection, config: Any, device: torch.device, cases: Any, until: float) -> None:
    """Run ``measure`` in this process, which ends after it, or when a case hangs."""

    def watch() -> None:
        if device.type == "cuda":
            faulthandler.dump_traceback_later(PATIENCE, exit=True)

    watch()
    for answer in measure(config, device, cases, until):
        pipe.send(answer)
        watch()
    # After a fault, Python might not end in order.
    os._exit(0)


def measure(
    config: lfm2_fast.Config, device: torch.device, cases: list[Case], until: float
) -> Iterator[tuple[Name, Any]]:
    """Yield cases by name with their results, in order, up to the first that fails."""
    try:
        weights = random_weights(config, torch.bfloat16, device)
        model = lfm2_fast.Lfm2ForCausalLM(config, weights)
        del weights
    except Exception as error:
        yield from ((name, f"not measured: {why(error)}") for name, _ in cases)
        return
    for i, (name, case) in enumerate(cases):
        if i > 0 and time.monotonic() > until:
            yield from too_late(cases[i:])
            return
        found = measured(partial(case, model), device)
        yield name, found
        if isinstance(found, str):
            return


def too_late(cases: list[Case]) -> Iterator[tuple[Name, str]]:
    return ((name, LATE) for name, _ in cases)


def measured(measure: Callable[[], dict[str, Any]], device: torch.device) -> Any:
    """Result of ``measure``, with the device's peak memory, or why it failed."""
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return {**measure(), "peak_bytes": memory(device).get("peak")}
    except Exception as error:  # any kind of error: the others' figures are still useful
        return f"not measured: {why(error)}"


def why(error: Exception) -> str:
    """Error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
