"""Numbers of the lm-evaluation-harness from this package's class and from transformers'.

python -m bench.harness

Three tasks on the small checkpoint's held-out text, one of each kind of request. Needs the extra
``eval``.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import lfm2_fast
from bench.report import results
from bench.shapes import TINY

OUT = results.RESULTS / "harness.json"
ROWS = 40
# Words of a prompt, of its continuation, and of a passage that is scored whole.
PROMPT, ANSWER, PASSAGE = 24, 4, 120


def documents(rows: int) -> list[dict[str, str]]:
    """Return prompts, with what follows them in the held-out text, and passages."""
    words = (TINY / "heldout.txt").read_text(encoding="utf-8").split()
    step = (len(words) - PASSAGE) // rows
    found = []
    for first in range(0, step * rows, step):
        cut = first + PROMPT
        found.append(
            {
                "prompt": " ".join(words[first:cut]),
                "word": " " + words[cut],
                "answer": " ".join(words[cut : cut + ANSWER]),
                "passage": " ".join(words[first : first + PASSAGE]),
            }
        )
    return found


def tasks(file: Path) -> list[dict[str, Any]]:
    """Return one task of each kind of request on the documents of ``file``."""
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(file.parent)},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
    }
    until = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    passage = {"doc_to_text": "", "doc_to_target": "{{passage}}"}
    return [
        {
            **common,
            "doc_to_target": "{{word}}",
            "task": "likelihood",
            "output_type": "loglikelihood",
        },
        {**common, **passage, "task": "rolling", "output_type": "loglikelihood_rolling"},
        {
            **common,
            "task": "writing",
            "output_type": "generate_until",
            "generation_kwargs": until,
            "metric_list": [{"metric": "bleu"}, {"metric": "chrf"}],
        },
    ]


def evaluate(folder: Path, rows: int = ROWS) -> tuple[str, dict[str, dict[str, float]]]:
    """Return whose class the harness loaded, and every task's numbers on float32."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    file = folder / "documents.jsonl"
    file.write_text("\n".join(map(json.dumps, documents(rows))), encoding="utf-8")
    model = HFLM(pretrained=str(TINY), dtype="float32", device="cpu", batch_size=4)
    found = lm_eval.simple_evaluate(model, tasks=tasks(file), bootstrap_iters=0)
    numbers = {
        task: {
            name.removesuffix(",none"): value
            for name, value in measured.items()
            if isinstance(value, float) and "stderr" not in name
        }
        for task, measured in found["results"].items()
    }
    return type(model.model).__module__.partition(".")[0], numbers


def both(folder: Path, rows: int = ROWS) -> dict[str, dict[str, dict[str, float]]]:
    """Return the numbers of both classes, by class."""
    lfm2_fast.register()
    try:
        ours = evaluate(folder, rows)
    finally:
        lfm2_fast.unregister()
    return dict([ours, evaluate(folder, rows)])


def main() -> None:
    """Run both, and write the result file."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    import lm_eval

    protocol = {"rows": ROWS, "dtype": "float32", "harness": lm_eval.__version__}
    found: dict[str, Any] = results.header("numbers of the lm-evaluation-harness", protocol)
    with tempfile.TemporaryDirectory() as folder:
        found["numbers"] = both(Path(folder))
    print(json.dumps(found["numbers"], indent=1))
    results.write(OUT, found)


if __name__ == "__main__":
    main()
