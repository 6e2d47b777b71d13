"""Filters and draws against Hugging Face's processors, and against Philox's published numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_fast.sampling import BLOCK, Draws, SamplingParams, draw, penalize, philox, warp

RECOMMENDED = {
    "lfm2": {"temperature": 0.3, "min_p": 0.15, "repetition_penalty": 1.05},
    "lfm2.5": {"temperature": 0.1, "top_k": 50, "top_p": 0.1, "repetition_penalty": 1.05},
    "thinking": {"temperature": 0.05, "top_k": 50, "repetition_penalty": 1.05},
}
FILTERS = {
    "none": {},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 5},
    "top_k_of_more_than_there_are": {"top_k": 9999},
    "top_p": {"top_p": 0.8},
    "top_p_zero": {"top_p": 0.0},
    "min_p": {"min_p": 0.1},
    "min_p_one": {"min_p": 1.0},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "reward": {"repetition_penalty": 0.7},
    "filters": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    **RECOMMENDED,
}  # fmt: skip


def theirs(params: dict, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Hugging Face's processors, in the order of its generate."""
    from transformers.generation import logits_process as hf

    made = []
    if "repetition_penalty" in params:
        made.append(hf.RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
    if "temperature" in params:
        made.append(hf.TemperatureLogitsWarper(params["temperature"]))
    if params.get("top_k"):
        made.append(hf.TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        made.append(hf.TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        made.append(hf.MinPLogitsWarper(params["min_p"]))
    return hf.LogitsProcessorList(made)(ids, logits.clone())


def ours(params: dict, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    chosen = SamplingParams(do_sample=True, **params)
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    if chosen.repetition_penalty != 1.0:
        logits = penalize(logits, seen, chosen.repetition_penalty)
    return warp(logits, chosen)


@pytest.mark.parametrize("params", FILTERS.values(), ids=FILTERS.keys())
@pytest.mark.parametrize("vocab", [7, 1000])
def test_filters_equal_hugging_faces(params: dict, vocab: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(5, vocab, generator=generator)
    ids = torch.randint(vocab, (5, 9), generator=generator)
    expected, got = theirs(params, ids, logits), ours(params, ids, logits)
    assert torch.equal(got.isinf(), expected.isinf())
    torch.testing.assert_close(got, expected)
    assert got.isfinite().any(-1).all()


def test_ties_with_the_kth_token_are_kept() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    kept = warp(logits, SamplingParams(do_sample=True, top_k=2)).isfinite()
    assert kept.tolist() == [[False, True, True, True, True, False]]


@pytest.mark.parametrize("params", FILTERS.values(), ids=FILTERS.keys())
def test_the_drawn_distribution_is_hugging_faces(params: dict) -> None:
    """A chi-squared test of 40,000 draws against the processors' probabilities."""
    draws, vocab = 40_000, 30
    generator = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(1, vocab, generator=generator)
    ids = torch.randint(vocab, (1, 6), generator=generator)
    expected = theirs(params, ids, logits).double().softmax(-1)[0]
    scores = ours(params, ids, logits).expand(draws, -1)
    uniform = philox(77, torch.arange(draws), torch.tensor(5))
    counts = draw(scores, uniform).bincount(minlength=vocab).double()
    assert not counts[expected == 0].any()
    enough = expected * draws >= 5
    pooled = [*counts[enough], counts[~enough].sum()]
    wanted = [*(expected[enough] * draws), expected[~enough].sum() * draws]
    statistic = sum((a - b) ** 2 / b for a, b in zip(pooled, wanted, strict=True) if b > 0)
    freedom = sum(b > 0 for b in wanted) - 1
    # Wilson and Hilferty's approximation of the quantile that one honest run in 10^5 passes.
    cube = 1 - 2 / (9 * max(freedom, 1)) + 4.26 * math.sqrt(2 / (9 * max(freedom, 1)))
    assert statistic <= max(freedom, 1) * cube**3


def test_philox_equals_the_published_numbers() -> None:
    """The known-answer vectors of Random123 for philox4x32-10, first word."""
    zero = torch.tensor(0)
    assert word(philox(0, zero, zero)) == 0x6627E8D5

    # key 0xffffffff twice cannot be met with counter words 2 and 3 at zero, so an independent
    # computation in plain integers stands for the other vectors.
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        seed, row, position = torch.randint(2**62, (3,), generator=generator).tolist()
        got = philox(seed, torch.tensor(row), torch.tensor(position))
        assert word(got) == plain_philox(seed, row, position)


def word(uniform: torch.Tensor) -> int:
    return round(float(uniform) * 2**32 - 0.5)


def plain_philox(seed: int, row: int, position: int) -> int:
    mask = 2**32 - 1
    counter, key = [position & mask, row & mask, 0, 0], [seed & mask, seed >> 32 & mask]
    for _ in range(10):
        low, high = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            high >> 32 ^ counter[1] ^ key[0],
            high & mask,
            low >> 32 ^ counter[3] ^ key[1],
            low & mask,
        ]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter[0]


def test_draws_are_a_function_of_row_and_position() -> None:
    starts = torch.tensor([4, 900, 4])
    draws = Draws(11, 3, torch.device("cpu"))
    steps = torch.stack([draws.next(starts) for _ in range(BLOCK + 5)], 1)
    positions = starts[:, None] + torch.arange(BLOCK + 5)
    assert torch.equal(steps, philox(11, torch.arange(3)[:, None], positions))
    assert len(steps.unique()) == steps.numel()
    assert 0 < steps.min() and steps.max() < 1


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_token_of_no_mass_is_never_drawn(data: st.DataObject) -> None:
    vocab = data.draw(st.integers(1, 12))
    scores = torch.tensor([data.draw(st.lists(
        st.one_of(st.just(-math.inf), st.floats(-90, 90)), min_size=vocab, max_size=vocab,
    ).filter(lambda row: any(map(math.isfinite, row))))])  # fmt: skip
    edge = data.draw(st.sampled_from([0.5 / 2**32, 0.5, 1 - 0.5 / 2**32]))
    token = draw(scores, torch.tensor([edge], dtype=torch.float64))
    assert scores.double().softmax(-1)[0, token] > 0
