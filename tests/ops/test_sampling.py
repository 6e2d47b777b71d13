"""Filters and draws against Hugging Face's processors, and against Philox's published numbers."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_fast.ops import sampling
from lfm2_fast.ops.sampling import (
    NO_TOKEN,
    SamplingParams,
    SamplingState,
    best_tokens,
    draw,
    gumbel,
    penalize,
    philox,
    sample_ref,
    warp,
)

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
    state = SamplingState([SamplingParams(do_sample=True, **params)] * len(logits))
    if "repetition_penalty" in params:
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
        logits = penalize(logits, seen, state.repetition_penalty)
    return warp(logits, state)


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
    state = SamplingState([SamplingParams(do_sample=True, top_k=2)])
    kept = warp(logits, state).isfinite()
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
    state = SamplingState([SamplingParams()] * draws, seed=77)
    counts = draw(scores, state).bincount(minlength=vocab).double()
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
    """The known-answer vectors of Random123 for philox4x32-10."""
    zero = torch.zeros(1, dtype=torch.int64)
    known = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(zero, zero, zero, 4)[0].tolist() == known

    # A key of ones cannot be met with the counter's last word at zero, so an independent
    # computation in plain integers stands for the other vectors.
    generator = torch.Generator().manual_seed(3)
    keys = torch.randint(-(2**62), 2**62, (3, 50), generator=generator)
    for count in (1, 11):
        words = philox(*keys, count)
        expected = [plain_philox(*key, count) for key in keys.T.tolist()]
        assert words.tolist() == expected


def plain_philox(seed: int, row: int, position: int, count: int) -> list[int]:
    mask = 2**32 - 1
    words = []
    for group in range(count):
        counter, key = [position & mask, row & mask, group, 0], [seed & mask, seed >> 32 & mask]
        for _ in range(10):
            low, high = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
            counter = [
                high >> 32 ^ counter[1] ^ key[0],
                high & mask,
                low >> 32 ^ counter[3] ^ key[1],
                low & mask,
            ]
            key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
        words += counter
    return words[:count]


@pytest.fixture
def given_words(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Rows of words that stand for Philox's, to be filled by the test."""
    words: list[list[int]] = []
    monkeypatch.setattr(sampling, "philox", lambda *_: torch.tensor(words))
    return words


def test_noise_is_exact_at_both_ends(given_words: list[list[int]]) -> None:
    """The largest noise, of the smallest words, decides. It is computed with fifty digits."""
    words = [0, 1, 2, 1000, 2**24, 2**31 - 1, 2**31, 2**32 - 1000, 2**32 - 2, 2**32 - 1]
    given_words.append(words)
    zero = torch.zeros(1, dtype=torch.int64)
    with localcontext() as context:
        context.prec = 50
        parts = [(Decimal(word) + Decimal("0.5")) / 2**32 for word in words]
        expected = [float(-(-(1 - part).ln()).ln()) for part in parts]
    assert gumbel(zero, zero, zero, len(words))[0].tolist() == pytest.approx(expected, rel=1e-14)


def test_noise_is_a_function_of_row_position_and_token() -> None:
    """Noise does not depend on the batch, also if rows leave. No two places have the same noise."""
    params = [SamplingParams(do_sample=True)] * 3
    rows, positions = torch.tensor([0, 1, 7]), torch.tensor([4, 900, 4])
    state = SamplingState(params, seed=[11, 11, 12], rows=rows, positions=positions)
    places, found = [0, 1, 2], []
    for step in range(9):
        if step == 5:
            places = [2, 1]
            state = state.pick(places)
        noise = gumbel(state.seeds, state.rows, state.positions, 10)
        for place, got in zip(places, noise, strict=True):
            alone = torch.tensor([[11, 11, 12][place]]), rows[[place]], positions[[place]] + step
            assert torch.equal(got, gumbel(*alone, 13)[0, :10])
            found += got.tolist()
        state.record(torch.zeros(len(places), dtype=torch.int64))
    assert len(set(found)) == len(found)


def test_a_small_error_flips_few_draws() -> None:
    """With slightly wrong logits, the inverse distribution function changes more draws."""
    generator = torch.Generator().manual_seed(7)
    logits = 2 * torch.randn(4000, 300, generator=generator)
    near = logits + 0.01 * torch.randn(4000, 300, generator=generator)
    state = SamplingState([SamplingParams()] * 4000, seed=1)
    flips = (draw(logits, state) != draw(near, state)).double().mean()
    uniform = torch.rand(4000, 1, dtype=torch.float64, generator=generator)
    inverse = [
        torch.searchsorted(x.double().softmax(-1).cumsum(-1), uniform) for x in (logits, near)
    ]
    assert 0 < flips < 0.01 < (inverse[0] != inverse[1]).double().mean()


GREEDY = {
    "greedy": {"do_sample": False},
    "penalized": {"do_sample": False, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "params", [*FILTERS.values(), *GREEDY.values()], ids=[*FILTERS.keys(), *GREEDY.keys()]
)
def test_a_row_without_a_finite_best_has_no_token(bad: float, params: dict) -> None:
    """Minus infinity in some places is a mask; everywhere it leaves nothing to choose."""
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(4))
    seen = torch.rand(5, 50, generator=torch.Generator().manual_seed(5)) < 0.3
    rows = [SamplingParams(**{"do_sample": True, **params})] * 5
    alone = sample_ref(logits, SamplingState(rows, seed=2, seen=seen.clone()))
    logits[1, [9, 30]] = bad
    logits[3] = bad
    state = SamplingState(rows, seed=2, seen=seen.clone())
    tokens = sample_ref(logits, state)
    assert tokens[[0, 2, 4]].tolist() == alone[[0, 2, 4]].tolist()
    assert tokens[3] == NO_TOKEN
    if bad == -math.inf:
        assert tokens[1] >= 0 and tokens[1] not in (9, 30)
    else:
        assert tokens[1] == NO_TOKEN
    assert state.positions.tolist() == [1] * 5
    good = torch.tensor([0, 2, 4])
    assert torch.equal(state.seen[good], seen[good].scatter(1, tokens[good, None], True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_best_is_the_first_of_equals(dtype: torch.dtype) -> None:
    scores = torch.zeros(7, 300, dtype=dtype)
    scores[0, [44, 250]] = 3
    scores[1, 299] = -0.0
    scores[2] = -math.inf
    scores[2, [7, 8]] = torch.finfo(dtype).min
    scores[3, 70] = torch.finfo(dtype).max
    scores[4, 299], scores[5, 0], scores[6] = math.nan, math.inf, -math.inf
    assert best_tokens(scores).tolist() == [44, 0, 7, 70, NO_TOKEN, NO_TOKEN, NO_TOKEN]
    assert best_tokens(scores[:0]).tolist() == []


def test_every_row_has_its_own_parameters() -> None:
    """Rows are greedy and sampled, with every filter. Chosen tokens are seen in the next step."""
    params = [SamplingParams(do_sample=True, **one) for one in FILTERS.values()]
    params += [SamplingParams(), SamplingParams(repetition_penalty=1.3)]
    count, generator = len(params), torch.Generator().manual_seed(5)
    seen = torch.rand(count, 200, generator=generator) < 0.3
    whole = SamplingState(params, seed=6, positions=torch.arange(count), seen=seen)
    alone = [whole.pick([row]) for row in range(count)]
    for step in range(4):
        logits = 3 * torch.randn(count, 200, generator=generator)
        before = whole.seen.clone()
        tokens = sample_ref(logits, whole)
        each = [sample_ref(logits[row : row + 1], state) for row, state in enumerate(alone)]
        assert torch.equal(tokens, torch.cat(each))
        assert torch.equal(whole.seen, before.scatter(1, tokens[:, None], True))
        assert torch.equal(whole.positions, torch.arange(count) + step + 1)
        assert tokens[-2] == logits[-2].argmax()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_token_of_no_mass_is_never_drawn(data: st.DataObject) -> None:
    """Even if its noise is the largest there is, and all other noise the least."""
    vocab = data.draw(st.integers(1, 12))
    scores = torch.tensor([data.draw(st.lists(
        st.one_of(st.just(-math.inf), st.floats(-90, 90)), min_size=vocab, max_size=vocab,
    ).filter(lambda row: any(map(math.isfinite, row))))])  # fmt: skip
    words = torch.where(scores == -math.inf, 0, 2**32 - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "philox", lambda *_: words)
        token = draw(scores, SamplingState([SamplingParams()]))
    assert scores[0, token] > -math.inf
