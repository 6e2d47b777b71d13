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
    by = SamplingState([SamplingParams(do_sample=True, **params)] * 40, seed=-5)
    logits = 4 * torch.randn(40, vocab)
    seen = torch.rand(40, vocab) < 0.3
    for penalty in (1.3, 0.7):
        each, out = torch.full((40,), penalty, dtype=torch.float64), torch.empty(40, vocab)
        BODIES.penalize_native(logits, seen, each, out)
        assert same_bits(out, sampling.penalize(logits, seen, each))
    expected, ours = sampling.warp(logits, by), warped(logits, by)
    assert same_bits(ours, expected)
    assert drawn(ours, by).tolist() == sampling.draw(expected, by).tolist()


def drawn(scores: torch.Tensor, by: SamplingState) -> torch.Tensor:
    tokens = torch.full((len(scores),), 99999)
    BODIES.draw_native(scores, by.seeds, by.rows, by.positions, tokens)
    return tokens


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
    """Tokens that tie with the k-th are kept. If top-p cuts among ties, the last ones are kept."""
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
    by = SamplingState([SamplingParams()], seed=data.draw(st.integers(0, 2**64 - 1)))
    assert scores[0, drawn(scores, by)] > -math.inf


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("vocab", [3, 129, 1000])
def test_draws_are_sampling_pys(spread: float, vocab: int) -> None:
    """Draws are equal although blocks with low scores or little noise are skipped.

    Seeds, rows and positions have more bits than the counter.
    """
    torch.manual_seed(2)
    by = SamplingState([SamplingParams()] * 1000)
    by.seeds, rows, positions = torch.randint(-(2**62), 2**62, (3, 1000)).unbind()
    by.rows, by.positions = rows.abs() % 2**40, positions.abs() % 2**33
    scores = spread * torch.randn(1000, vocab)
    assert drawn(scores, by).tolist() == sampling.draw(scores, by).tolist()


def test_the_least_word_wins_among_equals() -> None:
    """Equal scores leave the choice to the words alone, whose order noise keeps."""
    by = SamplingState([SamplingParams()] * 200, seed=2**63 + 9)
    words = sampling.philox(by.seeds, by.rows, by.positions, 777)
    assert drawn(torch.full((200, 777), -3.25), by).tolist() == words.argmin(-1).tolist()


def test_noise_is_sampling_pys() -> None:
    """The difference is below 6e-6. A row's score measures the difference of two tokens' noise.

    The bound is twice the error of the noise, and the rounding of its sum with a score. The rows
    have words of all sizes, the least below one in 10^5.
    """
    rows = 200_000
    by = SamplingState([SamplingParams()] * rows, seed=8)
    noise = sampling.gumbel(by.seeds, by.rows, by.positions, 2)
    scores = torch.zeros(rows, 2)
    for place, off in enumerate((6e-6, -6e-6)):
        scores[:, 0] = noise[:, 1] - noise[:, 0] + off
        assert (drawn(scores, by) == place).all()


def test_rare_tokens_are_drawn_as_often_as_likely() -> None:
    """A thousand of one in a million each, beside a likely one; and as the reference does."""
    rare, rows = 1000, 20_000
    scores = torch.full((rare + 1,), math.log(1e-6))
    scores[0] = math.log1p(-rare * 1e-6)
    by = SamplingState([SamplingParams()] * rows, seed=3)
    found = 0
    for _ in range(15):
        tokens = drawn(scores.expand(rows, -1), by)
        found += int((tokens != 0).sum())
        by.positions += 1
    # 300 are expected; the binomial is this far off once in 10^5 runs.
    assert abs(found - 300) < 4.4 * math.sqrt(300)
    by.positions -= 1
    some = (tokens != 0).nonzero()[:, 0]
    by = SamplingState(
        [SamplingParams()] * len(some), seed=3, rows=some, positions=by.positions[some]
    )
    assert sampling.draw(scores.expand(len(some), -1), by).tolist() == tokens[some].tolist()


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
        tokens = drawn(scores, by)
        if masked:
            assert 3 not in tokens.tolist() and 0 <= tokens.min() and tokens.max() < 500
        else:
            assert tokens.tolist() == [-1, -1]
