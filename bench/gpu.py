"""What a GPU makes of decoding, at the published shapes with random weights; written as JSON.

    python -m bench.gpu --seconds 500

First a gate: on trained weights, captured steps give the tokens of uncaptured ones, and both those
of plain PyTorch. Without it there are no figures. Then what the GPU can do at the most
(``gpu_limits.py``), and twice through the sizes, most telling first, until the time is up: once for
what is meant to be reached (``gpu_goals.py``), once for the rest. What was measured is written
after each.

``--device cpu --config FILE`` runs the same code on a small model, to see that it runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lfm2_fast
from bench import gpu_steps
from bench.gpu_limits import copy_bandwidth, empty_kernels, matmul_rate, told_by_driver
from bench.gpu_steps import STEPS, TURN_STEPS, TURNS
from bench.results import header, made_here, write
from bench.shapes import SIZES, TINY, config_of, random_weights
from lfm2_fast.measure import memory

CONTEXTS = (128, 2048, 8192, 32768)
BATCHES = (64, 16, 2, 4, 8, 32)
PROMPTS = (32, 128, 512, 2048, 8192)
# The sizes for which goals are set in the first token and the largest batch, and in int8.
TELLING, INT8 = "1.2B", "2.6B"
LATE = "not measured: the time was up"


def gate(device: torch.device) -> dict[str, Any]:
    """Whether tokens are right, on trained weights and in float32."""
    fast = lfm2_fast.load(TINY, device=device, dtype="float32")
    plain = lfm2_fast.load(TINY, device=device, dtype="float32", backend="eager")
    prompts = [[1, 40, 41, 42], [1, 50], [1, 60, 61, 62, 63, 64, 65], [1, 70, 71], [1, 80]]
    penalty = {"repetition_penalty": 1.05}
    drawn = {"do_sample": True, "seed": 3, "top_k": 50, "top_p": 0.9, "temperature": 0.7}
    found = {}
    for name, given, arguments in (
        ("greedy", prompts, {}),
        ("greedy, penalised", prompts, penalty),
        ("sampled", prompts, penalty | drawn),
        ("sampled, two rows at a time", prompts, penalty | drawn | {"max_batch_size": 2}),
        ("one prompt", prompts[:1], {}),
        ("a prompt of 100 tokens", [[1 + i % 97 for i in range(100)]], {}),
        ("twenty rows", 4 * prompts, {}),
    ):
        kwargs = {"max_new_tokens": 60, **arguments}
        expected = plain.generate(given, **kwargs)
        # As it is, captured, and replayed.
        found[name] = all(torch.equal(fast.generate(given, **kwargs), expected) for _ in range(3))
    return {"backend": fast.ops.name, "tokens_are_the_references": found}


def plan(
    configs: dict[str, lfm2_fast.Config], device: torch.device, limits: dict[str, Any]
) -> Iterator[tuple[tuple[str, ...], Callable[[], Any]]]:
    """What to measure, by name, in order; one model is held at a time."""
    copied, rate = limits["copy_gb_s"], limits["matmul_tflops"]
    short, long, prompt = CONTEXTS[0], CONTEXTS[-1], PROMPTS[-1]

    def model_of(config: lfm2_fast.Config) -> lfm2_fast.Lfm2ForCausalLM:
        return lfm2_fast.Lfm2ForCausalLM(config, random_weights(config, torch.bfloat16, device))

    def decoded(model: Any, size: str, context: int) -> tuple[tuple[str, ...], Callable[[], Any]]:
        measure = partial(gpu_steps.decode, model, 1, context, copied)
        return ("decode", size, f"context {context}"), measure

    def batched(model: Any, size: str, batch: int) -> tuple[tuple[str, ...], Callable[[], Any]]:
        measure = partial(gpu_steps.decode, model, batch, short, copied)
        return ("batch", size, str(batch)), measure

    def first(model: Any, size: str, length: int) -> tuple[tuple[str, ...], Callable[[], Any]]:
        measure = partial(gpu_steps.first_token, model, length, copied)
        return ("first token", size, f"{length} tokens"), measure

    def fitting(lengths: tuple[int, ...], config: lfm2_fast.Config) -> list[int]:
        return [n for n in lengths if n <= config.max_position_embeddings - 3 * STEPS]

    alone = len(configs) == 1  # what only some sizes are asked for is then asked of this one
    for size, config in configs.items():
        model, fits = model_of(config), fitting((prompt, long), config)
        yield decoded(model, size, short)
        yield ("sampled", size), partial(gpu_steps.sampled, model, short)
        if size == TELLING or alone:
            yield first(model, size, short)
            yield batched(model, size, BATCHES[0])
        if long in fits:
            yield decoded(model, size, long)
        if prompt in fits:
            yield ("prefill", size), partial(gpu_steps.prefill, model, prompt, rate)
        if model.ops.captured is not model.ops:
            yield ("dependent", size), partial(gpu_steps.dependent, model, short)
        yield ("host", size), partial(gpu_steps.as_host_sees, model, short)
        del model
        if size == INT8 or alone:
            weights = random_weights(config, torch.bfloat16, device)
            yield ("int8", size), partial(gpu_steps.int8, config, weights, short)
            del weights
    for size, config in configs.items():
        model, known = model_of(config), size == TELLING or alone
        for length in fitting(PROMPTS, config):
            if not (known and length == short):
                yield first(model, size, length)
        for batch in BATCHES[1:] if known else BATCHES:
            yield batched(model, size, batch)
        for context in fitting(CONTEXTS[1:-1], config):
            yield decoded(model, size, context)
        del model


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--config", type=Path, help="a config.json, instead of the four sizes")
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--out", type=Path, default=made_here() / "gpu.json")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; there is nothing to measure")

    begin = time.monotonic()
    protocol = {
        "dtype": "bfloat16",
        "steps": STEPS,
        "unit": "us, p10, p50 and p90",
        "comparisons": f"{TURNS} turns of {TURN_STEPS} steps, in an order that swaps; "
        "ratios of medians of the turns' medians, with 95 percent intervals",
    }
    results = {**header("decoding on a GPU", protocol, device), "gate": gate(device)}
    if not all(results["gate"]["tokens_are_the_references"].values()):
        sys.exit(f"tokens are wrong, and no figure is worth anything: {results['gate']}")
    cuda = device.type == "cuda"
    results["copy_gb_s"] = copy_bandwidth(device, 2**30 if cuda else 2**24)
    results["matmul_tflops"] = matmul_rate(device, 8192 if cuda else 256)
    if cuda:
        results["gpu"] = told_by_driver()
        results["empty_kernels"] = empty_kernels(device)
    configs = {size: config_of(size) for size in SIZES}
    if given.config:
        configs = {given.config.stem: lfm2_fast.Config.from_file(given.config)}
    for i, (name, measure) in enumerate(plan(configs, device, results)):
        place = results
        for part in name[:-1]:
            place = place.setdefault(part, {})
        late = i > 0 and time.monotonic() - begin > given.seconds
        place[name[-1]] = LATE if late else measured(measure, device)
        write(given.out, results)
        print(*name, place[name[-1]], flush=True)


def measured(measure: Callable[[], dict[str, Any]], device: torch.device) -> Any:
    """What ``measure`` gives, with the most memory that the device held, or why it failed."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        found = measure()
    except Exception as error:  # of whatever kind: the others' figures are worth having
        return f"not measured: {type(error).__name__}: {error}".splitlines()[0]
    return {**found, "peak_bytes": memory(device).get("peak")}


if __name__ == "__main__":
    main()
