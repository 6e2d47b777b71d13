"""Time speculative decoding on a CPU, beside the same engine without drafts.

    python -m bench.cpu.speculation --size 350M

Weights are random, so texts are scripts: the head runs and chooses, and the script's token then
replaces its choice, on both sides. There are four texts. One repeats four fifths of its prompt, in
runs. One has no repetition, and its tokens are as unequal as words. In one the beginnings repeat,
but never the continuations. One is guessed by an assistant. A DSpark drafter with random weights
shows the cost of drafts that are never right. Last comes the time of a step that checks eight
tokens after a long context, over that of one token.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

import lfm2_fast
from bench.cpu.drafters import published, write_drafter
from bench.report import results
from bench.report.goals import judged
from bench.report.stats import ratio
from bench.shapes import SIZES, checkpoint
from lfm2_fast.cli.machine_load import Neighbours
from lfm2_fast.engine.model_runner import new_cache
from lfm2_fast.engine.step_buffers import StepBuffers
from lfm2_fast.models.dspark import DSpark
from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.ops.native_ops import NativeOps
from lfm2_fast.weights.drafter import DrafterConfig, load_weights
from lfm2_fast.weights.fusion import random_weights

PROMPT, NEW, DRAFTS = 512, 512, 7
# Tokens that are copied in a run, and new ones after it: four of five are the prompt's.
COPIED, FRESH = 32, 8


class Scripted(NativeOps):
    """Native bodies, whose greedy choice at a position is the script's next token."""

    def __init__(self, script: list[int]) -> None:
        self.script = torch.tensor(script)

    def rope(self, positions: torch.Tensor, *args: Any) -> Any:
        self.following = positions + 1
        return super().rope(positions, *args)

    def head_argmax(self, *args: Any) -> torch.Tensor:
        chosen = super().head_argmax(*args)
        return chosen.copy_(self.script.index_select(0, self.following))


def fresh(count: int, seed: int, vocab: int) -> list[int]:
    """Tokens drawn as unequally as words: the n-th has 1/n of the first one's probability."""
    weights = [1 / n for n in range(1, vocab - 9)]
    return random.Random(seed).choices(range(10, vocab), weights, k=count)


def repeating(vocab: int) -> list[int]:
    """Prompt, and a text that copies runs of it."""
    draw, text = random.Random(1), fresh(PROMPT, 1, vocab)
    while len(text) < PROMPT + NEW + 1:
        first = draw.randrange(PROMPT - COPIED)
        text += text[first : first + COPIED]
        text += fresh(FRESH, len(text), vocab)
    return text[: PROMPT + NEW + 1]


def misleading() -> list[int]:
    """Text of few tokens, so that each has occurred before, but none predicts the next."""
    return random.Random(2).choices(range(10, 42), k=PROMPT + NEW + 1)


def small(target: Lfm2, hidden: int, layers: int) -> Lfm2:
    """Assistant of the target's vocabulary, with random weights."""
    config = replace(
        target.config,
        quantization=None,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 128, 1),
        layer_types=("conv", "full_attention", "conv")[:layers],
    )
    weights = random_weights(config, target.dtype, "cpu", torch.Generator().manual_seed(0))
    return Lfm2(config, weights)


def rate(model: Lfm2, script: list[int], **options: Any) -> tuple[float, list[int], Any]:
    """New tokens a second after the first of a script, the tokens, and the statistics."""
    model.ops = Scripted(script)
    model.attach_drafter(options.pop("drafter", None))
    engine = lfm2_fast.Engine(model, max_rows=1, prefix_cache=False, **options)
    engine.add(lfm2_fast.Request(script[:PROMPT], max_tokens=NEW))
    tokens: list[int] = []
    while not tokens:
        tokens += [event.token for event in engine.step()]
    begin, first = time.perf_counter(), len(tokens)
    while engine.busy:
        tokens += [event.token for event in engine.step()]
    return (NEW - first) / (time.perf_counter() - begin), tokens, engine.statistics


def compared(
    model: Lfm2, script: list[int], rounds: int, must: float, aim: float, name: str, **options: Any
) -> dict[str, Any]:
    """Rates with drafts and without, in turns, and the verdict on their ratio."""
    rates: dict[str, list[float]] = {"plain": [], "drafts": []}
    shares = []
    for turn in range(rounds):
        texts = []
        for side in ("plain", "drafts") if turn % 2 == 0 else ("drafts", "plain"):
            found, text, statistics = rate(model, script, **(options if side == "drafts" else {}))
            rates[side].append(found)
            texts.append(text)
            if side == "drafts" and statistics.drafted:
                shares.append(statistics.accepted / statistics.drafted)
        assert texts[0] == texts[1], "drafts changed a text"
    value = ratio(rates["drafts"], rates["plain"], paired=True)
    verdict = asdict(judged(name, must, aim, value, more_is_better=True))
    return {"tokens/s": rates, "accepted": median(shares) if shares else None, "verdict": verdict}


def random_drafter(target: Lfm2) -> DSpark:
    """Drafter of the published depth, with random weights: its drafts are never right."""
    with TemporaryDirectory() as made:
        folder = write_drafter(Path(made) / "drafter", target.config, **published(target.config))
        config = DrafterConfig.from_file(folder / "config.json")
        like = target.embedding_norm.weight
        return DSpark(config, load_weights(folder, config, target.config, like=like), target)


def step_seconds(model: Lfm2, context: int, rounds: int) -> dict[str, Any]:
    """Seconds of steps of one token and of eight, of one row after ``context`` tokens."""
    cache = new_cache(model, 1, context + 64)
    cache.make_room({0: context + 16})
    for layer in cache.layers:
        for name in ("k", "v"):
            if hasattr(layer, name):
                getattr(layer, name)[: cache.pool.memory.count].normal_()
    buffers = {n: StepBuffers(model, cache, drafts=8) for n in (1, 8)}
    times: dict[int, list[float]] = {1: [], 8: []}
    for turn in range(rounds + 2):
        for count, own in buffers.items():
            own.load_rows([5] * count, [0] * count, range(context, context + count), cache)
            begin = time.perf_counter()
            own.run_steps(model, cache, count, choose=True, verified=True)
            if turn > 1:
                times[count].append(time.perf_counter() - begin)
    value = ratio(times[8], times[1], paired=True)
    name = f"a step of 8 tokens over one of 1, after {context}"
    goal = asdict(judged(name, 2.0, 1.5, value, more_is_better=False))
    return {"seconds": {str(n): own for n, own in times.items()}, "verdict": goal}


def arguments() -> argparse.Namespace:
    """Return the command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="350M", choices=SIZES)
    parser.add_argument("--quantization", default="int8", choices=("int8", "int4", "none"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--only", help="one of the cases, by a part of its name")
    parser.add_argument("--out", type=Path, help="default: bench/results/speculation-SIZE.json")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    options = {} if given.quantization == "none" else {"quantization": given.quantization}
    model = lfm2_fast.load(checkpoint(given.size), device="cpu", **options).network
    vocab, rounds = model.config.vocab_size, given.rounds
    plain, drafter = model.ops, random_drafter(model)
    script = fresh(PROMPT + NEW + 1, 3, vocab)
    helper = small(model, 256, 2)
    guesses, new = list(script), range(PROMPT, PROMPT + NEW + 1)
    # Exactly a fifth is wrong. Drawn one by one, a quarter was.
    for at in random.Random(4).sample(new, round(0.2 * len(new))):
        guesses[at] = (guesses[at] + 1) % vocab
    helper.ops = Scripted(guesses)
    lookup = {"prompt_lookup": DRAFTS}
    cases: dict[str, Callable[[str], dict[str, Any]]] = {
        "four fifths repeat the prompt": lambda name: compared(
            model, repeating(vocab), rounds, 1.6, 2.4, name, **lookup
        ),
        "nothing to repeat": lambda name: compared(
            model, script, rounds, 0.97, 1.0, name, **lookup
        ),
        "beginnings that mislead": lambda name: compared(
            model, misleading(), rounds, 0.97, 1.0, name, **lookup
        ),
        "a DSpark drafter with random weights": lambda name: compared(
            model, script, rounds, 0.97, 1.0, name, drafter=drafter
        ),
        "an assistant that agrees 80 %": lambda name: compared(
            model, script, rounds, 1.4, 1.8, name, assistant=helper
        ),
    }
    paths = ("out", "only")
    protocol = {name: value for name, value in vars(given).items() if name not in paths}
    protocol["order"] = "back and forth"
    found = results.header(f"LFM2-{given.size}'s shape on a CPU, speculative decoding", protocol)
    others = Neighbours([])

    def tell(name: str, value: Any) -> None:
        print(name, json.dumps(value), flush=True)
        found[name] = value
        found["others"] = others.seen()
        results.write(given.out or results.RESULTS / f"speculation-{given.size}.json", found)

    for name, run in cases.items():
        if given.only is None or given.only in name:
            tell(name, run(name))
    model.ops = plain
    if given.only is None or given.only in "steps":
        tell("steps", step_seconds(model, given.context, 10 * rounds))
        tell("steps after few", step_seconds(model, 128, 10 * rounds))
        cost = step_seconds(helper, 128, 10 * rounds)["seconds"]["1"]
        own = found["steps after few"]["seconds"]["1"]
        tell("assistant's step over the model's", median(cost) / median(own))


if __name__ == "__main__":
    main()
