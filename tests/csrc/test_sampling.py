"""The extension's bodies of sampling, against the meaning in sampling.py."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_fast.ops import native_library, sampling
from lfm2_fast.ops.sampling import SamplingParams, SamplingState

NAN = float("nan")
BODIES = torch.ops.lfm2_fast

_lacking = native_library.why_not(torch.device("cpu"))
pytestmark = [
    pytest.mark.skipif(_lacking is not None, reason=str(_lacking)),
    pytest.mark.usefixtures("threads"),
]


def test_best_tokens(dtype) -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, 4000).to(dtype)
    rows[1, 77:] = rows[1].max()
    rows[2, 3999] = math.inf
    rows[3] = -math.inf
    rows[4, [9, 500]] = 99.0
    rows = torch.cat([rows, torch.tensor([-0.0, 0.0]).repeat(2000)[None].to(dtype)])
    out = torch.full((len(rows),), 99999)
    BODIES.best_tokens_native(rows[:, :3999], out)
    expected = [(row == row.max()).nonzero()[0].item() for row in rows[:, :3999]]
    assert out.tolist() == [*expected[:3], -1, *expected[4:]]
    rows[4, 700] = NAN
    rows[3, 3999] = torch.finfo(dtype).min
    BODIES.best_tokens_native(rows, out)
    assert out.tolist() == [*expected[:2], -1, 3999, -1, expected[5]]


PARAMS = {
    "nothing": {},
    "temperature": {"temperature": 0.6},
    "top_k_1": {"top_k": 1},
    "top_k": {"top_k": 50},
    "top_k_most": {"top_k": 900},
    "top_k_more_than_there_are": {"top_k": 9999},
    "top_p_0": {"top_p": 0.0},
    "top_p": {"top_p": 0.9},
    "top_p_most": {"top_p": 0.9999},
    "min_p": {"min_p": 0.1},
    "min_p_1": {"min_p": 1.0},
    "all": {"temperature": 0.8, "top_k": 300, "top_p": 0.9, "min_p": 0.02},
    "lfm2": {"temperature": 0.3, "min_p": 0.15},
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
@pytest.mark.parametrize("vocab", [1, 7, 1000, 5000])
def test_filters_and_draws_are_sampling_pys(params: dict, vocab: int, same_bits) -> None:
    """Token for token, for float32 scores without ties."""
    torch.manual_seed(1)
    by = SamplingState([SamplingParams(do_sample=True, **params)] * 40)
    logits = 4 * torch.randn(40, vocab)
    seen = torch.rand(40, vocab) < 0.3
    uniform = torch.rand(40, dtype=torch.float64)
    for penalty in (1.3, 0.7):
        each, out = torch.full((40,), penalty, dtype=torch.float64), torch.empty(40, vocab)
        BODIES.penalize_native(logits, seen, each, out)
        assert same_bits(out, sampling.penalize(logits, seen, each))
    expected, ours = sampling.warp(logits, by), warped(logits, by)
    assert same_bits(ours, expected)
    tokens = torch.full((40,), -1)
    BODIES.draw_native(ours, uniform, tokens)
    assert tokens.tolist() == sampling.draw(expected, uniform).tolist()


def warped(scores: torch.Tensor, by: SamplingState) -> torch.Tensor:
    out = torch.full_like(scores, NAN)
    BODIES.warp_native(scores, by.temperature, by.top_k, by.top_p, by.min_p, out)
    return out


def test_every_row_has_its_own_filters(same_bits) -> None:
    torch.manual_seed(0)
    rows = [SamplingParams(do_sample=True, **params) for params in PARAMS.values()]
    logits, by = 4 * torch.randn(len(rows), 700), SamplingState(rows)
    out = warped(logits, by)
    for row in range(len(rows)):
        assert same_bits(out[row : row + 1], sampling.warp(logits[row : row + 1], by.pick([row])))


def test_ties() -> None:
    """What ties with the k-th is kept; of ties where top-p cuts, the last ones are."""
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    kept = warped(scores, SamplingState([SamplingParams(do_sample=True, top_k=2)])).isfinite()
    assert kept.tolist() == [[False, True, True, True, True, False]]
    even, by = torch.zeros(1, 1000), SamplingState([SamplingParams(do_sample=True, top_p=0.25)])
    kept = warped(even, by).isfinite()
    assert not kept[0, :749].any() and kept[0, 751:].all()
    assert torch.equal(kept, sampling.warp(even, by).isfinite())


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_token_of_no_mass_is_never_drawn(data: st.DataObject) -> None:
    vocab = data.draw(st.integers(1, 300))
    scores = torch.full((1, vocab), -math.inf)
    for place in data.draw(st.sets(st.integers(0, vocab - 1), min_size=1, max_size=5)):
        scores[0, place] = data.draw(st.floats(-90, 90, width=32))
    edge = data.draw(st.sampled_from([0.5 / 2**32, 0.5, 1 - 0.5 / 2**32]))
    uniform, token = torch.tensor([edge], dtype=torch.float64), torch.tensor([-1])
    BODIES.draw_native(scores, uniform, token)
    assert scores.double().softmax(-1)[0, token] > 0


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_a_row_without_a_finite_best_has_no_token(bad: float) -> None:
    by = SamplingState([SamplingParams(do_sample=True, top_k=5, top_p=0.5, min_p=0.1)] * 2)
    for places in (slice(3, 4), slice(None)):
        scores, tokens = torch.randn(2, 500), torch.full((2,), 99999)
        scores[:, places] = bad
        masked = bad == -math.inf and places != slice(None)
        BODIES.best_tokens_native(scores, tokens)
        assert tokens.tolist() == (scores.argmax(-1).tolist() if masked else [-1, -1])
        assert warped(scores, by).shape == scores.shape
        BODIES.draw_native(scores, torch.tensor([0.1, 0.9], dtype=torch.float64), tokens)
        if masked:
            assert 3 not in tokens.tolist() and 0 <= tokens.min() and tokens.max() < 500
        else:
            assert tokens.tolist() == [-1, -1]


def test_numbers_are_sampling_pys() -> None:
    torch.manual_seed(0)
    seeds, rows, positions = torch.randint(-(2**62), 2**62, (3, 200)).unbind()
    rows, positions = rows.abs() % 2**40, positions.abs() % 2**33
    out = torch.full((200,), NAN, dtype=torch.float64)
    BODIES.philox_native(seeds, rows, positions, out)
    assert torch.equal(out, sampling.philox(seeds, rows, positions))
