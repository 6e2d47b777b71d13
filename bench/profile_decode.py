"""Where the time of a decode step on the CPU goes, in eager PyTorch and on the native bodies.

    python bench/profile_decode.py tests/data/LFM2-350M.json

Both backends share one set of random weights. They take turns, a few steps each, so that whatever
else the machine does falls on both. Whole steps and single operations are timed in separate turns,
since timing every operation costs time itself. What is left of a step when its operations are taken
out is Python between them: the model, the batch, the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lfm2_fast
from lfm2_fast.cache import Cache
from lfm2_fast.checkpoint import layout
from lfm2_fast.decoder import Decoder
from lfm2_fast.sampling import SamplingParams, SamplingState

BACKENDS = ("eager", "native")
OPERATIONS = ("linear", "rms_norm", "swiglu", "gated_conv", "rope", "qk_norm_rope", "attention")


def random_weights(config: lfm2_fast.Config, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights of a fresh model, by our names."""
    torch.manual_seed(0)
    weights = {}
    for name, parts in layout(config).items():
        shape = (sum(part.rows for part in parts), *parts[0].shape[1:])
        made = torch.ones(shape) if "norm" in name else torch.randn(shape) * 0.02
        weights[name] = (made.squeeze(1) if name.endswith("conv.conv.weight") else made).to(dtype)
    return weights


class Side:
    """One backend: a model, a cache with some context, and the times of its steps."""

    def __init__(self, model: Any, context: int) -> None:
        self.model = model
        self.cache: Cache = model.new_cache(1)
        self.decoder = Decoder(model, self.cache)
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
        """The same, timing what the operations take of each step."""
        self._rewind()
        for _ in range(steps):
            spent: dict[str, list[float]] = defaultdict(list)
            kept = {name: getattr(self.model.ops, name) for name in OPERATIONS}
            for name, body in kept.items():
                setattr(self.model.ops, name, timed(body, spent[name]))
            self._step(spent["sample"])
            for name in kept:
                delattr(self.model.ops, name)
            for name, times in spent.items():
                self.operations[name].append((len(times), sum(times)))

    def _rewind(self) -> None:
        self.cache.reset()
        prompt = [1 + i % 97 for i in range(self.context)]
        self.decoder.prefill([prompt], [0])

    def _step(self, spent: list[float] | None = None) -> None:
        logits = self.decoder.step([self.token], [0])
        choose = timed(self.model.ops.sample, [] if spent is None else spent)
        self.token = int(choose(logits, self.state))


def timed(body: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        begin = time.perf_counter()
        made = body(*args)
        times.append(time.perf_counter() - begin)
        return made

    return call


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


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[int(q * (len(values) - 1))]


def microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 2)


def summary(side: Side) -> dict[str, Any]:
    """Medians, and what the fastest tenth is under, which noise from outside touches least."""
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


def machine() -> dict[str, Any]:
    model = platform.processor()
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), model)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "lfm2_fast": f"{lfm2_fast.__version__} ({commit})",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="a config.json")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=64, help="tokens before the first step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8, help="steps per turn")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    given = parser.parse_args()

    torch.set_num_threads(given.threads)
    config = lfm2_fast.Config.from_file(given.config)
    weights = random_weights(config, getattr(torch, given.dtype))
    sides = {
        name: Side(lfm2_fast.Lfm2ForCausalLM(config, dict(weights), backend=name), given.context)
        for name in BACKENDS
    }
    load = [os.getloadavg()[0]]
    for side in sides.values():
        side.turn(given.steps)
        side.steps.clear()
    for i in range(given.rounds):
        order = BACKENDS if i % 2 else BACKENDS[::-1]
        for name in order:
            sides[name].turn(given.steps)
        for name in order:
            sides[name].profiled_turn(given.steps)
    load.append(os.getloadavg()[0])
    found = {
        "what": "one decode step, batch 1, with the choice of a token",
        "model": given.config.stem,
        "dtype": given.dtype,
        "context": given.context,
        "threads": given.threads,
        "protocol": f"{given.rounds} rounds of {given.steps} steps a side, in turns",
        "load_before_and_after": [round(x, 2) for x in load],
        "machine": machine(),
        "call_us": call_cost(),
        **{name: summary(side) for name, side in sides.items()},
    }
    text = json.dumps(found, indent=2)
    print(text)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
