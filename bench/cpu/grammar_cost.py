"""Time the engine's steps with a JSON schema for each row beside the same steps without, on a CPU.

    python -m bench.cpu.grammar_cost --size 350M --quantization int8

Weights are random, so the texts mean nothing, but the schema allows every token in them. No text
reaches the end of the schema, so all steps are masked. Both sides take turns on one engine. A
sample is the mean of a turn's steps, so that a rare slow mask counts. The vocabulary of 65,536
tokens is trained on Python's standard library, because no published one was available.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import lfm2_fast
from bench.cpu.engines import prompt
from bench.report import results
from bench.report.goals import goal_table, judged
from bench.report.results import Figure
from bench.report.stats import ratio
from bench.shapes import MADE, SIZES, checkpoint
from lfm2_fast.cli.machine_load import Neighbours
from lfm2_fast.text.grammar import Grammar, GrammarCompiler
from lfm2_fast.text.tokenizer import load_tokenizer

# A step with schemas over one without, must and aim.
MUST, AIM = 1.15, 1.03
ROWS = (1, 16)
# Steps of a turn that are not counted: prompts run in the first ones.
FIRST = 4
END = "<|im_end|>"
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"enum": ["person", "place", "thing"]},
            "note": {"type": "string"},
            "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,8}$"}},
            "at": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
        },
        "required": ["name", "age", "kind", "note", "tags", "at"],
        "additionalProperties": False,
    },
}


def trained_tokenizer(vocab_size: int) -> Any:
    """Return a byte-level tokenizer of that many tokens, and train it if it does not exist."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    file = MADE / f"tokenizer-{vocab_size}.json"
    if not file.is_file():
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*/*.py"))
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|pad|>", END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        texts = (source.read_text(encoding="utf-8", errors="replace") for source in sources)
        made.train_from_iterator(texts, trainer)
        MADE.mkdir(parents=True, exist_ok=True)
        made.save(str(file))
    return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=END)


def turn(engine: lfm2_fast.Engine, rows: int, steps: int, grammar: Grammar | None) -> float:
    """Return the mean seconds of a step that writes to ``rows`` rows."""
    for row in range(rows):
        request = lfm2_fast.Request(prompt(row, 8), max_tokens=steps + FIRST, constraint=grammar)
        engine.add(request)
    times = []
    while engine.busy:
        begin = time.perf_counter()
        events = engine.step()
        if len(events) == rows:
            times.append(time.perf_counter() - begin)
        error = next((event.error for event in events if event.error is not None), None)
        if error is not None:
            raise error
    return mean(times[FIRST - 1 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="350M", choices=(*SIZES, "tiny"))
    parser.add_argument("--quantization", choices=("int8",))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=48, help="steps per turn")
    parser.add_argument("--out", type=Path, help="default: bench/results/grammar-SIZE.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tiny = given.size == "tiny"
    folder = checkpoint(given.size).resolve()
    options: dict[str, Any] = {"dtype": torch.bfloat16, "quantization": given.quantization}
    model = lfm2_fast.load(folder, device="cpu", **options)
    vocab_size = model.network.config.vocab_size
    tokenizer = load_tokenizer(str(folder)) if tiny else trained_tokenizer(vocab_size)
    end = tokenizer.convert_tokens_to_ids(END)
    compiler = GrammarCompiler(tokenizer, vocab_size=vocab_size, eos=[end])
    sides = {"with a schema": compiler.json_schema(SCHEMA), "without": None}
    engine = lfm2_fast.Engine(model, max_rows=max(ROWS), max_length=given.steps + 64)
    cases = [(rows, label) for rows in ROWS for label in sides]
    for rows, label in cases:  # records the graphs, loads the libraries
        turn(engine, rows, given.steps, sides[label])
    times: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
    others = Neighbours(own=[])
    for number in range(given.rounds):
        for rows, label in cases if number % 2 else cases[::-1]:
            times[rows, label].append(turn(engine, rows, given.steps, sides[label]))
    figures = [
        Figure(f"time between tokens, rows {rows}", label, "s", samples)
        for (rows, label), samples in times.items()
    ]
    ratios = {
        f"{rows} rows": ratio(times[rows, "with a schema"], times[rows, "without"], paired=True)
        for rows in ROWS
    }
    protocol = {name: value for name, value in vars(given).items() if name != "out"}
    protocol["order"] = "all cases in turns, back and forth; one turn each before does not count"
    found = results.header(f"JSON schema's cost, LFM2-{given.size}'s shape on a CPU", protocol)
    found |= {"others": others.seen(), "figures": results.as_json(figures), "ratios": ratios}
    out = given.out or results.RESULTS / f"grammar-{given.size}.json"
    results.write(out, found)
    verdicts = [
        judged(f"time between tokens, {name}", MUST, AIM, value, more_is_better=False)
        for name, value in ratios.items()
    ]
    print(f"{goal_table(verdicts)}\n\nwritten: {out}; meanwhile: {found['others']}")


if __name__ == "__main__":
    main()
