"""Time decode steps with LoRA adapters beside the weights against merged ones and none, on a CPU.

    python -m bench.cpu.adapters --size 350M

Random adapters of one rank change all projections of the layers. Three models of the same random
weights take turns in one process. One has a merged adapter, one has eight beside the weights. In
the third, also with eight, no row uses an adapter. A sample is the median of a turn's steps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

import lfm2_fast
from bench.cpu.engines import prompt
from bench.report import results
from bench.report.goals import goal_table, judged
from bench.report.results import Figure
from bench.report.stats import ratio
from bench.shapes import SIZES, checkpoint
from lfm2_fast.cli.machine_load import Neighbours
from lfm2_fast.config import Config
from lfm2_fast.engine.model_runner import ModelRunner, new_cache
from lfm2_fast.weights import adapter, adapter_config
from lfm2_fast.weights.fusion import fusion_table

ROWS, CONTEXT = 8, 64
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"]
MERGED, BESIDE, NONE = "merged", "beside the weights", "none"
# Name of the figure -> engines of the ratio, must, aim.
GOALS = {
    "decode, rows 1": (BESIDE, MERGED, 0.8, 0.92),
    f"decode, rows {ROWS}": (BESIDE, NONE, 0.7, 0.85),
}


def write_adapter(folder: Path, config: Config, rank: int, seed: int, std: float = 0.02) -> Path:
    """Write a random adapter of all projections of the layers, as PEFT does; return its folder."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for fused in fusion_table(config).values():
        for part in fused.parts if fused.is_matrix else ():
            name = part.name.removesuffix(".weight")
            if name.rpartition(".")[2] in TARGETS:
                rows, columns = part.shape
                for kind, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                    made = torch.randn(shape, generator=generator) * std
                    tensors[f"{adapter.PREFIX}{name}.lora_{kind}.weight"] = made
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": TARGETS}
    (folder / adapter_config.FILE).write_text(json.dumps(fields))
    save_file(tensors, folder / adapter.FILE)
    return folder


def steps_of(model: Any, rows: int, entries: list[int]) -> Callable[[int], float]:
    """Return a function that runs some steps of rows, and returns their median seconds.

    ``entries`` are the rows' adapters, 0 for none.
    """
    network = model.network
    cache = new_cache(network, rows, 4096)
    runner, slots = ModelRunner(network, cache), list(range(rows))
    for slot, entry in zip(slots, entries, strict=True):
        runner.buffers.set_adapter(slot, entry)
    runner.prefill([prompt(slot, CONTEXT) for slot in slots], slots)

    def run(steps: int) -> float:
        found = []
        for _ in range(steps):
            begin = time.perf_counter()
            runner.step([7] * rows, slots)
            found.append(time.perf_counter() - begin)
        return median(found)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="350M", choices=(*SIZES, "tiny"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=6, help="steps per turn")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", choices=("int8", "int4"))
    parser.add_argument("--out", type=Path, help="default: bench/results/adapters-SIZE.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    folder = checkpoint(given.size).resolve()
    options: dict[str, Any] = {
        "device": "cpu",
        "dtype": given.dtype,
        "quantization": given.quantization,
    }
    with TemporaryDirectory() as made:
        config = lfm2_fast.Config.from_file(folder / "config.json")
        paths = [
            write_adapter(Path(made) / str(seed), config, given.rank, seed) for seed in range(ROWS)
        ]
        merged = lfm2_fast.load(folder, adapter=paths[0], **options)
        model = lfm2_fast.load(folder, **options)
        for number, path in enumerate(paths):
            model.load_adapter(path, str(number))
    model.set_adapter(None)
    entries = [model.network.adapters.find(name).entry for name in model.adapters()]
    cases = {
        ("decode, rows 1", MERGED): steps_of(merged, 1, [0]),
        ("decode, rows 1", BESIDE): steps_of(model, 1, entries[:1]),
        (f"decode, rows {ROWS}", NONE): steps_of(model, ROWS, [0] * ROWS),
        (f"decode, rows {ROWS}", BESIDE): steps_of(model, ROWS, entries),
    }
    for case in cases.values():  # records the graphs
        case(3)
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in cases}
    others = Neighbours(own=[])
    for turn in range(given.rounds):
        for (name, engine), case in list(cases.items())[:: 1 if turn % 2 else -1]:
            rows = ROWS if name.endswith(str(ROWS)) else 1
            samples[name, engine].append(rows / case(given.steps))
    figures = [Figure(*key, "tokens/s", rates) for key, rates in samples.items()]
    protocol = {name: value for name, value in vars(given).items() if name != "out"}
    protocol["order"] = "all cases in turns, back and forth; one turn each before does not count"
    found = results.header(f"LFM2-{given.size}'s shape on a CPU, with LoRA adapters", protocol)
    found |= {"others": others.seen(), "figures": results.as_json(figures)}
    out = given.out or results.RESULTS / f"adapters-{given.size}.json"
    results.write(out, found)
    print(goals(figures))
    print(f"written: {out}; meanwhile: {found['others']}")


def goals(figures: list[Figure]) -> str:
    """Return the table of the goals."""
    known = {(each.name, each.engine): each.samples for each in figures}
    verdicts = []
    for name, (ours, other, must, aim) in GOALS.items():
        value = ratio(known[name, ours], known[name, other], paired=True)
        what = f"{name}: {ours} over {other}"
        verdicts.append(judged(what, must, aim, value, more_is_better=True))
    return goal_table(verdicts)


if __name__ == "__main__":
    main()
