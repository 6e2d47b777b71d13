"""Products of few tokens and an int4 weight, and a widened one, against the dense matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lfm2_fast.kernels.gemv import MOST_TOKENS
from lfm2_fast.kernels.head_argmax import argmax_advance_triton, head_argmax_triton
from lfm2_fast.kernels.linear_add import linear_add_triton
from lfm2_fast.kernels.norm_conv import norm_conv_triton
from lfm2_fast.kernels.norm_linear import norm_linear_triton
from lfm2_fast.kernels.norm_swiglu import norm_swiglu_triton
from lfm2_fast.kernels.tiling import Tiling
from lfm2_fast.kernels.widen import widen_int4_triton
from lfm2_fast.ops import reference as ref
from lfm2_fast.weights.formats import INT4
from tests.batches import batch_of

EPS = 1e-5
# Outputs and columns, which fill no tile of several groups.
N, K = 72, 96
# A thread has a word of one, two and four rows, and of four rows twice; two tiles load ahead once.
BY_ROW, DEEP = Tiling(8, 64, 2, 2), Tiling(32, 32, 1, 2, depth=2)
TILINGS = [BY_ROW, Tiling(16, 64, 2, 1), DEEP, Tiling(64, 128, 1, 1)]
PARTS = {"norm_linear": 1, "linear_add": 1, "norm_swiglu": 2, "norm_conv": 3}


class Case:
    """Random inputs of an operation, its weight quantized and interleaved."""

    def __init__(self, word: str, tokens: int, dtype: torch.dtype, device: Any) -> None:
        def some(*shape: int) -> torch.Tensor:
            return torch.randn(shape).to(dtype).to(device)

        self.word, rows = word, PARTS[word] * N
        self.x, self.norm, self.residual = some(tokens, K), some(K), some(tokens, N)
        self.bias, self.taps, self.window = some(rows), some(N, 3), some(tokens, 3, N)
        self.batch = batch_of([2] * tokens, [1] * tokens, list(range(tokens)), device)
        self.parts = [part.to(device) for part in INT4.quantize(torch.randn(rows, K) / K**0.5)]
        # Groups of every size, one of zeros among them.
        self.parts[1] *= 10.0 ** torch.randint(-2, 2, self.parts[1].shape).to(device)
        self.parts[1][5, 1] = 0
        INT4.interleave(self.parts)

    def run(self, tiling: Tiling | None) -> torch.Tensor:
        numbers, scale = self.parts
        weight = (numbers, self.bias, scale)
        normed = (self.x, self.norm, EPS, *weight)
        out = torch.full_like(self.residual[: len(self.x)], float("nan"))
        more = {"tiling": tiling}
        if self.word == "linear_add":
            linear_add_triton(self.x, *weight, self.residual, out, **more)
        elif self.word == "norm_conv":
            places = (self.window.clone(), self.batch.positions, self.batch.slots)
            norm_conv_triton(*normed, self.taps, None, *places, out, **more)
        else:
            body = norm_linear_triton if self.word == "norm_linear" else norm_swiglu_triton
            body(*normed, out, **more)
        return out

    def meaning(self, dtype: torch.dtype) -> torch.Tensor:
        wide = (each.to(dtype) for each in (self.x, self.norm, self.residual, self.bias))
        x, norm, residual, bias = wide
        weight = INT4.matrix(self.parts, dtype)
        if self.word == "linear_add":
            return residual + ref.linear_ref(x, weight, bias)
        out = ref.linear_ref(ref.rms_norm_ref(x, norm, EPS), weight, bias)
        if self.word == "norm_conv":
            taps, window = self.taps.to(dtype), self.window.to(dtype, copy=True)
            return ref.gated_conv_step_ref(out, taps, None, window, self.batch)
        return out if self.word == "norm_linear" else ref.swiglu_ref(out)


@pytest.mark.parametrize("word", PARTS)
@pytest.mark.parametrize("tiling", TILINGS, ids=lambda tiling: f"{tiling.block_n}rows")
def test_against_the_widened_matrix(
    word, tiling, kernel_device, kernel_dtype, within_budget, same_bits
) -> None:
    """A row has the same bits alone."""
    torch.manual_seed(0)
    case = Case(word, 3, kernel_dtype, kernel_device)
    if PARTS[word] * tiling.block_n > 64:
        tiling = BY_ROW
    exact, plain = case.meaning(torch.float64), case.meaning(kernel_dtype)
    found = case.run(tiling)
    within_budget(found, exact, plain)
    if tiling is DEEP:
        case.x, case.residual = case.x[:1], case.residual[:1]
        case.batch = batch_of([2], [1], [0], kernel_device)
        assert same_bits(case.run(tiling), found[:1])


def test_only_the_weight_is_read(kernel_device, traced) -> None:
    torch.manual_seed(0)
    case = Case("norm_linear", 2, torch.float16, kernel_device)
    out = torch.empty(2, N, dtype=torch.float16, device=kernel_device)
    numbers, scale = case.parts
    with traced([case.x, case.norm, case.bias, numbers, scale], [out]):
        norm_linear_triton(
            case.x, case.norm, EPS, numbers, case.bias, scale, out, tiling=TILINGS[1]
        )


def test_head_argmax(kernel_device, kernel_dtype) -> None:
    torch.manual_seed(0)
    case, tiling = Case("norm_linear", 3, kernel_dtype, kernel_device), DEEP
    numbers, scale = case.parts
    best = torch.empty(tiling.programs, MOST_TOKENS, dtype=torch.int64, device=kernel_device)
    whole = torch.zeros(3, dtype=torch.int64, device=kernel_device)
    inputs = (torch.zeros_like(whole), whole, whole.clone(), whole.int(), whole.bool())
    tokens = torch.empty_like(whole)
    weight = (numbers, case.bias, scale)
    head_argmax_triton(case.x, case.norm, EPS, *weight, best, tiling=tiling)
    argmax_advance_triton(best, whole[:, None] - 1, None, *inputs, tokens)
    assert tokens.tolist() == case.run(tiling).argmax(-1).tolist()


def test_tensors_that_do_not_fit_are_refused(kernel_device) -> None:
    case = Case("norm_linear", 2, torch.float32, kernel_device)
    case.run(None)
    numbers, scale = case.parts
    for parts in (
        (numbers, scale.float()),
        (numbers, scale[:, :-1]),
        (numbers.char(), scale),
        # The last rows of these stand side by side with fewer than seven others.
        (numbers[:71], scale[:71]),
    ):
        case.parts = list(parts)
        with pytest.raises(AssertionError):
            case.run(None)


@pytest.mark.parametrize("rows", [8, 21])
def test_widened(rows, kernel_device, kernel_dtype, traced) -> None:
    """Each number has the bits of the format's own; fewer than eight rows are at the end."""
    torch.manual_seed(0)
    parts = [part.to(kernel_device) for part in INT4.quantize(torch.randn(rows, K))]
    INT4.interleave(parts)
    out = torch.full((rows, K), float("nan"), dtype=kernel_dtype, device=kernel_device)
    with traced(parts, [out]):
        widen_int4_triton(*parts, out)
    assert torch.equal(out, INT4.matrix(parts, kernel_dtype))
