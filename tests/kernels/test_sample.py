"""The operation ``sample``: one meaning, three implementations, the same tokens."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from lfm2_fast.kernels import sample
from lfm2_fast.kernels.sample import TILE, Scratch, sample_triton
from lfm2_fast.ops import native_library
from lfm2_fast.ops.base import Ops
from lfm2_fast.ops.sampling import SamplingParams, SamplingState, sample_ref
from lfm2_fast.ops.select import choose

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
FILTERS = {
    "temperature": {"temperature": 0.6},
    "top_k_1": {"top_k": 1},
    "top_k_most": {"top_k": 900},
    "top_p_0": {"top_p": 0.0},
    "top_p": {"top_p": 0.9},
    "min_p_1": {"min_p": 1.0},
    "top_p_and_min_p_1": {"top_p": 0.75, "min_p": 1.0},
    "all": {"temperature": 0.8, "top_k": 300, "top_p": 0.9, "min_p": 0.02},
    "lfm2": {"temperature": 0.3, "min_p": 0.15, "repetition_penalty": 1.05},
    "lfm2.5": {"temperature": 0.1, "top_k": 50, "top_p": 0.1, "repetition_penalty": 1.05},
    "reward": {"temperature": 1.7, "repetition_penalty": 0.7},
}
ROWS = [SamplingParams(do_sample=True, **one) for one in FILTERS.values()]
ROWS += [SamplingParams(), SamplingParams(repetition_penalty=1.3, top_k=3)]
# In the interpreter a row costs a tenth of a second.
MANY = 60 if INTERPRETED else 4000


def logits_of(kind: str, vocab: int) -> torch.Tensor:
    shape = (len(ROWS), vocab)
    if kind == "ties":  # as of a head in bfloat16: many tokens share a value
        return torch.randn(shape).bfloat16().float()
    if kind == "equal":
        return torch.full(shape, -3.25)
    if kind == "two_values":
        return torch.randint(2, shape).float()
    if kind == "wide":
        return 300 * torch.randn(shape)
    if kind == "most_are_cut":
        return torch.where(torch.rand(shape) < 0.99, -math.inf, torch.randn(shape))
    return 4 * torch.randn(shape)


@pytest.fixture(scope="module", params=["triton", "native"])
def ops(request: pytest.FixtureRequest, kernel_device: torch.device) -> Ops:
    device = torch.device("cpu") if request.param == "native" else kernel_device
    if request.param == "native" and (reason := native_library.why_not(device)):
        pytest.skip(reason)
    return choose(request.param, device, torch.float32)


@pytest.fixture(scope="module")
def agrees(ops: Ops, kernel_device: torch.device) -> Callable[..., None]:
    """Return a check that tokens, marks and positions are the reference's, step by step."""

    def check(steps: list[torch.Tensor], rows: list[SamplingParams] = ROWS, **kwargs) -> None:
        device = torch.device("cpu") if ops.name == "native" else kernel_device
        seen = torch.rand(steps[0].shape) < 0.3
        for marks in (None, seen):
            if marks is None and any(row.repetition_penalty != 1 for row in rows):
                continue
            states = [
                SamplingState(
                    rows,
                    device=where,
                    seen=None if marks is None else marks.clone().to(where),
                    positions=torch.arange(len(rows), device=where) * 1000,
                    **kwargs,
                )
                for where in (torch.device("cpu"), device)
            ]
            for logits in steps:
                expected = sample_ref(logits, states[0])
                found = ops.sample(logits.to(device), states[1]).cpu()
                assert found.dtype == torch.int64 and found.tolist() == expected.tolist()
                assert torch.equal(states[0].positions, states[1].positions.cpu())
                if marks is not None:
                    assert torch.equal(states[0].seen, states[1].seen.cpu())

    return check


KINDS = ["spread", "ties", "equal", "two_values", "wide", "most_are_cut"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_references(agrees, kind: str) -> None:
    """Over more than one tile of the vocabulary, for a batch in which no two rows are alike."""
    torch.manual_seed(0)
    agrees([logits_of(kind, TILE + 700)], seed=3)


@pytest.mark.usefixtures("grid_order")
def test_the_order_of_programs_decides_nothing(agrees) -> None:
    torch.manual_seed(5)
    rows = [ROWS[list(FILTERS).index("all")]] * 2
    agrees([logits_of("ties", 2 * TILE + 9)[:2]], rows, seed=3)


def test_a_search_of_many_scores_drops_those_that_it_decided(agrees) -> None:
    """More scores may be the cut than one pass holds; top-p alone, and behind a top-k."""
    torch.manual_seed(2)
    rows = [SamplingParams(do_sample=True, top_p=p, top_k=k) for p, k in ((0.5, 0), (0.4, 4000))]
    agrees([logits_of("ties", 2 * TILE + 50)[:2] / 30], rows, seed=4)


@pytest.mark.parametrize("vocab", [1, 129])
def test_small_vocabularies(agrees, vocab: int) -> None:
    torch.manual_seed(0)
    agrees([logits_of("spread", vocab)], seed=2**63 + 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_rows_that_stand_apart(agrees, framed, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    drawn = SamplingParams(do_sample=True, temperature=0.7)
    logits = framed(torch.randn(2, 300).to(dtype))
    agrees([logits], [drawn, SamplingParams()], seed=1)
    agrees([logits], [SamplingParams()] * 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("drawn", [False, True])
def test_a_row_without_a_token_is_reported_and_changes_no_other(
    ops: Ops, kernel_device: torch.device, bad: float, drawn: bool
) -> None:
    """Greedy rows, penalized and drawn ones; over more than one tile of the vocabulary."""
    torch.manual_seed(6)
    device = torch.device("cpu") if ops.name == "native" else kernel_device
    rows = [SamplingParams(), SamplingParams(repetition_penalty=1.2), SamplingParams()]
    if drawn:
        rows += [ROWS[list(FILTERS).index(name)] for name in ("temperature", "all", "lfm2")][::-1]
    logits = torch.randn(len(rows), TILE + 60)
    logits[:, 9] = -math.inf  # a mask

    def sample(logits: torch.Tensor) -> list[int]:
        seen = torch.zeros(logits.shape, dtype=torch.bool, device=device)
        state = SamplingState(rows, device=device, seed=1, seen=seen)
        tokens = ops.sample(logits.to(device), state).tolist()
        assert state.positions.tolist() == [1] * len(rows)
        return tokens

    good = sample(logits)
    assert min(good) >= 0 and 9 not in good
    for broken in (slice(1, None, 2), slice(0, None, 2)):
        some, every = logits.clone(), logits.clone()
        some[broken, TILE + 7], every[broken] = bad, bad
        expected = list(good)
        expected[broken] = [-1] * len(expected[broken])
        assert sample(every) == expected
        if bad == -math.inf:  # a mask too
            assert all(0 <= token != TILE + 7 for token in sample(some))
        else:
            assert sample(some) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_hostile_logits(agrees, bad: float) -> None:
    torch.manual_seed(2)
    some, all_of_it = logits_of("spread", 300), torch.full((len(ROWS), 300), bad)
    some[:, [5, 280]] = bad
    agrees([some, all_of_it], seed=4)


def test_zeros_of_both_signs_are_equal(agrees) -> None:
    torch.manual_seed(2)
    rows = ROWS[:5]
    agrees([torch.where(torch.rand(5, 300) < 0.5, -0.0, 0.0)], rows, seed=4)


def test_many_draws(agrees, ops: Ops) -> None:
    """The noise of float32 decides as the reference's of float64 does."""
    torch.manual_seed(3)
    draws = MANY if ops.name == "triton" else 4000
    rows = [SamplingParams(do_sample=True, temperature=1.2)] * draws
    agrees([3 * torch.randn(draws, 400)], rows, seed=9)


def test_drawn_as_often_as_likely(ops: Ops, kernel_device: torch.device) -> None:
    """A chi-squared test of draws from ten tokens."""
    draws = MANY if ops.name == "triton" else 4000
    device = torch.device("cpu") if ops.name == "native" else kernel_device
    state = SamplingState([SamplingParams(do_sample=True)] * draws, device=device, seed=1)
    logits = torch.linspace(0, 2, 10, device=device).repeat(draws, 1)
    counts = ops.sample(logits, state).bincount(minlength=10).double()
    wanted = logits[0].double().softmax(-1) * draws
    # The quantile that one honest run in 10^5 passes, of nine degrees of freedom.
    assert float(((counts - wanted) ** 2 / wanted).sum()) < 39.4


@pytest.mark.usefixtures("grid_order")
def test_each_launch_touches_its_own(kernel_device, traced, framed) -> None:
    """Scratch may hold anything before, and no program reads what another of its launch writes."""
    torch.manual_seed(4)
    rows = [ROWS[list(FILTERS).index("all")], SamplingParams()]
    logits = framed(torch.randn(2, TILE + 300)).to(kernel_device)
    seen = torch.rand(2, TILE + 300, device=kernel_device) < 0.5
    tokens = []
    for filler in (math.nan, 0.0):
        state = SamplingState(rows, seen=seen.clone(), device=kernel_device)
        token, scratch = torch.full_like(state.rows, -1), Scratch.empty(logits, **BOTH)
        for part in scratch:
            part.fill_(filler if part.is_floating_point() else -5)
        filters = (state.repetition_penalty, state.do_sample, state.temperature)
        filters += (state.top_k, state.top_p, state.min_p)
        places = (state.seeds, state.rows, state.positions)
        reads = [logits, *filters, state.seeds, state.rows]
        writes = [*scratch, token, state.positions, state.seen]
        launches = ["_sample_scores_kernel", "_sample_cut_kernel"]
        launches += ["_sample_draw_kernel", "_sample_last_kernel"]
        with pytest.MonkeyPatch.context() as patch:
            for name in launches:
                kernel = getattr(sample, name)
                patch.setattr(sample, name, Traced(kernel, partial(traced, reads, writes)))
            sample_triton(logits, state.seen, *filters, *places, token, scratch, **BOTH)
        tokens.append(token.tolist())
    assert tokens[0] == tokens[1] and min(tokens[0]) >= 0


BOTH = {"draws": True, "cuts": True}


class Traced:
    """A kernel whose launches run in a context of their own."""

    def __init__(self, kernel: Any, context: Callable[[], Any]) -> None:
        self.kernel, self.context = kernel, context

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            with self.context():
                self.kernel[grid](*args, **kwargs)

        return launch


def test_no_rows(ops: Ops, kernel_device: torch.device) -> None:
    device = torch.device("cpu") if ops.name == "native" else kernel_device
    state = SamplingState([], device=device)
    assert ops.sample(torch.empty(0, 40, device=device), state).shape == (0,)


def test_wrong_layouts_are_refused(kernel_device: torch.device) -> None:
    ops = choose("triton", kernel_device, torch.float32)
    logits = torch.zeros(2, 40, device=kernel_device)
    for wrong in (
        {"logits": torch.zeros(40, 2, device=kernel_device).t()},
        {"logits": logits.double()},
        {"logits": logits[:1]},
        {"top_k": torch.zeros(2, device=kernel_device)},
        {"seen": torch.zeros(2, 40, dtype=torch.int8, device=kernel_device)},
        {"seen": torch.zeros(2, 41, dtype=torch.bool, device=kernel_device)},
        {"positions": torch.zeros(4, dtype=torch.int64, device=kernel_device)[::2]},
    ):
        state = SamplingState([SamplingParams(do_sample=True, top_k=2)] * 2, device=kernel_device)
        given = wrong.pop("logits", logits)
        for name, value in wrong.items():
            setattr(state, name, value)
        with pytest.raises(AssertionError):
            ops.sample(given, state)
