"""Soak: an engine under mixed traffic at a limited rate for a long time; its memory is recorded.

    python -m bench.cpu.soak --minutes 30 --rate 4

Clients arrive at random times (Poisson), sometimes many at once. ``traffic.py`` draws their
requests on the small checkpoint. Memory, pages and rates are noted every second. Afterwards every
page must be free or cached. A sample of greedy answers must equal those of each request alone,
except for near-ties. Ctrl-C ends it early with the results so far. The exit code is 1 if something
failed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

import lfm2_fast
from bench.cpu.traffic import Ask, Traffic
from bench.near_ties import alone, difference
from bench.report import results
from bench.report.soak_plot import draw, slope
from bench.shapes import TINY
from lfm2_fast.cli.machine_load import Neighbours, memory
from lfm2_fast.engine.async_engine import AsyncEngine
from lfm2_fast.engine.engine import Engine, QueueFull
from lfm2_fast.engine.request import Event
from lfm2_fast.models.lfm2 import Lfm2

MIB = 2**20
# Seconds that clients have to end after the last one has arrived.
PATIENCE = 120
# One arrival in ten is a crowd, so that rows wait and pages run out.
CROWD, CROWDED = 8, 0.1
SERIES = (
    "seconds",
    "resident_bytes",
    "running",
    "waiting",
    "pages_used",
    "pages_cached",
    "pages_free",
    "preemptions",
    "prefix_hits",
    "prompt_tokens",
    "new_tokens",
)


class Soak:
    """One soak of ``engine``: its clients, the recorded series, and the failures.

    ``kept`` has at most ``checks`` greedy answers for a check, chosen with equal probability.
    """

    def __init__(self, engine: Engine, traffic: Traffic, checks: int) -> None:
        self.engine, self.traffic, self.checks = engine, traffic, checks
        # Arrays, so that the recorded numbers do not look like a leak.
        self.series = {name: array("d") for name in SERIES}
        self.ends: Counter[str] = Counter()
        self.requests = 0
        self.failures: list[str] = []
        self.pages: dict[str, int] = {}
        self.kept: list[tuple[Ask, list[int]]] = []
        self._plain = 0
        self._keep = random.Random(1)

    async def run(self, minutes: float, rate: float, seed: int) -> bool:
        """Serve clients for ``minutes``. Return False if Ctrl-C ended it before."""
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def interrupt() -> None:
            stop.set()
            # A second one ends the program.
            loop.remove_signal_handler(signal.SIGINT)

        loop.add_signal_handler(signal.SIGINT, interrupt)
        stopped = asyncio.ensure_future(stop.wait())
        clients: set[asyncio.Task[None]] = set()
        moments = random.Random(seed)
        async with AsyncEngine(self.engine) as front:
            begin = due = loop.time()
            end = begin + 60 * minutes
            watch = asyncio.ensure_future(self._watch(begin, 60 * minutes))
            each = 1 + CROWDED * (CROWD - 1)
            while (due := due + moments.expovariate(rate / each)) < end:
                await asyncio.wait({stopped}, timeout=max(0, due - loop.time()))
                if stop.is_set():
                    break
                for _ in range(CROWD if moments.random() < CROWDED else 1):
                    client = asyncio.ensure_future(self._client(front, self.traffic.next()))
                    self.requests += 1
                    clients.add(client)
                    client.add_done_callback(clients.discard)
            if not stop.is_set():
                await asyncio.wait({stopped}, timeout=end - loop.time())
            await self._drain(clients)
            if watch.done():
                self._fail(f"nothing was noted from some moment on: {watch.exception()!r}")
            watch.cancel()
            self._account()
        loop.remove_signal_handler(signal.SIGINT)
        finished = not stop.is_set()
        stopped.cancel()
        return finished

    async def _client(self, front: AsyncEngine, ask: Ask) -> None:
        """Read a request's events, to its end or until the client leaves."""
        events: Any = front.generate(ask.request)
        tokens: list[list[int]] = [[] for _ in range(ask.request.n)]
        reasons: list[str] = []
        seen = 0
        try:
            if ask.leaves_after == 0:
                await self._leave_at_once(events)
                return
            async for event in events:
                if event.error is not None:
                    raise event.error
                if event.token is not None:
                    tokens[event.index].append(event.token)
                if event.finish_reason is not None:
                    reasons.append(event.finish_reason)
                seen += 1
                if seen == ask.leaves_after and len(reasons) < ask.request.n:
                    self.ends["left"] += 1
                    break
        except QueueFull:
            self.ends["refused"] += 1
        except Exception as error:
            self._fail(f"a client got {type(error).__name__}: {error}")
        finally:
            await events.aclose()
        self.ends.update(reasons)
        if len(reasons) == ask.request.n:
            self.traffic.answered(ask, tokens[0])
            if ask.plain:
                self._keep_some(ask, tokens[0])

    async def _leave_at_once(self, events: AsyncIterator[Event]) -> None:
        """Send a request, and disconnect before the first event, most likely."""
        self.ends["left at once"] += 1
        try:
            await asyncio.wait_for(anext(events), 0.001)
        except asyncio.TimeoutError:
            return

    def _keep_some(self, ask: Ask, tokens: list[int]) -> None:
        """Keep an answer for the check, or not, by reservoir sampling."""
        self._plain += 1
        if len(self.kept) < self.checks:
            self.kept.append((ask, tokens))
        elif (place := self._keep.randrange(self._plain)) < self.checks:
            self.kept[place] = (ask, tokens)

    async def _watch(self, begin: float, seconds: float) -> None:
        """Record the series every second, and show a line every ten seconds."""
        loop, statistics = asyncio.get_running_loop(), self.engine.statistics
        for number in range(sys.maxsize):
            await asyncio.sleep(max(0, begin + number - loop.time()))
            now = {name: getattr(statistics, name) for name in SERIES[2:]}
            now |= {"seconds": loop.time() - begin, "resident_bytes": memory()["resident"]}
            for name, values in self.series.items():
                values.append(now[name])
            if number % 10 == 0 and number:
                written = self.series["new_tokens"]
                pages = f"{now['pages_used']} used {now['pages_cached']} cached"
                print(
                    f"{number:5} of {seconds:.0f} s  {self.requests} requests  "
                    f"{(written[-1] - written[-11]) / 10:.0f} tokens/s  "
                    f"running {now['running']} waiting {now['waiting']}  pages {pages}  "
                    f"preempted {now['preemptions']}  {now['resident_bytes'] / MIB:.1f} MiB  "
                    f"failures {len(self.failures)}",
                    flush=True,
                )

    async def _drain(self, clients: set[asyncio.Task[None]]) -> None:
        """Wait for the present clients, and for the work that they left behind."""
        if clients:
            _, late = await asyncio.wait(clients, timeout=PATIENCE)
            if late:
                self._fail(f"{len(late)} clients have no end after {PATIENCE} s")
        limit = time.monotonic() + PATIENCE
        while self.engine.busy and time.monotonic() < limit:
            await asyncio.sleep(0.01)

    def _account(self) -> None:
        """Check every page and row of an idle engine."""
        pool, cache = self.engine.cache.pool, self.engine.cache
        self.pages = {"limit": pool.memory.limit, "used": pool.used}
        self.pages |= {"cached": pool.cached, "free": pool.free}
        if self.engine.busy or self.engine.rows:
            self._fail("the engine still has work after all clients have gone")
        if pool.used or pool.cached + pool.free != pool.memory.limit or any(cache.lengths):
            self._fail(f"pages are not accounted for: {self.pages}, lengths {cache.lengths}")
        if self.engine.slots.index is not None and len(self.engine.slots.index) != pool.cached:
            self._fail(
                f"the index knows {len(self.engine.slots.index)} pages, {pool.cached} are cached"
            )

    def _fail(self, message: str) -> None:
        if len(self.failures) < 20:
            self.failures.append(message)

    def check(self, model: Lfm2, exact: Lfm2) -> dict[str, Any]:
        """Compare the answers that were kept with each request's run alone."""
        parted = []
        for ask, tokens in self.kept:
            prompt, wanted = ask.request.prompt, alone(model, ask.request)[0]
            if tokens == wanted:
                continue
            found = difference(model, exact, prompt, wanted, tokens)
            if found is None:
                self._fail(f"an answer has {len(tokens)} tokens, {len(wanted)} alone")
                continue
            parted.append({**asdict(found), "near_tie": found.is_near_tie})
            if not found.is_near_tie:
                self._fail(f"an answer differs from its run alone by more than a near-tie: {found}")
        return {"checked": len(self.kept), "of": self._plain, "differ": parted}


def memory_of(series: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the resident memory's slope and range over the last two thirds of the samples."""
    first = len(series["seconds"]) // 3
    seconds, resident = (list(series[name][first:]) for name in ("seconds", "resident_bytes"))
    if len(seconds) < 2:
        return {}
    return {
        "slope_mib_per_hour": slope(seconds, resident)[0] * 3600 / MIB,
        "range_mib": (max(resident) - min(resident)) / MIB,
        "first_mib": resident[0] / MIB,
        "last_mib": resident[-1] / MIB,
        "most_mib": max(series["resident_bytes"]) / MIB,
    }


def report(soak: Soak, found: dict[str, Any], finished: bool) -> None:
    """Add a soak's findings so far to a result."""
    series, statistics = soak.series, soak.engine.statistics
    found["finished"] = finished
    found["requests"] = soak.requests
    found["kinds"] = dict(soak.traffic.kinds)
    found["ends"] = dict(soak.ends)
    found["preemptions"] = statistics.preemptions
    found["prefix_hit_share"] = statistics.prefix_hits / max(statistics.prompt_tokens, 1)
    found["new_tokens"] = statistics.new_tokens
    found["memory"] = memory_of(series)
    found["pages"] = soak.pages
    found["failures"] = soak.failures
    found["series"] = {
        name: [int(x) if x.is_integer() else round(x, 2) for x in values]
        for name, values in series.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=float, default=4, help="requests a second")
    parser.add_argument("--dtype", default="auto", help="default: the checkpoint's own")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--pages", type=int, default=16, help="few enough for preemption")
    parser.add_argument("--checks", type=int, default=60, help="greedy answers that are checked")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=results.RESULTS / "soak.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = lfm2_fast.load(TINY, device="cpu", dtype=given.dtype).network
    protocol = {name: value for name, value in vars(given).items() if name != "out"}
    protocol |= {"threads": 1, "dtype": str(model.dtype).removeprefix("torch.")}
    found = results.header("an engine under mixed requests, the small real checkpoint", protocol)
    text = (TINY / "heldout.txt").read_text(encoding="utf-8")
    ids = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(text).ids
    engine = Engine(model, max_rows=given.rows, pages=given.pages, max_waiting=256)
    soak = Soak(engine, Traffic(given.seed, ids), given.checks)
    others = Neighbours(own=[])
    finished = False
    try:
        finished = asyncio.run(soak.run(given.minutes, given.rate, given.seed))
    finally:
        found["others"] = others.seen()
        report(soak, found, finished)
        results.write(given.out, found)
    exact = lfm2_fast.load(TINY, device="cpu", dtype="float64", backend="eager").network
    found["greedy"] = soak.check(model, exact)
    results.write(given.out, found)
    for name in ("requests", "ends", "preemptions", "memory", "pages", "greedy", "failures"):
        print(f"{name}: {found[name]}")
    try:
        draw(found, given.out.with_suffix(".svg"))
    except ImportError:
        print("no plot: it needs matplotlib: pip install 'lfm2-fast[plot]'")
    raise SystemExit(bool(soak.failures))


if __name__ == "__main__":
    main()
