"""Time this package beside Hugging Face on a GPU: what ``make bench-gpu-peers`` runs.

    python -m bench.gpu.peers --seconds 500

Each engine has its own process, because a compiler's settings, graphs and memory pools belong to a
process. A crash then affects no other engine. They use the GPU in turns. Sizes run one after
another, the most important first. An engine whose logits are not those of the reference in float32
is left out. This package and eager Hugging Face are timed before the third is compiled, and all
three after it. So every row is complete, whenever the time is up.

``--device cpu --config FILE`` runs the same code on a small model, to see that it runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lfm2_fast
from bench import gate
from bench.gate import PROMPT, distance, wrong_logits
from bench.gpu.limits import quantiles, told_by_driver
from bench.report import results
from bench.report.gpu_tables import peers_table
from bench.report.results import Figure
from bench.shapes import ROOT, random_weights
from bench.worker import GPU_ENGINES, EngineError, Remote

SIZES = ("350M", "1.2B", "2.6B", "700M")
CONTEXT, STEPS, WARM = 128, 64, 8
# The prompt's logits, then steps: run, captured, and twice replayed.
CHECKED = 5
FEWEST = 4
LATE = "not measured: the time was up"


def turn(engine: Remote) -> list[float]:
    """Microseconds of each step after the same context."""
    engine.ask("start", batch=1, context=CONTEXT, room=WARM + STEPS)
    engine.ask("decode", steps=WARM)
    return [1e6 * seconds for seconds in engine.ask("decode", steps=STEPS)]


def in_turns(engines: Sequence[Remote], rounds: int, until: float) -> dict[str, list[list[float]]]:
    """Run turns of each engine, back and forth, for ``rounds`` or until the time ``until``."""
    found: dict[str, list[list[float]]] = {engine.name: [] for engine in engines}
    for engine in engines:
        turn(engine)
    for i in range(rounds):
        if i >= FEWEST and time.monotonic() > until:
            break
        for engine in engines if i % 2 else list(reversed(engines)):
            found[engine.name].append(turn(engine))
    return found


def judges(path: Path, device: str) -> tuple[np.ndarray, float]:
    """Return the reference's logits in float32, and the allowed error of those in bfloat16."""
    config = lfm2_fast.Config.from_file(path)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        drawn = random_weights(config, torch.bfloat16, device)
        weights = {name: weight.to(dtype) for name, weight in drawn.items()}
        with torch.no_grad():
            model = lfm2_fast.Lfm2ForCausalLM(config, weights, backend="eager")
            found.append(gate.logits(model, steps=CHECKED))
        del model, weights, drawn
    if device == "cuda":
        torch.cuda.empty_cache()
    exact, plain = found
    return exact, gate.rounding(exact, plain)


class Size:
    """One published size: its engines, and what was found of them."""

    def __init__(self, name: str, path: Path, device: str, found: dict[str, Any]) -> None:
        self.name, self.path, self.device, self.found = name, path, device, found
        self.exact, self.allowed = judges(path, device)
        self.engines: list[Remote] = []
        self.skipped = found["skipped"].setdefault(name, {})
        self.how = found["how"].setdefault(name, {})

    def open(self, name: str) -> None:
        """Make an engine, if it can run here and its logits are right."""
        begin = time.monotonic()
        try:
            engine = Remote(name, gpu=True)
        except EngineError as error:
            self._leave_out(name, str(error))
            return
        try:
            engine.ask("make", config=str(self.path), device=self.device)
            logits = engine.logits(PROMPT, CHECKED)
            wrong = wrong_logits(logits, self.exact, self.allowed)
            self.how[name] = engine.ask("how")
        except EngineError as error:
            wrong = str(error)
        if wrong:
            self._leave_out(name, wrong)
            engine.close()
            return
        self.found["versions"] |= engine.versions
        self.engines.append(engine)
        off, seconds = distance(logits, self.exact), time.monotonic() - begin
        print(f"{self.name} {name}: off by {off:.3g}, ready in {seconds:.0f} s", flush=True)

    def measure(self, rounds: int, until: float) -> None:
        """Time the engines that are there, in turns; a result replaces an earlier one.

        An engine that fails is left out, and the others start over.
        """
        turns: dict[str, list[list[float]]] = {}
        while self.engines:
            try:
                turns = in_turns(self.engines, rounds, until)
                break
            except EngineError as error:
                self._leave_out(error.engine, str(error))
                (failed,) = (e for e in self.engines if e.name == error.engine)
                self.engines.remove(failed)
                failed.close()
        name = f"decode {self.name}"
        kept = [row for row in self.found["figures"] if row["name"] != name]
        medians = {who: [quantiles(us)["p50"] for us in found] for who, found in turns.items()}
        figures = [Figure(name, who, "us", found) for who, found in medians.items()]
        self.found["figures"] = kept + results.as_json(figures)
        self.found["sizes"][self.name] = {
            who: {"us": quantiles([us for each in found for us in each]), "turns": len(found)}
            for who, found in turns.items()
        }

    def close(self) -> None:
        for engine in self.engines:
            engine.close()

    def _leave_out(self, name: str, why: str) -> None:
        self.skipped[name] = why
        print(f"left out: {self.name} {name}: {why}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--config", type=Path, help="a config.json, instead of the four sizes")
    parser.add_argument("--engines", default=",".join(GPU_ENGINES), help="names with commas")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--out", type=Path, default=results.made_here() / "gpu-peers.json")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; there is nothing to measure")

    begin = time.monotonic()
    protocol = {
        "dtype": "bfloat16",
        "batch": 1,
        "context": CONTEXT,
        "steps": STEPS,
        "rounds": given.rounds,
        "order": "Engines in turns, back and forth, each turn from the same context on; one turn "
        "each before that does not count",
        "sample": "the median of a turn's steps, in microseconds, between moments on the device",
        "gate": "logits of a prompt and of steps after it against float32",
    }
    found = results.header("decoding on a GPU, beside Hugging Face", protocol, given.device)
    found |= {"gpu": told_by_driver() if given.device == "cuda" else "", "how": {}}
    found |= {"skipped": {}, "sizes": {}, "figures": []}
    paths = {size: ROOT / "tests" / "data" / f"LFM2-{size}.json" for size in SIZES}
    if given.config:
        paths = {given.config.stem: given.config.resolve()}
    names = given.engines.split(",")
    first = [name for name in names if name != "transformers compiled"]
    took = 0.0
    for i, (name, path) in enumerate(paths.items()):
        # Making, checking and compiling grow with the layers.
        layers = lfm2_fast.Config.from_file(path).num_hidden_layers
        now = time.monotonic()
        if i and now - begin + took * layers > given.seconds:
            found["skipped"][name] = {"all": LATE}
            results.write(given.out, found)
            print(f"{name}: {LATE}", flush=True)
            continue
        size = Size(name, path, given.device, found)
        for engine in first:
            size.open(engine)
        # Half of the turns come first, in case compiling takes all of the time that is left.
        until = begin + given.seconds
        size.measure(-(-given.rounds // 2), until)
        results.write(given.out, found)
        if len(first) < len(names):
            size.open("transformers compiled")
            size.measure(given.rounds, until)
        size.close()
        results.write(given.out, found)
        took = (time.monotonic() - now) / layers
    print(f"\n{peers_table(found, [Figure(**row) for row in found['figures']])}")
    print(f"\nwritten: {given.out}")


if __name__ == "__main__":
    main()
