"""What a GPU makes of decoding, at the published shapes with random weights; written as JSON.

    python -m bench.gpu --seconds 500

First a gate: on trained weights, captured steps give the tokens of uncaptured ones, and both those
of plain PyTorch. Without it there are no figures. Then, most telling first, until the time is up:
the bandwidth of a copy, graphs of empty kernels as lower bound of a step, microseconds a token by
size and context, by batch, and the time to a first token. What was measured is written after each.

``--device cpu --config FILE`` runs the same code on a small model, to see that it runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lfm2_fast
from bench.results import header, write
from bench.shapes import ROOT, SIZES, TINY, config_of, random_weights
from lfm2_fast.bench import weight_bytes
from lfm2_fast.decoder import Decoder
from lfm2_fast.measure import quantile
from lfm2_fast.sampling import SamplingParams, SamplingState
from lfm2_fast.steps import Row, Steps

CONTEXTS = (128, 2048, 8192, 32768)
BATCHES = (2, 4, 8, 16, 32, 64)
PROMPTS = (32, 128, 512, 2048, 8192)
STEPS = 100
# As many launches as a step of the 16-layer models has: 4 a conv layer, 5 an attention layer.
EMPTY_KERNELS = 73


class Clock:
    """Moments on the device, in its own order of work."""

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
        """From each moment to the next; waits for the last."""
        pairs = list(zip(self.moments, self.moments[1:], strict=False))
        if not self.cuda:
            return [1e6 * (end - begin) for begin, end in pairs]
        torch.cuda.synchronize()
        return [1e3 * begin.elapsed_time(end) for begin, end in pairs]


def quantiles(values: list[float]) -> dict[str, float]:
    return {f"p{q}": round(quantile(values, q / 100), 2) for q in (10, 50, 90)}


def gate(device: torch.device) -> dict[str, Any]:
    """Whether tokens are right, on trained weights and in float32."""
    fast = lfm2_fast.load(TINY, device=device, dtype="float32")
    plain = lfm2_fast.load(TINY, device=device, dtype="float32", backend="eager")
    prompts = [[1, 40, 41, 42], [1, 50], [1, 60, 61, 62, 63, 64, 65], [1, 70, 71], [1, 80]]
    found = {}
    for name, arguments in (
        ("greedy", {}),
        ("sampled", {"do_sample": True, "seed": 3, "top_k": 50, "top_p": 0.9, "temperature": 0.7}),
    ):
        kwargs = {"max_new_tokens": 60, "repetition_penalty": 1.05, **arguments}
        expected = plain.generate(prompts, **kwargs)
        # The second call replays what the first has captured.
        found[name] = all(torch.equal(fast.generate(prompts, **kwargs), expected) for _ in "12")
        found[f"{name}, two rows at a time"] = torch.equal(
            fast.generate(prompts, max_batch_size=2, **kwargs), expected
        )
    return {"backend": fast.ops.name, "tokens_are_the_references": found}


def copy_bandwidth(device: torch.device, nbytes: int) -> float:
    """Gigabytes a second, read and written, of the device copying its memory."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target, clock = torch.empty_like(source), Clock(device)
    for _ in range(20):
        clock.mark()
        target.copy_(source)
    clock.mark()
    return round(2 * nbytes / quantiles(clock.microseconds())["p50"] / 1e3, 1)


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
        clock = Clock(device)
        for _ in range(STEPS):
            clock.mark()
            graph.replay()
        clock.mark()
        found["dependent" if dependent else "plain"] = quantiles(clock.microseconds())
    return {"kernels": EMPTY_KERNELS, "us": found}


def decode(model: lfm2_fast.Lfm2ForCausalLM, batch: int, context: int) -> dict[str, Any]:
    """Microseconds of a step from a context on, one after another, as ``generate`` runs them."""
    device, params = model.device, SamplingParams()
    cache = model.new_cache(batch, context + 2 * STEPS)
    steps = Steps(model, cache, batch, params, ())
    rows = [Row(i, slot=i, start=context, limit=2 * STEPS) for i in range(batch)]
    prompt = [1 + i % 97 for i in range(context)]
    logits = Decoder(model, cache).prefill([prompt], [0]).expand(batch, -1)
    for slot in range(1, batch):
        cache.copy(0, slot)
    positions = torch.full((batch,), context, device=device)
    state = SamplingState([params] * batch, positions=positions, device=device)
    steps.admit(rows, logits, state)
    for _ in range(10):  # a step as it is, the capture, and some to warm up
        steps.launch()
        list(steps.read(steps.lag))
    clock = Clock(device)
    for _ in range(STEPS):
        clock.mark()
        steps.launch()
        list(steps.read(steps.lag))
    clock.mark()
    times = clock.microseconds()
    kernels = launches(steps) if device.type == "cuda" else None
    steps.settle()
    least = weight_bytes(model) + model.config.cache_bytes(model.dtype.itemsize, batch * context)
    return {"us": quantiles(times), "kernels": kernels, "nbytes": least}


def launches(steps: Steps) -> int:
    """How many kernels one step has, as the profiler counts them in a replay."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        steps.launch()
        torch.cuda.synchronize()
    kinds = torch.autograd.DeviceType.CUDA
    names = [event.name for event in profiled.events() if event.device_type == kinds]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)


def first_token(model: lfm2_fast.Lfm2ForCausalLM, length: int) -> dict[str, float]:
    """Microseconds from a prompt on the host to its first token there."""
    prompt = torch.tensor([[1 + i % 97 for i in range(length)]])
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        model.generate(prompt, max_new_tokens=1, eos_token_id=None)
        times.append(1e6 * (time.perf_counter() - begin))
    return quantiles(times[1:])


def plan(
    configs: dict[str, lfm2_fast.Config], device: torch.device, copied: float
) -> Iterator[tuple[tuple[str, ...], Callable[[], Any]]]:
    """What to measure, by name, in order; one model is held at a time."""

    def measured(model: lfm2_fast.Lfm2ForCausalLM, batch: int, context: int) -> dict[str, Any]:
        found = decode(model, batch, context)
        rate = found["nbytes"] / found["us"]["p50"] / 1e3
        return {**found, "share_of_copy": round(rate / copied, 3)}

    for size, config in configs.items():
        weights = random_weights(config, torch.bfloat16, device)
        model = lfm2_fast.Lfm2ForCausalLM(config, weights)
        del weights
        limit = model.max_length - 2 * STEPS
        for context in (c for c in CONTEXTS if c <= limit):
            yield ("decode", size, f"context {context}"), partial(measured, model, 1, context)
        for length in (n for n in PROMPTS if n <= limit):
            yield ("first token", size, f"{length} tokens"), partial(first_token, model, length)
        for batch in BATCHES:
            context = min(CONTEXTS[0], limit)
            yield ("batch", size, str(batch)), partial(measured, model, batch, context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--config", type=Path, help="a config.json, instead of the four sizes")
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu.json")
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; there is nothing to measure")

    begin = time.monotonic()
    protocol = {"dtype": "bfloat16", "steps": STEPS, "unit": "us, p10, p50 and p90"}
    results: dict[str, Any] = {**header("decoding on a GPU", protocol), "gate": gate(device)}
    if not all(results["gate"]["tokens_are_the_references"].values()):
        sys.exit(f"tokens are wrong, and no figure is worth anything: {results['gate']}")
    cuda = device.type == "cuda"
    copied = copy_bandwidth(device, 2**30 if cuda else 2**24)
    results["copy_gb_s"] = copied
    if cuda:
        results["gpu"] = clocks()
        results["empty_kernels"] = empty_kernels(device)
    configs = {size: config_of(size) for size in SIZES}
    if given.config:
        configs = {given.config.stem: lfm2_fast.Config.from_file(given.config)}
    for i, (name, measure) in enumerate(plan(configs, device, copied)):
        place = results
        for part in name[:-1]:
            place = place.setdefault(part, {})
        late = i > 0 and time.monotonic() - begin > given.seconds
        place[name[-1]] = "not measured: the time was up" if late else measure()
        write(given.out, results)
        print(*name, place[name[-1]], flush=True)


def clocks() -> str:
    """The GPU's name, driver, clocks and power limit, as its driver tells them."""
    query = "name,driver_version,clocks.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
