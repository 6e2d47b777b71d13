"""The projections of a few tokens with what is fused to them, against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lfm2_fast.kernels.advance import advance_triton
from lfm2_fast.kernels.gemv import MOST_TOKENS
from lfm2_fast.kernels.head_argmax import argmax_advance_triton, head_argmax_triton
from lfm2_fast.kernels.linear_add import linear_add_triton
from lfm2_fast.kernels.norm_linear import norm_linear_triton
from lfm2_fast.kernels.norm_swiglu import norm_swiglu_triton
from lfm2_fast.kernels.tiling import Tiling
from lfm2_fast.ops import reference as ref
from lfm2_fast.weights.formats import INT8

EPS = 1e-5
NAN = float("nan")
WORDS = ("norm_linear", "norm_swiglu", "linear_add")
# N, K and a tiling: one of everything; rows and columns that fill no tile; whole tiles; programs
# that take different numbers of tiles, and load two ahead; K of several tiles and the last of
# them not full.
SHAPES = [
    (1, 2, Tiling(8, 64, 1, 1)),
    (7, 100, Tiling(8, 128, 2, 3)),
    (32, 64, Tiling(8, 64, 1, 4)),
    (21, 96, Tiling(8, 64, 1, 2, depth=2)),
    (5, 1500, Tiling(8, 512, 4, 1)),
]
SEVERAL = Tiling(8, 512, 4, 2)
ids = dict(ids=lambda value: "x".join(map(str, value[:2])) if isinstance(value, tuple) else None)


class Case:
    """Random inputs of a word: rows of very different size, the last one zero."""

    def __init__(
        self,
        word: str,
        tokens: int,
        n: int,
        k: int,
        bias: bool,
        dtype: torch.dtype,
        device: Any,
        int8: bool = False,
    ) -> None:
        def some(*shape: int) -> torch.Tensor:
            return torch.randn(shape)

        rows = 2 * n if word == "norm_swiglu" else n
        scale = torch.logspace(-2, 2, tokens)[:, None]
        scale[1:][-1:] = 0
        self.word, self.shape = word, (tokens, n)
        inputs = {
            "x": some(tokens, k) * scale,
            "norm": some(k),
            "weight": some(rows, k) / k**0.5,
            "bias": some(rows) if bias else None,
            "residual": some(tokens, n) * scale,
        }
        self.inputs = {
            name: None if value is None else value.to(dtype).to(device)
            for name, value in inputs.items()
        }
        self.inputs["scale"] = None
        if int8:
            numbers, scale = INT8.quantize(inputs["weight"])
            self.inputs |= {"weight": numbers.to(device), "scale": scale.to(device)}

    def meaning(self, dtype: torch.dtype) -> torch.Tensor:
        inputs = {**self.inputs}
        scale = inputs.pop("scale")
        if scale is not None:
            inputs["weight"] = INT8.dequantize((inputs["weight"], scale), dtype)
        wide = (value if value is None else value.to(dtype) for value in inputs.values())
        x, norm, weight, bias, residual = wide
        if self.word == "linear_add":
            return residual + ref.linear_ref(x, weight, bias)
        out = ref.linear_ref(ref.rms_norm_ref(x, norm, EPS), weight, bias)
        return out if self.word == "norm_linear" else ref.swiglu_ref(out)

    def launch(self, out: torch.Tensor, tiling: Tiling | None) -> None:
        x, norm, weight, bias, residual, scale = self.inputs.values()
        if self.word == "linear_add":
            linear_add_triton(x, weight, bias, scale, residual, out, tiling=tiling)
        else:
            if tiling and self.word == "norm_swiglu":
                tiling = replace(tiling, block_n=tiling.block_n // 2)
            body = norm_linear_triton if self.word == "norm_linear" else norm_swiglu_triton
            body(x, norm, EPS, weight, bias, scale, out, tiling=tiling)

    def run(self, tiling: Tiling | None) -> torch.Tensor:
        out = torch.full(self.shape, NAN).to(self.inputs["x"])
        self.launch(out, tiling)
        return out

    def reads(self) -> list[torch.Tensor]:
        skipped = {"norm"} if self.word == "linear_add" else {"residual"}
        return [v for k, v in self.inputs.items() if v is not None and k not in skipped]


@pytest.mark.usefixtures("grid_order")
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("shape", SHAPES, **ids)
@pytest.mark.parametrize("tokens", [1, 4])
def test_against_the_reference(
    word, shape, tokens, kernel_device, kernel_dtype, framed, intact, traced, within_budget
) -> None:
    torch.manual_seed(tokens)
    n, k, tiling = shape
    case = Case(word, tokens, n, k, tokens == 1, kernel_dtype, kernel_device)
    exact, plain = case.meaning(torch.float64), case.meaning(kernel_dtype)
    for name in ("x", "residual"):
        case.inputs[name] = framed(case.inputs[name])
    out = framed(torch.full_like(plain, NAN))
    with traced(case.reads(), [out]):
        case.launch(out, tiling)
    assert intact(out)
    within_budget(out, exact, plain, by_row=True)


@pytest.mark.parametrize("word", WORDS)
def test_a_row_does_not_depend_on_the_other_rows(
    word, kernel_device, kernel_dtype, same_bits, within_budget
) -> None:
    """Alone, among sixteen, and beside a row that is NaN, its bits are the same."""
    torch.manual_seed(0)
    case = Case(word, MOST_TOKENS, 21, 1100, True, kernel_dtype, kernel_device)
    exact, plain = case.meaning(torch.float64), case.meaning(kernel_dtype)
    within_budget(case.run(SEVERAL), exact, plain, by_row=True)
    case.inputs["x"][3] = NAN
    together = case.run(SEVERAL)
    assert together[3].isnan().all()
    for token in (0, 7, MOST_TOKENS - 2):
        alone = Case(word, 1, 21, 1100, True, kernel_dtype, kernel_device)
        alone.inputs = dict(case.inputs)
        for name in ("x", "residual"):
            alone.inputs[name] = case.inputs[name][token : token + 1]
        assert same_bits(alone.run(SEVERAL), together[token : token + 1])


def test_the_projection_is_rounded_before_the_addition(
    kernel_device, kernel_dtype, same_bits
) -> None:
    """Sums of short numbers are exact in any order, so all bits are the reference's."""
    torch.manual_seed(0)
    case = Case("linear_add", 5, 40, 64, True, kernel_dtype, kernel_device)
    for value in case.reads():
        value.copy_(torch.randint(-99, 99, value.shape) / 64)
    assert same_bits(case.run(None), case.meaning(kernel_dtype))


def test_the_norm_is_rounded_before_and_after_its_weight(kernel_device) -> None:
    """Sums of what was normed are exact here, but the root may differ in its last bit."""
    torch.manual_seed(0)
    case = Case("norm_linear", 5, 200, 64, False, torch.float16, kernel_device)
    x, norm, weight = (case.inputs[name] for name in ("x", "norm", "weight"))
    x.copy_((1 + torch.rand(x.shape)) * (2 * torch.randint(2, x.shape) - 1))
    norm.copy_(1 + torch.rand(norm.shape))
    weight.copy_(2 * torch.randint(2, weight.shape) - 1)
    equal = case.run(None) == case.meaning(torch.float16)
    assert equal.double().mean() > 0.97


@pytest.mark.parametrize("word", WORDS)
def test_no_tokens(word, kernel_device, kernel_dtype) -> None:
    case = Case(word, 1, 8, 64, False, kernel_dtype, kernel_device)
    for name in ("x", "residual"):
        case.inputs[name] = case.inputs[name][:0]
    case.shape = (0, 8)
    assert case.run(None).shape == (0, 8)


def test_the_residual_may_be_what_is_written(kernel_device, same_bits) -> None:
    case = Case("linear_add", 4, 12, 40, False, torch.float32, kernel_device)
    expected = case.run(SHAPES[3][2])
    case.launch(case.inputs["residual"], SHAPES[3][2])
    assert same_bits(case.inputs["residual"], expected)


@pytest.mark.parametrize("word", WORDS)
def test_wrong_layouts_are_refused(word, kernel_device) -> None:
    def launch(tokens: int = 4, **changed: torch.Tensor) -> None:
        case = Case(word, tokens, 32, 64, True, torch.float32, kernel_device)
        case.inputs.update(changed)
        case.run(None)

    launch()
    zeros = torch.zeros(64, 64, device=kernel_device)
    rows = 64 if word == "norm_swiglu" else 32
    for changed in (
        {"tokens": MOST_TOKENS + 1},
        {"x": zeros[:, :4].t()},
        {"weight": zeros[:, :rows].t()},
        {"weight": zeros[:31]},
        {"bias": zeros[0, :31]},
        {"x": zeros[:4].half()},
        # Rows of half a word.
        {"x": zeros[:4, :63].half(), "weight": zeros[:rows, :63].half()},
    ):
        with pytest.raises(AssertionError):
            launch(**changed)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4]], **ids)
def test_int8_against_the_widened_matrix(
    word, shape, kernel_device, kernel_dtype, framed, intact, traced, within_budget, same_bits
) -> None:
    """The bits of a row are the same alone."""
    torch.manual_seed(0)
    n, k, tiling = shape
    case = Case(word, 4, n, k, True, kernel_dtype, kernel_device, int8=True)
    exact, plain = case.meaning(torch.float64), case.meaning(kernel_dtype)
    out = framed(torch.full_like(plain, NAN))
    with traced(case.reads(), [out]):
        case.launch(out, tiling)
    assert intact(out)
    within_budget(out, exact, plain, by_row=True)
    for name in ("x", "residual"):
        case.inputs[name] = case.inputs[name][1:2]
    case.shape = (1, n)
    assert same_bits(case.run(tiling), out[1:2])


@pytest.mark.parametrize("tokens", [1, 5])
def test_int8_head_argmax(tokens, kernel_device, kernel_dtype, traced) -> None:
    torch.manual_seed(0)
    n, k, tiling = SHAPES[3]
    case = Case("norm_linear", tokens, n, k, True, kernel_dtype, kernel_device, int8=True)
    expected = case.run(tiling).argmax(-1)
    assert best_tokens(case, tiling, traced).tolist() == expected.tolist()


@pytest.mark.parametrize("word", WORDS)
def test_scales_that_do_not_fit_are_refused(word, kernel_device) -> None:
    case = Case(word, 2, 8, 64, False, torch.float32, kernel_device, int8=True)
    case.run(None)
    scale = case.inputs["scale"]
    for wrong in (None, scale.half(), scale[:-1], scale.repeat_interleave(2)[::2]):
        case.inputs["scale"] = wrong
        with pytest.raises(AssertionError):
            case.run(None)
    dense = Case(word, 2, 8, 64, False, torch.float32, kernel_device)
    dense.inputs["scale"] = scale
    with pytest.raises(AssertionError):
        dense.run(None)


def best_tokens(case: Case, tiling: Tiling, traced: Any) -> torch.Tensor:
    x, norm, weight, bias, _, scale = case.inputs.values()
    best = torch.full((tiling.programs, MOST_TOKENS), 2**62, device=x.device)
    with traced(case.reads(), [best]):
        head_argmax_triton(x, norm, EPS, weight, bias, scale, best, tiling=tiling)
    ours, theirs = step_inputs(len(x), x.device), step_inputs(len(x), x.device)
    eos, written = EOS[: len(x)].to(x.device), ours[-1]
    with traced([best, eos], ours):
        argmax_advance_triton(best, eos, 7, *ours)
    # What it does with the tokens is what the kernel does that is handed them.
    advance_triton(written.clone(), eos, 7, *theirs)
    assert all(map(torch.equal, ours, theirs))
    return written


# End tokens of the rows: the second one ends with any of a few.
EOS = torch.tensor([[-1, -1, -1], [4, 5, 20], [-1, -1, -1], [2, 9, -1], [0, 1, 3]])


def step_inputs(rows: int, device: torch.device) -> list[torch.Tensor]:
    """Inputs of a step of which the last row is finished, and room for its tokens."""
    whole = torch.arange(3, 3 + rows, device=device)
    finished = whole == 2 + rows
    return [whole.clone(), whole.clone(), whole.clone(), whole.int() + 1, finished, whole.clone()]


@pytest.mark.usefixtures("grid_order")
@pytest.mark.parametrize("shape", SHAPES, **ids)
@pytest.mark.parametrize("tokens", [1, 5])
def test_head_argmax(shape, tokens, kernel_device, kernel_dtype, traced) -> None:
    """The tokens of the logits that norm_linear gives, to the bit, so ties are among them."""
    torch.manual_seed(0)
    n, k, tiling = shape
    case = Case("norm_linear", tokens, n, k, tokens == 1, kernel_dtype, kernel_device)
    expected = case.run(tiling).argmax(-1)
    assert best_tokens(case, tiling, traced).tolist() == expected.tolist()


def test_head_argmax_takes_the_first_of_equals(kernel_device, kernel_dtype, traced) -> None:
    """Equal logits are in one tile, in two tiles or two programs. Zeros of both signs are equal."""
    inf = float("inf")
    case = Case("norm_linear", 3, 23, 40, True, kernel_dtype, kernel_device)
    case.inputs["weight"].zero_()
    for equals, value in (
        ((4, 5, 22), 1.0),
        ((20,), 2.0),
        ((21, 22), -0.5),
        ((9, 11, 13), torch.finfo(kernel_dtype).max),
    ):
        case.inputs["bias"].fill_(-1)
        case.inputs["bias"][list(equals)] = value
        assert best_tokens(case, SHAPES[3][2], traced).tolist() == [equals[0]] * 3
    case.inputs["bias"].fill_(-inf)
    case.inputs["bias"][[5, 8]] = 0
    case.inputs["weight"][5, 0] = -torch.finfo(kernel_dtype).smallest_normal
    case.inputs["norm"].fill_(2**-14)
    case.inputs["x"].fill_(1)
    logits = case.run(None)
    assert kernel_dtype != torch.float16 or (logits[:, 5].signbit() & (logits[:, 5] == 0)).all()
    assert best_tokens(case, SHAPES[3][2], traced).tolist() == logits.argmax(-1).tolist()


def test_head_argmax_has_no_token_where_the_best_is_not_finite(
    kernel_device, kernel_dtype, traced
) -> None:
    """The NaN is in any program, with any sign and bits. Other rows do not change."""
    inf, tiling = float("inf"), SHAPES[3][2]
    case = Case("norm_linear", 3, 23, 40, True, kernel_dtype, kernel_device)
    case.inputs["weight"].zero_()
    case.inputs["x"].fill_(1)
    for places, value in (((9, 11, 13), inf), ((22,), NAN), ((1, 3, 17), -NAN), (range(23), -inf)):
        case.inputs["bias"].fill_(-1)
        case.inputs["bias"][list(places)] = value
        assert best_tokens(case, tiling, traced).tolist() == [-1] * 3
    case.inputs["bias"][[5, 8]] = torch.finfo(kernel_dtype).min
    assert best_tokens(case, tiling, traced).tolist() == [5] * 3
    for row, value in ((1, NAN), (2, inf)):
        case.inputs["x"][row] = value
        assert best_tokens(case, tiling, traced).tolist() == [5, -1, 5 if row == 1 else -1]
