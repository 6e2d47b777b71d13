"""The extension's projections of a few tokens, in floats and in 8-bit integers."""

from __future__ import annotations

import pytest
import torch

from lfm2_fast.ops import native_library
from lfm2_fast.ops import reference as ref
from lfm2_fast.ops.native_ops import NativeOps
from lfm2_fast.weights.formats import DENSE, INT8, Projection

EPS = 1e-5
NAN = float("nan")
BODIES = torch.ops.lfm2_fast
# Groups of every size, and more than one pass over the matrix takes.
TOKENS = [1, 2, 3, 4, 5, 7, 8, 15, 33, 70]
# Whole steps of every instruction set, what is left of them, single numbers, rows left over.
SHAPES = [(1, 1), (3, 5), (64, 64), (66, 100), (130, 1024), (7, 4608)]

_lacking = native_library.why_not(torch.device("cpu"))
pytestmark = [
    pytest.mark.skipif(_lacking is not None, reason=str(_lacking)),
    pytest.mark.usefixtures("threads"),
]


def factors(
    tokens: int, rows: int, size: int, dtype: torch.dtype, int8: bool
) -> tuple[torch.Tensor, Projection]:
    """Tokens of very different size, and a matrix with a bias."""
    torch.manual_seed(rows + tokens)
    x = (torch.randn(tokens, size) * torch.logspace(-2, 2, tokens)[:, None]).to(dtype)
    matrix = Projection(rows, size, bias=True, format=INT8 if int8 else DENSE)
    weight = torch.randn(rows, size) / size**0.5
    if int8:
        matrix.weight.data, matrix.weight_scale = INT8.quantize(weight)
    else:
        matrix.weight.data = weight.to(dtype)
    assert matrix.bias is not None
    matrix.bias.data = torch.randn(rows).to(dtype)
    return x, matrix.requires_grad_(False)


def linear(x: torch.Tensor, matrix: Projection, bias: bool = True) -> torch.Tensor:
    """Return the reference's result, with everything in the dtype of ``x``."""
    added = matrix.bias.to(x.dtype) if bias else None
    if matrix.format is INT8:
        return ref.dynamic_linear_ref(x, matrix.weight, matrix.weight_scale, added)
    return ref.linear_ref(x, matrix.weight.to(x.dtype), added)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_linear_add(tokens, shape, int8, dtype, framed, intact, within_budget) -> None:
    """The result replaces the residual or is separate. Tensors are sliced."""
    if dtype == torch.float32 and not int8:
        tokens = min(tokens, 32)  # PyTorch multiplies more.
    rows, size = shape
    x, matrix = factors(tokens, rows, size, dtype, int8)
    residual = torch.randn(tokens, rows).to(dtype)
    exact = linear(x.double(), matrix) + residual.double()
    plain = linear(x, matrix) + residual
    where = matrix.weight if int8 else framed(matrix.weight)
    for out in (framed(torch.full_like(residual, NAN)), framed(residual)):
        base = residual if out.isnan().any() else out
        BODIES.linear_add_native(framed(x), where, matrix.weight_scale, matrix.bias, base, out)
        assert intact(out)
        within_budget(out, exact, plain, by_row=True)


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_norms_come_before(tokens, shape, int8, dtype, framed, within_budget) -> None:
    """``norm_linear`` and ``norm_swiglu``: the norm is the extension's own, which others prove."""
    rows, size = shape
    x, matrix = factors(tokens, 2 * rows, size, dtype, int8)
    norm = torch.rand(size).to(dtype)
    normed = torch.empty_like(x)
    BODIES.rms_norm_native(x, norm, EPS, normed)
    wide, plain = linear(normed.double(), matrix), linear(normed, matrix)
    out = torch.full((tokens, 2 * rows), NAN, dtype=dtype)
    weights = matrix.weight, matrix.weight_scale
    BODIES.norm_linear_native(framed(x), norm, EPS, *weights, matrix.bias, out)
    within_budget(out, wide, plain, by_row=True)

    gates, exact_gates = (linear(y, matrix, bias=False) for y in (normed, normed.double()))
    out = torch.full((tokens, rows), NAN, dtype=dtype)
    BODIES.norm_swiglu_native(framed(x), norm, EPS, *weights, out)
    within_budget(out, ref.swiglu_ref(exact_gates), ref.swiglu_ref(gates))


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_a_token_does_not_depend_on_the_other_tokens(int8, dtype, same_bits) -> None:
    x, matrix = factors(64, 200, 1030, dtype, int8)
    base = torch.zeros(64, 200, dtype=dtype)

    def run(rows: slice) -> torch.Tensor:
        out = torch.full_like(base[rows], NAN)
        weights = matrix.weight, matrix.weight_scale, matrix.bias
        BODIES.linear_add_native(x[rows], *weights, base[rows], out)
        return out

    together = run(slice(None))
    for rows in (slice(0, 1), slice(3, 7), slice(7, 22), slice(20, 52), slice(63, 64)):
        assert same_bits(run(rows), together[rows])


def test_numbers_that_are_not_read_do_not_matter(dtype) -> None:
    """NaN around the matrix, which is asked for ahead of its end, and between its rows."""
    whole = torch.full((70, 80), NAN, dtype=dtype)
    weight = whole[2:68, 4:72]
    weight.copy_(torch.randn(66, 68))
    x, out = torch.randn(3, 68).to(dtype), torch.full((3, 66), NAN, dtype=dtype)
    BODIES.linear_add_native(x, weight, None, None, torch.zeros_like(out), out)
    assert out.isfinite().all()


def test_tokens_are_rounded_as_the_reference_does(dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(40, 333) * torch.logspace(-20, 3, 40)[:, None]).to(dtype)
    x[7], x[8, 5] = 0, 60000
    numbers, scales = torch.empty(x.shape, dtype=torch.int8), torch.empty(40)
    BODIES.quantize_native(x, numbers, scales)
    expected = ref.quantize_ref(x)
    assert torch.equal(numbers, expected[0])
    assert torch.equal(scales, expected[1])


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_nan_in_a_token_changes_no_other_token(bad: float, dtype) -> None:
    x, matrix = factors(3, 20, 100, dtype, True)
    x[1, 50] = bad
    out = torch.zeros(3, 20, dtype=dtype)
    BODIES.linear_add_native(x, matrix.weight, matrix.weight_scale, None, out.clone(), out)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_products_do_not_overflow() -> None:
    """The largest numbers in every place, as many as the widest published matrix has."""
    size = 10752
    weight = torch.full((5, size), -127, dtype=torch.int8)
    weight[1], weight[2] = 127, -128
    x, scale = torch.ones(2, size), torch.full((5,), 1 / 127)
    x[1] = -1
    out = torch.zeros(2, 5, dtype=torch.float32)
    BODIES.linear_add_native(x, weight, scale, None, out.clone(), out)
    expected = torch.full((2, 5), float(size))
    expected[0], expected[1, 1] = -size, -size
    expected[0, 1] = size
    expected[:, 2] *= 128 / 127
    assert torch.allclose(out, expected, rtol=1e-6)


def test_products_of_many_tokens_are_finished(dtype, within_budget) -> None:
    x, matrix = factors(50, 70, 333, dtype, True)
    numbers, scales = ref.quantize_ref(x)
    products = (numbers.int()[:, None] * matrix.weight.int()).sum(-1, dtype=torch.int32)
    out = torch.full((50, 70), NAN, dtype=dtype)
    BODIES.finish_products_native(products, scales.float(), matrix.weight_scale, matrix.bias, out)
    within_budget(out, linear(x.double(), matrix), linear(x, matrix), by_row=True)


def test_many_tokens_are_right(dtype) -> None:
    """PyTorch multiplies 8-bit integers, unless its product overflows."""
    torch.manual_seed(0)
    matrix = Projection(200, 512, format=INT8)
    matrix.weight.data, matrix.weight_scale = INT8.quantize(torch.randn(200, 512))
    x = torch.randn(64, 512)
    x[3, 100] = 300  # an outlier, which must leave other tokens alone
    x = x.to(dtype)
    ours = NativeOps().linear(x, matrix).double()
    exact = ref.linear_ref(x.double(), matrix.dequantized(torch.float64))
    error = (ours - exact).norm(dim=-1) / exact.norm(dim=-1)
    # Rounding to 8 bits costs a token about its largest number over 127 * sqrt(12) * its rms.
    wide = x.double()
    most = wide.abs().amax(-1) / (127 * 12**0.5 * wide.square().mean(-1).sqrt())
    assert (error < 1.3 * most + 2 * torch.finfo(dtype).eps).all(), error.max()
