"""Loss of 4 bits of the small real checkpoint: int4, and llama.cpp's Q4_0 of the same weights.

    make peers && python -m bench.cpu.gguf_loss

Both are measured as llama-perplexity does it: over the second half of pieces, each of which begins
with the first token of texts.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lfm2_fast
from bench.cpu.gguf_llama import exact_model, files_of
from bench.cpu.llama_build import program
from bench.report import results
from bench.shapes import TINY
from lfm2_fast.text.tokenizer import load_tokenizer
from lfm2_fast.weights.gguf_file import read_gguf

OUT = results.RESULTS / "gguf-loss.json"
WINDOW = 256


@torch.no_grad()
def divergence(
    model: Callable[[torch.Tensor], Any], reference: Any, pieces: torch.Tensor
) -> dict[str, float]:
    """Return mean KL from ``reference`` and loss, over the second half of each piece.

    So does llama-perplexity, which lets the first half be context.
    """
    half = pieces.shape[1] // 2
    total = torch.zeros(3, dtype=torch.float64)
    for piece in pieces:
        scores, wanted = (
            each(piece[None]).logits[0, half:-1].double().log_softmax(-1)
            for each in (model, reference)
        )
        after = piece[half + 1 :, None]
        total[0] += (wanted.exp() * (wanted - scores)).sum()
        total[1] -= scores.gather(-1, after).sum()
        total[2] -= wanted.gather(-1, after).sum()
    count = len(pieces) * (pieces.shape[1] - half - 1)
    kl, loss, wanted_loss = (total / count).tolist()
    return {"kl": kl, "loss": loss, "reference_loss": wanted_loss}


def llama_divergence(base: Path, path: Path, text: Path, folder: Path) -> dict[str, float]:
    """Return llama-perplexity's figures of a file; ``kl_error`` is the standard error of its KL."""
    scores = folder / "scores"
    common = [program("llama-perplexity"), "-f", text, "-c", WINDOW, "-t", 1, "-b", WINDOW]
    for words in (
        ["-m", base, "--kl-divergence-base", scores],
        ["-m", path, "--kl-divergence-base", scores, "--kl-divergence"],
    ):
        command = [str(word) for word in (*common, *words)]
        said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    output = said.stdout + said.stderr
    found = {}
    for name, pattern in {
        "kl": r"Mean\s+KLD:\s+([\d.]+)",
        "kl_error": r"Mean\s+KLD:\s+[\d.]+ ±\s+([\d.]+)",
        "loss": r"Mean PPL\(Q\)\s+:\s+([\d.]+)",
        "reference_loss": r"Mean PPL\(base\)\s+:\s+([\d.]+)",
    }.items():
        match = re.search(pattern, output)
        if match is None:
            raise RuntimeError(f"llama-perplexity did not print {name}: {output[-300:]}")
        value = float(match[1])
        found[name] = value if name.startswith("kl") else float(np.log(value))
    return found


def losses(folder: Path) -> dict[str, dict[str, float]]:
    """Return KL and loss of 4 bits of the small real checkpoint, ours and llama.cpp's."""
    text = TINY / "heldout.txt"
    ids = load_tokenizer(str(TINY))(
        text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False
    ).input_ids[0]
    # Each piece begins with the first token, in place of its own, as in llama-perplexity.
    pieces = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW).clone()
    pieces[:, 0] = ids[0]
    ((_, base), (_, path)) = files_of(TINY, folder, ("BF16", "Q4_0"))
    reference = lfm2_fast.load(TINY, device="cpu", dtype="float32", backend="eager")
    made = {
        "ours, float32 beside": {"dtype": "float32"},
        "ours, bfloat16 beside": {"dtype": "bfloat16"},
        "ours, weights alone": {"dtype": "float32", "backend": "eager"},
    }
    found = {}
    for name, options in made.items():
        model = lfm2_fast.load(TINY, device="cpu", quantization="int4", **options)
        found[name] = divergence(model, reference, pieces)
    exact, _ = exact_model(read_gguf(path))
    found["llama.cpp's Q4_0, weights alone"] = divergence(exact, reference, pieces)
    found["llama.cpp's Q4_0, run by it"] = llama_divergence(base, path, text, folder)
    return found


def main() -> None:
    """Measure every kind, and write the result file."""
    torch.set_num_threads(1)
    protocol = {"window": WINDOW, "reference": "float32; of llama.cpp's run the BF16 file"}
    found = results.header("loss of 4 bits, ours and llama.cpp's", protocol)
    with tempfile.TemporaryDirectory() as folder:
        found["kinds"] = losses(Path(folder))
    for kind, numbers in found["kinds"].items():
        print(kind, numbers)
    results.write(OUT, found)


if __name__ == "__main__":
    main()
