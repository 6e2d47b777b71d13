"""Facts beside a benchmark's times: spread, the memory's speed, other programs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

# Far larger than any cache, and small beside the memory of a machine that runs these models.
COPIED = 1 << 28
PROC = Path("/proc")
# A figure is called unsafe above these limits: the ninetieth percentile of the times over their
# median, and the processors that other programs used meanwhile.
WIDE = 1.25
BUSY = 0.15


def quantile(values: Iterable[float], q: float) -> float:
    """``q``-quantile, interpolated between neighbours."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, tenth, ninetieth and ninety-ninth percentile."""
    return {f"p{q}": quantile(values, q / 100) for q in (50, 10, 90, 99)}


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def memory_speed(device: torch.device, rounds: int = 15) -> dict[str, float]:
    """Bytes a second of a copy in memory (reads and writes counted) and of a sum (reads only).

    Both are medians. Decoding only reads, and on many machines reading is faster.
    """
    source = torch.ones(COPIED // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    work: dict[str, tuple[Callable[[], Any], int]]
    work = {"copy": (lambda: target.copy_(source), 2 * COPIED), "read": (source.sum, COPIED)}
    found = {}
    for name, (call, moved) in work.items():
        times = []
        for _ in range(rounds + 2):
            synchronize(device)
            begin = time.perf_counter()
            call()
            synchronize(device)
            times.append(time.perf_counter() - begin)
        found[name] = moved / quantile(times[2:], 0.5)
    return found


def memory(device: torch.device | None = None, pid: int | None = None) -> dict[str, int]:
    """Bytes that a process holds and its peak; on a GPU the bytes that torch took.

    On a CPU they come from Linux's /proc. Elsewhere the result is empty.
    """
    if device is not None and device.type == "cuda":
        return {
            "resident": torch.cuda.memory_allocated(device),
            "peak": torch.cuda.max_memory_allocated(device),
        }
    names = {"VmRSS": "resident", "VmHWM": "peak"}
    found = {}
    path = PROC / str(pid or "self") / "status"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        key, _, value = line.partition(":")
        if key in names:
            found[names[key]] = int(value.split()[0]) * 1024
    return found


class Neighbours:
    """Work of other processes between construction and ``seen``; ``own`` are the measured ones.

    Ended children of the measured processes belong to them. Reads Linux's /proc; elsewhere the
    result is empty.
    """

    def __init__(self, own: Iterable[int] | None = None) -> None:
        self.own = {os.getpid(), *(own or ())}
        self.begin = time.perf_counter()
        self.total, self.stolen = _processors()
        self.each = _processes(self.own)

    def seen(self) -> dict[str, Any]:
        """Processors that others used on average, those that the host took, and the busiest
        programs.
        """
        if not self.each:
            return {}
        ticks = os.sysconf("SC_CLK_TCK") * (time.perf_counter() - self.begin)
        total, stolen = _processors()
        used = {
            pid: (name, spent - self.each.get(pid, (name, 0))[1])
            for pid, (name, spent) in _processes(self.own).items()
        }
        ours = sum(spent for pid, (_, spent) in used.items() if pid in self.own)
        by_name: dict[str, float] = {}
        for pid, (name, spent) in used.items():
            if pid not in self.own and spent > 0:
                by_name[name] = by_name.get(name, 0) + spent
        most = sorted(by_name.items(), key=lambda item: -item[1])[:3]
        return {
            "processors_used_by_others": round(max(0.0, total - self.total - ours) / ticks, 3),
            "processors_taken_by_the_host": round((stolen - self.stolen) / ticks, 3),
            "busiest": {name: round(spent / ticks, 3) for name, spent in most},
        }


def doubts(times: Sequence[float], others: dict[str, Any]) -> list[str]:
    """Reasons not to trust a figure from these times; empty if there are none."""
    found = []
    middle = quantile(times, 0.5)
    slow = quantile(times, 0.9) / middle
    if slow > WIDE:
        found.append(f"the slowest tenth of the steps took over {WIDE} times the median")
    taken = others.get("processors_used_by_others", 0.0)
    if taken > BUSY:
        names = ", ".join(others["busiest"])
        found.append(f"others used {taken:.2f} processors ({names})")
    taken = others.get("processors_taken_by_the_host", 0.0)
    if taken > BUSY:
        found.append(f"the host took {taken:.2f} processors away")
    return found


def _processors() -> tuple[int, int]:
    """Ticks that all processors worked, and ticks that a virtual machine's host took from them."""
    path = PROC / "stat"
    if not path.is_file():
        return 0, 0
    numbers = [int(x) for x in path.read_text(encoding="ascii").splitlines()[0].split()[1:]]
    user, nice, system, _, _, irq, softirq, stolen = numbers[:8]
    return user + nice + system + irq + softirq, stolen


def _processes(parents: Container[int]) -> dict[int, tuple[str, int]]:
    """Name and ticks of every living process; for ``parents`` with the ticks of ended children."""
    found = {}
    for path in PROC.glob("[0-9]*/stat"):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # it has ended meanwhile
        name = text[text.index("(") + 1 : text.rindex(")")]
        fields = text[text.rindex(")") + 2 :].split()
        pid = int(path.parent.name)
        found[pid] = (name, sum(int(x) for x in fields[11 : 15 if pid in parents else 13]))
    return found
