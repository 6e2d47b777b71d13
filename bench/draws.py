"""Share of draws that fewer bits change, on the small checkpoint's held-out text, by two methods.

    python -m bench.draws

Every position of the text draws its next token at temperature 1 from the logits of float32 and from
those of another kind, with the same random numbers. A flip is a draw of another token. The package
draws by Gumbel's max, which replaced the inverse distribution function.
"""

from __future__ import annotations

import json
from typing import Any

import torch

import lfm2_fast
from bench.quality import KINDS
from bench.report import results
from bench.shapes import TINY
from lfm2_fast.ops.sampling import SamplingParams, SamplingState, draw
from lfm2_fast.text.tokenizer import load_tokenizer

OUT = results.RESULTS / "draws.json"
SEED = 1


def inverse(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """Tokens ``[T]`` of ``logits [T, V]``: a uniform number each, looked up among summed masses."""
    uniform = torch.rand(
        len(logits), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    mass = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(mass, uniform * mass[:, -1:], right=True)[:, 0]


def gumbel_max(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """Tokens ``[T]`` of ``logits [T, V]``, as the package draws them."""
    return draw(logits, SamplingState([SamplingParams()] * len(logits), seed=seed))


METHODS = {"inverse": inverse, "gumbel": gumbel_max}


@torch.no_grad()
def main() -> None:
    """Count the flips of every kind and method, and write the result file."""
    text = (TINY / "heldout.txt").read_text(encoding="utf-8")
    ids = load_tokenizer(str(TINY))(
        text, add_special_tokens=False, return_tensors="pt", verbose=False
    ).input_ids[0]
    window = json.loads((TINY / "heldout.json").read_text(encoding="utf-8"))["window"]
    pieces = ids[: len(ids) // window * window].view(-1, window)
    exact = lfm2_fast.load(TINY, device="cpu", dtype="float32")
    protocol = {"window": window, "reference": "float32", "temperature": 1.0, "seed": SEED}
    found: dict[str, Any] = results.header("draws that fewer bits flip", protocol)
    found["draws"], found["kinds"] = pieces.numel(), {}
    expected = [exact(piece[None]).logits[0].float() for piece in pieces]
    for dtype, quantization in KINDS[1:]:
        model = lfm2_fast.load(TINY, device="cpu", dtype=dtype, quantization=quantization)
        flips = dict.fromkeys(METHODS, 0)
        for number, (piece, logits) in enumerate(zip(pieces, expected, strict=True)):
            near = model(piece[None]).logits[0].float()
            for name, method in METHODS.items():
                seed = SEED + number
                flips[name] += int((method(logits, seed) != method(near, seed)).sum())
        name = f"{quantization}, {dtype} beside" if quantization else dtype
        found["kinds"][name] = {method: n / pieces.numel() for method, n in flips.items()}
        print(name, found["kinds"][name])
    results.write(OUT, found)


if __name__ == "__main__":
    main()
