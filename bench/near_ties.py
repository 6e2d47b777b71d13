"""Near-ties: the first difference of two runs of a request, compared with the model in float64.

Two runs in different chunks round differently, so a token may differ where two logits are almost
equal. The first token that differs must be a near-tie: in float64 it is below the best by at most
the error of the logits of the run alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.model_runner import new_cache, run_batch
from lfm2_fast.engine.request import Hook, Request
from lfm2_fast.models.lfm2 import Lfm2


@dataclass(frozen=True)
class Difference:
    """First new token that differs between two greedy runs of a request.

    ``place`` is its number among the new tokens, ``tokens`` has that of either run. ``gap`` is the
    distance from the best logit in float64 to the lower of the two tokens' logits. ``error`` is the
    largest error of a logit on this text, run alone.
    """

    place: int
    tokens: tuple[int, int]
    gap: float
    error: float

    @property
    def is_near_tie(self) -> bool:
        """Return True if the logits' own error explains the difference."""
        return self.gap <= self.error


def alone(model: Lfm2, request: Request) -> list[list[int]]:
    """Return the new tokens of each continuation if nothing else runs and nothing is reused."""
    engine = Engine(model, max_rows=1, prefix_cache=False)
    engine.add(request)
    found: list[list[int]] = [[] for _ in range(request.n)]
    while engine.busy:
        for event in engine.step():
            if event.error is not None:
                raise event.error
            if event.token is not None:
                found[event.index].append(event.token)
    return found


def forcing(prompt: Sequence[int], tokens: Sequence[int], seen: list[torch.Tensor]) -> Hook:
    """Return a hook that appends each step's logits ``[V]`` to ``seen`` and has ``tokens`` chosen.

    It serves one continuation of ``prompt`` by as many tokens.
    """

    def hook(text: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.clone())
        chosen = torch.tensor([tokens[len(text) - len(prompt)]], device=logits.device)
        return torch.full_like(logits, -torch.inf).index_fill(0, chosen, 0)

    return hook


def logits_alone(model: Lfm2, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """Return the logits ``[len(tokens), V]`` float32 of a run alone that is forced to ``tokens``.

    The prompt runs at once, then each token in a step of its own.
    """
    seen: list[torch.Tensor] = []
    hook = forcing(prompt, tokens, seen)
    alone(model, Request(prompt, hook=hook, max_tokens=len(tokens)))
    return torch.stack(seen)


def exact_logits(exact: Lfm2, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """Return the logits ``[len(tokens), V]`` of the places of ``tokens`` in one forward pass."""
    text = [*prompt, *tokens][:-1]
    cache = new_cache(exact, 1, len(text))
    batch = cache.next_batch([len(text)], [0], exact.device)
    rows = torch.arange(len(prompt) - 1, len(text), device=exact.device)
    with torch.no_grad():
        return run_batch(exact, torch.tensor(text, device=exact.device), batch, cache, rows)


def difference(
    model: Lfm2, exact: Lfm2, prompt: Sequence[int], ours: Sequence[int], other: Sequence[int]
) -> Difference | None:
    """Return the first difference of two greedy runs, None where one begins with the other.

    ``ours`` are the new tokens of a run of ``model`` alone, ``other`` those of another run.
    ``exact`` is the same model in float64.
    """
    pairs = enumerate(zip(ours, other, strict=False))
    place = next((place for place, (one, two) in pairs if one != two), None)
    if place is None:
        return None
    right = exact_logits(exact, prompt, ours)
    error = (logits_alone(model, prompt, ours).double() - right).abs().max()
    row, tokens = right[place], (ours[place], other[place])
    gap = row.max() - row[list(tokens)].min()
    return Difference(place, tokens, float(gap), float(error))
