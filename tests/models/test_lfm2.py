"""The network: what its blocks run for rows that alone are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lfm2_fast
from lfm2_fast.engine.model_runner import new_cache, run_batch

TOKENS = torch.arange(5, 17)


@pytest.fixture(scope="module")
def network(tiny: Path) -> lfm2_fast.models.lfm2.Lfm2:
    return lfm2_fast.load(tiny, device="cpu", dtype="float64", backend="eager").network


def run(network, rows: list[int] | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run ``TOKENS`` in an empty cache; their logits, and all tensors of the cache after it."""
    cache = new_cache(network, 1, 64)
    batch = cache.next_batch([len(TOKENS)], [0], network.device)
    picked = None if rows is None else torch.tensor(rows, dtype=torch.int64)
    logits = run_batch(network, TOKENS, batch, cache, picked)
    state = [each for layer in cache.layers for each in vars(layer).values()]
    return logits, [each for each in state if isinstance(each, torch.Tensor)]


@pytest.mark.parametrize("rows", [[], [11], [7, 0]])
@pytest.mark.parametrize("hooked", [False, True])
def test_the_last_block_ends_for_the_rows_asked_for(network, monkeypatch, rows, hooked) -> None:
    whole, expected = run(network, None)
    seen: list[int] = []
    last = network.layers[-1].feed_forward.down_proj
    linear_add = type(network.ops).linear_add

    def counted(self, y, linear, residual):
        if linear is last:
            seen.append(len(y))
        return linear_add(self, y, linear, residual)

    monkeypatch.setattr(type(network.ops), "linear_add", counted)
    shapes: list[int] = []
    hook = lambda module, args, out: shapes.append(len(out))  # noqa: E731
    handle = network.layers[-1].register_forward_hook(hook) if hooked else None
    try:
        logits, state = run(network, rows)
    finally:
        if handle is not None:
            handle.remove()
    torch.testing.assert_close(logits, whole[rows], rtol=1e-12, atol=1e-12)
    assert len(state) == len(expected) > 0
    assert all(map(torch.equal, state, expected))
    # A hook sees the whole stream, so all of it is made.
    assert shapes == [len(TOKENS)] * hooked
    assert seen == ([len(TOKENS)] if hooked else [len(rows)] * bool(rows))
