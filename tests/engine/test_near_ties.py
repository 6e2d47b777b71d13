"""Reuse in the served dtypes: the tokens of a run alone, except near-ties, and no larger error.

In float64 any schedule gives equal tokens (``test_engine.py``). Other dtypes round by the chunks in
which a text has run. The oracle is the same checkpoint in float64, of int8 the same integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import lfm2_fast
from bench.near_ties import alone, difference, exact_logits, forcing, logits_alone
from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.request import Request
from lfm2_fast.models.lfm2 import Lfm2

NEW = 32
KINDS = {"float32": None, "bfloat16": None, "int8": "int8"}


@dataclass
class Runs:
    """A model, the same in float64, and what it makes of ``prompts``, each alone."""

    model: Lfm2
    exact: Lfm2
    prompts: list[list[int]]
    tokens: list[list[int]]

    def errors(self, *found: Sequence[torch.Tensor]) -> list[float]:
        """Return root mean square errors of logits ``[NEW, V]`` of each prompt's ``tokens``."""
        pairs = zip(self.prompts, self.tokens, strict=True)
        right = torch.cat([exact_logits(self.exact, *pair) for pair in pairs])
        errors = (torch.cat(list(logits)) - right for logits in found)
        return [float(error.square().mean().sqrt()) for error in errors]


@pytest.fixture(
    scope="module", params=["float32", "bfloat16", pytest.param("int8", marks=pytest.mark.slow)]
)
def runs(request: pytest.FixtureRequest, tiny: Path) -> Runs:
    kind = request.param
    dtype = "bfloat16" if kind == "int8" else kind
    model = lfm2_fast.load(tiny, device="cpu", dtype=dtype, quantization=KINDS[kind]).network
    exact = lfm2_fast.load(
        tiny, device="cpu", dtype="float64", backend="eager", quantization=KINDS[kind]
    ).network
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    ids = tokenizer.encode((tiny / "heldout.txt").read_text(encoding="utf-8")).ids
    stem = ids[:130]
    prompts = [
        [*stem, *ids[1000:1020]],
        ids[2000:2040],
        [*stem, *ids[3000:3060]],
        ids[4000:4031],
        [*stem[:100], *ids[5000:5040]],
        ids[6000:6050],
    ]
    tokens = [alone(model, Request(prompt, max_tokens=NEW))[0] for prompt in prompts]
    # The second turns of conversations.
    for turn in (0, 1):
        prompts.append([*prompts[turn], *tokens[turn], *ids[7000 + turn : 7025]])
        tokens.append(alone(model, Request(prompts[-1], max_tokens=NEW))[0])
    return Runs(model, exact, prompts, tokens)


def scheduled(model: Lfm2, requests: Sequence[Request], chunk: int) -> list[list[int]]:
    """Run requests that arrive one by one at an engine with few pages. Return their new tokens."""
    engine = Engine(model, max_rows=4, pages=6, chunk=chunk)
    later, found = list(requests), {}
    while later or engine.busy:
        if later and engine.statistics.steps % 5 == 0:
            found[engine.add(later.pop(0))] = []
        for event in engine.step():
            assert event.error is None, event.error
            found[event.id].append(event.token)
    assert engine.statistics.preemptions and engine.statistics.prefix_hits
    return list(found.values())


@pytest.mark.parametrize("chunk", [17, 64])
def test_a_token_that_differs_is_a_near_tie(runs: Runs, chunk: int) -> None:
    requests = [Request(prompt, max_tokens=NEW) for prompt in runs.prompts]
    found = scheduled(runs.model, requests, chunk)
    for prompt, wanted, tokens in zip(runs.prompts, runs.tokens, found, strict=True):
        assert len(tokens) == NEW
        parted = difference(runs.model, runs.exact, prompt, wanted, tokens)
        assert parted is None or parted.is_near_tie, parted


def test_reuse_adds_no_error(runs: Runs) -> None:
    """Teacher-forced, the error of reuse is at most 1.1 times that of runs without it.

    Errors of all texts are added up, because those of one short text vary more with its chunks.
    Float32's errors are a few roundings of a logit, and allow the same comparison.
    """
    pairs = list(zip(runs.prompts, runs.tokens, strict=True))
    seen: list[list[torch.Tensor]] = [[] for _ in pairs]
    requests = [
        Request(prompt, hook=forcing(prompt, tokens, logits), max_tokens=NEW)
        for (prompt, tokens), logits in zip(pairs, seen, strict=True)
    ]
    assert scheduled(runs.model, requests, 17) == runs.tokens
    without, reused = runs.errors(
        [logits_alone(runs.model, *pair) for pair in pairs],
        [torch.stack(logits) for logits in seen],
    )
    assert reused <= 1.1 * without, f"{reused:.3g} with reuse, {without:.3g} without"
