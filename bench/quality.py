"""Loss by fewer bits, on the small real checkpoint's held-out text.

python -m bench.quality
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import lfm2_fast
from bench.report import results
from bench.shapes import TINY
from lfm2_fast.cli.evaluation import evaluate
from lfm2_fast.text.tokenizer import load_tokenizer

OUT = results.RESULTS / "quality.json"
KINDS: tuple[tuple[str, str | None], ...] = (
    ("float32", None),
    ("bfloat16", None),
    ("bfloat16", "int8"),
    ("float32", "int8"),
    ("bfloat16", "int4"),
    ("float32", "int4"),
)


def main() -> None:
    """Measure every kind against float32, and write the result file."""
    text = (TINY / "heldout.txt").read_text(encoding="utf-8")
    ids = load_tokenizer(str(TINY))(
        text, add_special_tokens=False, return_tensors="pt", verbose=False
    ).input_ids
    window = json.loads((TINY / "heldout.json").read_text(encoding="utf-8"))["window"]
    exact = lfm2_fast.load(TINY, device="cpu", dtype="float32")
    protocol = {"window": window, "reference": "float32"}
    found: dict[str, Any] = results.header("quality of the small real checkpoint", protocol)
    found["kinds"] = {}
    for dtype, quantization in KINDS:
        model = lfm2_fast.load(TINY, device="cpu", dtype=dtype, quantization=quantization)
        quality = evaluate(model, ids[0], window=window, reference=exact)
        name = f"{quantization}, {dtype} beside" if quantization else dtype
        found["kinds"][name] = asdict(quality)
        print(name, quality)
    results.write(OUT, found)


if __name__ == "__main__":
    main()
