"""Compare a GPU's first figures with predictions: races, rows, kernels, int8, sampling, threads.

    python -m bench.gpu.probe --seconds 500 --sizes 1.2B 350M 2.6B

``bench.gpu.decode`` measures speed; this finds where the model of the machine is wrong. Each figure
has its prediction beside it, made from machine code and arithmetic before any GPU had run the code.
Results are written after each case, as JSON. After a failure, the next case gets a new process.

``--device cpu --config FILE`` runs the same code on a small model, to see that it runs.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lfm2_fast
from bench.gpu import steps
from bench.gpu.isolated import Case, isolated, keep, too_late
from bench.gpu.limits import copy_bandwidth, quantiles, told_by_driver
from bench.report.results import header, made_here
from bench.shapes import SIZES, config_of
from lfm2_fast.cli.benchmark import bytes_read_per_step
from lfm2_fast.ops.sampling import SamplingParams

ROWS = (1, 2, 4, 8, 16, 17, 32, 64)
# Rows, context, new tokens: over the borders of splits and pages, and more rows than few.
RACES = ((1, 1, 300), (1, 500, 300), (3, 120, 300), (16, 130, 300), (20, 130, 150))
PROMPTS = (20, 100, 128, 129, 300, 512, 600)
SAMPLINGS = {
    "as checkpoints ask": steps.SEEDS_SAMPLING,
    "top-k 50, top-p 0.9": SamplingParams(do_sample=True, top_k=50, top_p=0.9),
    "top-p 0.9": SamplingParams(do_sample=True, top_p=0.9),
    "top-p 0.9, temperature 2": SamplingParams(do_sample=True, top_p=0.9, temperature=2.0),
}
# Of an H200 at 4.3 TB/s; ranges where an assumption is weak.
PREDICTED = {
    "race": "the same bits in every run",
    "share of the copy": {"350M": [0.6, 0.75], "700M": [0.7, 0.82], "1.2B": [0.78, 0.9]}
    | {"2.6B": [0.82, 0.92]},
    "rows over one": {2: 1.0, 4: 1.0, 8: 1.05, 16: 1.15, 17: 1.5, 32: 1.6, 64: 1.8},
    "kernel": "bytes of its weight at the copy's bandwidth, and 1.0 us, or 0.5 us if dependent",
    "int8 over bfloat16": {1: [0.55, 0.7], 17: [1.5, 2.2]},
    "us more than greedy": {
        "as checkpoints ask": [8, 12],
        "top-k 50, top-p 0.9": [25, 30],
        "top-p 0.9": [100, 250],
        "top-p 0.9, temperature 2": [100, 250],
    },
    "threads": "both write the same tokens, and the current stream stays",
    "first token over the floor": {128: [2.0, 3.1]},
}


def race(model: lfm2_fast.Lfm2ForCausalLM) -> dict[str, Any]:
    """Check that dependent launches, plain ones, and both repeated give the same bits."""
    plain, found = steps.plain_of(model), {}
    for rows, context, new in RACES:
        new = new if model.device.type == "cuda" else 8
        if context + new > model.config.max_position_embeddings:
            continue
        prompts = [[1 + (7 * i + 13 * r) % 97 for i in range(context)] for r in range(rows)]
        first, *others = (
            each.generate(prompts, max_new_tokens=new, eos_token_id=[]).cpu()
            for each in (model, plain, model, model, model)
        )
        same = [bool(torch.equal(first, other)) for other in others]
        found[f"{rows} rows from {context}"] = {"plain": same[0], "again": same[1:]}
    return {"found": found, "predicted": PREDICTED["race"]}


def rows(
    model: lfm2_fast.Lfm2ForCausalLM, size: str, context: int, copied: float
) -> dict[str, Any]:
    """Microseconds of a step of many rows, over one row's."""
    found: dict[int, Any] = {}
    for count in ROWS if model.device.type == "cuda" else ROWS[:2]:
        found[count] = steps.decode(model, count, context, copied)
        found[count]["over_one"] = round(found[count]["us"]["p50"] / found[1]["us"]["p50"], 3)
    share = PREDICTED["share of the copy"].get(size)  # type: ignore[attr-defined]
    return {"found": found, "predicted": {"over_one": PREDICTED["rows over one"], "share": share}}


def kernels(model: lfm2_fast.Lfm2ForCausalLM, rows: int, context: int) -> dict[str, Any]:
    """Microseconds of each kernel of a step; in dependent ones, waiting is included."""
    from torch.profiler import ProfilerActivity, profile

    found = {}
    for name, each in (("dependent", model), ("plain", steps.plain_of(model))):
        decoding = steps.Decoding(each, rows, context, 3 * steps.WARM)
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            launched = decoding.launch()
            torch.cuda.synchronize()
        averages = sorted(profiled.key_averages(), key=lambda one: -one.self_device_time_total)
        found[name] = {
            one.key[:60]: [one.count // launched, round(one.self_device_time_total / one.count, 2)]
            for one in averages[:16]
        }
        decoding.end()
    return {"found": found, "unit": "[launches a step, us each]", "predicted": PREDICTED["kernel"]}


def int8(model: lfm2_fast.Lfm2ForCausalLM, context: int, copied: float) -> dict[str, Any]:
    """Steps and a first token in 8-bit integers over those in bfloat16."""
    narrow, found = steps.narrow_of(model), {}
    for count in (1, 17) if model.device.type == "cuda" else (1,):
        us = [steps.decode(each, count, context, copied)["us"]["p50"] for each in (narrow, model)]
        found[count] = {"us": us, "ratio": round(us[0] / us[1], 3)}
    return {"found": found, "predicted": PREDICTED["int8 over bfloat16"]}


def sampling(model: lfm2_fast.Lfm2ForCausalLM, context: int) -> dict[str, Any]:
    """Microseconds that a choice of tokens takes more than the greedy one, in a step of one row."""
    found, greedy = {}, 0.0
    for name, params in {"greedy": SamplingParams(), **SAMPLINGS}.items():
        decoding = steps.Decoding(model, 1, context, steps.WARM + steps.TURN_STEPS + 2, params)
        us = quantiles(decoding.run(steps.TURN_STEPS))["p50"]
        decoding.end()
        greedy = greedy or us
        found[name] = {"us": us, "more": round(us - greedy, 2)}
    return {"found": found, "predicted": PREDICTED["us more than greedy"]}


def first_tokens(model: lfm2_fast.Lfm2ForCausalLM, copied: float) -> dict[str, Any]:
    """First tokens of prompts on both sides of the captured sizes, over the weights' floor."""
    lengths = PROMPTS if model.device.type == "cuda" else PROMPTS[:1]
    found = {length: steps.first_token(model, length, copied) for length in lengths}
    floor = round(bytes_read_per_step(model) / copied / 1e3, 1)
    predicted = PREDICTED["first token over the floor"]
    return {"found": found, "floor_us": floor, "predicted": predicted}


def threads(model: lfm2_fast.Lfm2ForCausalLM) -> dict[str, Any]:
    """Run a prompt in one thread and capture it in another that never used cuBLAS; both live."""
    prompt, found, held = [steps.prompt(100)], {}, threading.Event()

    def call(name: str, done: threading.Event) -> None:
        try:
            before = str(torch.cuda.current_stream()) if torch.cuda.is_available() else ""
            tokens = model.generate(prompt, max_new_tokens=2, eos_token_id=[])[0, -2:].tolist()
            after = str(torch.cuda.current_stream()) if torch.cuda.is_available() else ""
            found[name] = {"tokens": tokens, "stream_stays": before == after}
        except Exception as error:  # any kind of error: it is the finding
            found[name] = f"{type(error).__name__}: {error}"
        done.set()
        held.wait(120)

    for name in ("first", "second", "third"):
        done = threading.Event()
        threading.Thread(target=call, args=(name, done), daemon=True).start()
        done.wait(120)
    held.set()
    return {"found": found, "predicted": PREDICTED["threads"]}


def plan(size: str, config: lfm2_fast.Config, copied: float, device: torch.device) -> list[Case]:
    """Return the cases of a size: the least certain ones first, the profiler and threads last.

    The profiler slows what follows it, and a thread whose capture fails may leave a broken process.
    """
    context = 128 if device.type == "cuda" else 8
    cases: list[Case] = [
        (("race", size), partial(race)),
        (("rows", size), partial(rows, size=size, context=context, copied=copied)),
        (("int8", size), partial(int8, context=context, copied=copied)),
        (("sampling", size), partial(sampling, context=context)),
        (("first token", size), partial(first_tokens, copied=copied)),
    ]
    if device.type == "cuda":
        for count in (1, 16, 17):
            measure = partial(kernels, rows=count, context=context)
            cases.append((("kernels", size, str(count)), measure))
    return [*cases, (("threads", size), partial(threads))]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--config", type=Path, help="a config.json, instead of published sizes")
    parser.add_argument("--sizes", nargs="+", default=["1.2B", "350M", "2.6B"], choices=SIZES)
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--out", type=Path, default=made_here() / "gpu-probe.json")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; there is nothing to measure")
    until = time.monotonic() + given.seconds
    protocol = {"dtype": "bfloat16", "predicted": "for an H200, before any GPU had run this"}
    results = header("figures of a GPU beside predictions", protocol, device)
    copied = copy_bandwidth(device, 2**30 if device.type == "cuda" else 2**24)
    results["copy_gb_s"] = copied
    if device.type == "cuda":
        results["gpu"] = told_by_driver()
    configs = {size: config_of(size) for size in given.sizes}
    if given.config:
        configs = {given.config.stem: lfm2_fast.Config.from_file(given.config)}
    for i, (size, config) in enumerate(configs.items()):
        cases = plan(size, config, copied, device)
        late = i > 0 and time.monotonic() > until
        found = too_late(cases) if late else isolated(config, device, cases, until)
        keep(found, results, given.out)


if __name__ == "__main__":
    main()
