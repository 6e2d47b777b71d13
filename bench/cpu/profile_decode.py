"""Time of a CPU's decode step by operation, in eager PyTorch and in the native code.

    python -m bench.cpu.profile_decode --size 350M

Both backends share one set of random weights. They take turns, a few steps each, so that other load
of the machine affects both. Whole steps and single operations are timed in separate turns, since
timing every operation costs time itself. Operations are the fused ones, with all that they call, or
those that a CPU graph replays. The rest of a step is Python between them: the model, the batch, the
cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import lfm2_fast
from bench.report import results
from bench.report.tables import profile_table
from bench.shapes import SIZES, config_of, random_weights
from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.cli.machine_load import Neighbours, quantile
from lfm2_fast.engine import cpu_graph
from lfm2_fast.engine.model_runner import ModelRunner
from lfm2_fast.ops.sampling import SamplingParams, SamplingState

BACKENDS = ("eager", "native")
OPERATIONS = ("embed", "rope", "norm_linear", "norm_conv", "attend", "linear_add", "norm_swiglu")


class Side:
    """One backend: a model, a cache with some context, and the times of its steps."""

    def __init__(self, model: Any, context: int) -> None:
        self.ops = model.ops
        self.cache: Cache = model.new_cache(1)
        self.runner = ModelRunner(model.network, self.cache)
        self.context = context
        self.steps: list[float] = []
        self.operations: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self.token = 1
        self.state = SamplingState([SamplingParams()])

    def turn(self, steps: int) -> None:
        """Decode ``steps`` tokens from the same context on; times each step."""
        self._rewind()
        for _ in range(steps):
            begin = time.perf_counter()
            self._step()
            self.steps.append(time.perf_counter() - begin)

    def profiled_turn(self, steps: int) -> None:
        """Run a turn, and time the operations of each step."""
        self._rewind()
        self._step()  # which may record a CPU graph
        for _ in range(steps):
            spent: dict[str, list[float]] = defaultdict(list)
            with timed_operations(self.ops, spent), timed_graphs(spent):
                self._step(spent["sample"])
            for name, times in spent.items():
                self.operations[name].append((len(times), sum(times)))

    def _rewind(self) -> None:
        self.cache.reset()
        prompt = [1 + i % 97 for i in range(self.context)]
        self.runner.prefill([prompt], [0])

    def _step(self, spent: list[float] | None = None) -> None:
        logits = self.runner.step([self.token], [0])
        choose = timed(self.ops.sample, [] if spent is None else spent)
        self.token = int(choose(logits, self.state))


def timed(body: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    """Wrap ``body``, to note its seconds in ``times``."""

    def call(*args: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        made = body(*args, **named)
        times.append(time.perf_counter() - begin)
        return made

    return call


@contextmanager
def timed_operations(ops: Any, spent: dict[str, list[float]]) -> Iterator[None]:
    """Note the seconds of the fused operations, each with all that it calls."""
    inside: list[str] = []

    def wrapped(name: str, body: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if inside:
                return body(*args)
            inside.append(name)
            try:
                return timed(body, spent[name])(*args)
            finally:
                inside.pop()

        return call

    for name in OPERATIONS:
        setattr(ops, name, wrapped(name, getattr(ops, name)))
    try:
        yield
    finally:
        for name in OPERATIONS:
            delattr(ops, name)


@contextmanager
def timed_graphs(spent: dict[str, list[float]]) -> Iterator[None]:
    """Note the seconds of each operation that a CPU graph replays."""

    def replay(graph: Any) -> None:
        for operation, arguments, named in graph.recorded or ():
            # A result that is written in place belongs to the operation that writes it.
            made_by = arguments[1] if operation is cpu_graph._renew else operation
            name = made_by._schema.name.split("::")[1].removesuffix("_native")
            timed(operation, spent[name])(*arguments, **named)

    kept = cpu_graph.CpuGraph.replay
    cpu_graph.CpuGraph.replay = replay  # type: ignore[method-assign]
    try:
        yield
    finally:
        cpu_graph.CpuGraph.replay = kept  # type: ignore[method-assign]


def call_cost() -> dict[str, float]:
    """Microseconds of one native call on a row of eight numbers, and of the tensor it fills."""
    x, weight = torch.ones(1, 8), torch.ones(8)
    body = torch.ops.lfm2_fast.rms_norm_native.default
    calls = {
        "native operation": lambda: body(x, weight, 1e-5, x),
        "new tensor": lambda: x.new_empty(1, 8),
        "torch addition": lambda: x + x,
    }
    costs = {}
    for name, call in calls.items():
        rounds = []
        for _ in range(200):
            begin = time.perf_counter()
            for _ in range(200):
                call()
            rounds.append((time.perf_counter() - begin) / 200)
        costs[name] = microseconds(quantile(rounds, 0.1))
    return costs


def microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 2)


def summary(side: Side) -> dict[str, Any]:
    """Return medians, and the tenth percentile, which other load changes least."""
    ways = {"p10_us": lambda times: quantile(times, 0.1), "median_us": statistics.median}
    step = {key: microseconds(way(side.steps)) for key, way in ways.items()}
    rows: dict[str, dict[str, Any]] = {}
    for name, found in side.operations.items():
        rows[name] = {"calls": found[0][0]}
        for key, way in ways.items():
            rows[name][key] = microseconds(way([seconds for _, seconds in found]))
    rest = {key: round(step[key] - sum(row[key] for row in rows.values()), 2) for key in ways}
    rate = round(1e6 / step["median_us"], 2)
    return {"step": step, "tokens_per_second": rate, "operations": {**rows, "the rest": rest}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="350M", choices=SIZES)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=64, help="tokens before the first step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8, help="steps per turn")
    parser.add_argument("--out", type=Path, help="default: bench/results/profile-SIZE.json")
    given = parser.parse_args()

    torch.set_num_threads(given.threads)
    config = config_of(given.size)
    weights = random_weights(config, getattr(torch, given.dtype))
    sides = {
        name: Side(lfm2_fast.Lfm2ForCausalLM(config, dict(weights), backend=name), given.context)
        for name in BACKENDS
    }
    for side in sides.values():
        side.turn(given.steps)
        side.steps.clear()
    others = Neighbours()
    for i in range(given.rounds):
        order = BACKENDS if i % 2 else BACKENDS[::-1]
        for name in order:
            sides[name].turn(given.steps)
        for name in order:
            sides[name].profiled_turn(given.steps)
    found = results.header(
        f"where a decode step's time goes, LFM2-{given.size}'s shape, batch 1, with the choice of "
        "a token",
        {
            "dtype": given.dtype,
            "context": given.context,
            "threads": given.threads,
            "rounds": given.rounds,
            "order": f"{given.steps} steps a side and round, in turns; operations timed in others",
        },
    )
    found |= {"others": others.seen(), "call_us": call_cost()}
    found |= {name: summary(side) for name, side in sides.items()}
    out = given.out or results.RESULTS / f"profile-{given.size}.json"
    results.write(out, found)
    print(f"{profile_table(found)}\n\nwritten: {out}")


if __name__ == "__main__":
    main()
