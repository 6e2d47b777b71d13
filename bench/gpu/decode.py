"""Time decoding on a GPU, at the published shapes with random weights; written as JSON.

    python -m bench.gpu.decode --seconds 480

First a gate: on trained weights, captured and uncaptured steps must give plain PyTorch's tokens. If
they do not, the file has the differences instead of figures. Then come the limits of the GPU
(``limits.py``). Then all sizes run twice, the most important first, until the time is up: once for
the targets (``bench/report/gpu_goals.py``), once for the rest. Results are written after each case.
Each run of a size has its own process, and a new one after a failure, because a process does not
recover from a kernel's fault.

``--device cpu --config FILE`` runs the same code on a small model, to see that it runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

import lfm2_fast
from bench.gpu import steps
from bench.gpu.isolated import Case, isolated, keep, measured, too_late, why
from bench.gpu.limits import copy_bandwidth, empty_kernels, matmul_rate, told_by_driver
from bench.gpu.steps import STEPS, TURN_STEPS, TURNS
from bench.report.results import header, made_here, write
from bench.shapes import SIZES, TINY, config_of
from lfm2_fast.ops.select import has_dependent_launch

CONTEXTS = (128, 2048, 8192, 32768)
BATCHES = (64, 16, 2, 4, 8, 32)
PROMPTS = (32, 128, 512, 2048, 8192)
# Longest text of the gate.
GATE_TOKENS = 60
# The sizes for which goals are set in the first token and the largest batch, and in int8.
TELLING, INT8 = "1.2B", "2.6B"


def gate(device: torch.device) -> dict[str, Any]:
    """Compare tokens of trained weights in float32 with plain PyTorch's; return the differences."""
    fast = lfm2_fast.load(TINY, device=device, dtype="float32")
    plain = lfm2_fast.load(TINY, device=device, dtype="float32", backend="eager")
    prompts = [[1, 40, 41, 42], [1, 50], [1, 60, 61, 62, 63, 64, 65], [1, 70, 71], [1, 80]]
    penalty = {"repetition_penalty": 1.05}
    drawn = {"do_sample": True, "seed": 3, "top_k": 50, "top_p": 0.9, "temperature": 0.7}
    right, wrong = {}, {}
    for name, given, arguments in (
        ("greedy", prompts, {}),
        ("greedy, penalised", prompts, penalty),
        ("sampled", prompts, penalty | drawn),
        ("sampled, two rows at a time", prompts, penalty | drawn | {"max_batch_size": 2}),
        ("one prompt", prompts[:1], {}),
        ("a prompt of 100 tokens", [[1 + i % 97 for i in range(100)]], {}),
        ("twenty rows", 4 * prompts, {}),
    ):
        kwargs = {"max_new_tokens": GATE_TOKENS, **arguments}
        try:
            expected = plain.generate(given, **kwargs)
            for run in ("as it is", "captured", "replayed"):
                if found := first_difference(fast.generate(given, **kwargs), expected):
                    wrong[name] = {"run": run, **found}
                    break
        except Exception as error:  # any kind of error: the other cases help to find the reason
            wrong[name] = why(error)
        right[name] = name not in wrong
    return {
        "backend": fast.ops.name,
        "tokens_are_the_references": right,
        "first_differences": wrong,
    }


def first_difference(found: torch.Tensor, expected: torch.Tensor) -> dict[str, Any] | None:
    """First place, row by row, where tokens differ, and both; None where a text has ended."""
    rows = zip_longest(found.tolist(), expected.tolist(), fillvalue=[])
    for row, pair in enumerate(rows):
        for column, (ours, theirs) in enumerate(zip_longest(*pair)):
            if ours != theirs:
                return {"row": row, "column": column, "token": ours, "expected": theirs}
    return None


def plan(
    configs: dict[str, lfm2_fast.Config], device: torch.device, limits: dict[str, Any]
) -> Iterator[tuple[str, list[Case]]]:
    """Return the sizes in order, and the cases to measure of each, by name.

    Kernels are counted after everything that is timed, because counting slows what follows.
    """
    copied, rate = limits["copy_gb_s"], limits["matmul_tflops"]
    short, long, prompt = CONTEXTS[0], CONTEXTS[-1], PROMPTS[-1]

    def decoded(size: str, context: int) -> Case:
        measure = partial(steps.decode, batch=1, context=context, copied=copied)
        return ("decode", size, f"context {context}"), measure

    def batched(size: str, batch: int) -> Case:
        measure = partial(steps.decode, batch=batch, context=short, copied=copied)
        return ("batch", size, str(batch)), measure

    def first(size: str, length: int) -> Case:
        measure = partial(steps.first_token, length=length, copied=copied)
        return ("first token", size, f"{length} tokens"), measure

    def fitting(lengths: tuple[int, ...], config: lfm2_fast.Config) -> list[int]:
        return [n for n in lengths if n <= config.max_position_embeddings - 3 * STEPS]

    def counted(cases: list[Case]) -> list[Case]:
        found = []
        for (_, *name), case in cases:
            if case.func is steps.decode and device.type == "cuda":
                given = {key: case.keywords[key] for key in ("batch", "context")}
                found.append((("kernels", *name), partial(steps.kernels, **given)))
        return found

    alone = len(configs) == 1  # what only some sizes are asked for is then asked of this one
    for size, config in configs.items():
        fits = fitting((prompt, long), config)
        cases = [
            decoded(size, short),
            (("sampled", size), partial(steps.sampled, context=short)),
        ]
        if size == TELLING or alone:
            cases += [first(size, short), batched(size, BATCHES[0])]
        if long in fits:
            cases.append(decoded(size, long))
        if prompt in fits:
            measure = partial(steps.prefill, length=prompt, rate=rate)
            cases.append((("prefill", size), measure))
        if has_dependent_launch(device):
            cases.append((("dependent", size), partial(steps.dependent, context=short)))
        cases.append((("host", size), partial(steps.as_host_sees, context=short)))
        if size == INT8 or alone:
            cases.append((("int8", size), partial(steps.int8, context=short)))
        yield size, cases + counted(cases)
    for size, config in configs.items():
        known = size == TELLING or alone
        lengths = [n for n in fitting(PROMPTS, config) if not (known and n == short)]
        cases = [first(size, length) for length in lengths]
        cases += [batched(size, batch) for batch in (BATCHES[1:] if known else BATCHES)]
        cases += [decoded(size, context) for context in fitting(CONTEXTS[1:-1], config)]
        yield size, cases + counted(cases)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--config", type=Path, help="a config.json, instead of the four sizes")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--out", type=Path, default=made_here() / "gpu.json")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; there is nothing to measure")

    until = time.monotonic() + given.seconds
    protocol = {
        "dtype": "bfloat16",
        "steps": STEPS,
        "unit": "us, p10, p50 and p90",
        "comparisons": f"{TURNS} turns of {TURN_STEPS} steps, in an order that swaps; "
        "ratios of medians of the turns' medians, with 95 percent intervals",
    }
    results = {**header("decoding on a GPU", protocol, device), "gate": gate(device)}
    write(given.out, results)
    if not all(results["gate"]["tokens_are_the_references"].values()):
        sys.exit(f"tokens are wrong, and no figure is worth anything: {results['gate']}")
    cuda = device.type == "cuda"
    results["copy_gb_s"] = copy_bandwidth(device, 2**30 if cuda else 2**24)
    results["matmul_tflops"] = matmul_rate(device, 8192 if cuda else 256)
    if cuda:
        results["gpu"] = told_by_driver()
        results["empty_kernels"] = measured(partial(empty_kernels, device), device)
    configs = {size: config_of(size) for size in SIZES}
    if given.config:
        configs = {given.config.stem: lfm2_fast.Config.from_file(given.config)}
    for i, (size, cases) in enumerate(plan(configs, device, results)):
        late = i > 0 and time.monotonic() > until
        found = too_late(cases) if late else isolated(configs[size], device, cases, until)
        keep(found, results, given.out)


if __name__ == "__main__":
    main()
