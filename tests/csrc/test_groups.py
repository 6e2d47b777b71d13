"""The extension's projections by matrices in groups: values, independence of rows, refusals."""

from __future__ import annotations

import pytest
import torch

from lfm2_fast.ops import native_library
from lfm2_fast.ops import reference as ref
from lfm2_fast.weights.formats import FORMATS, INT4, Q4_K, Groups, Projection

EPS = 1e-5
NAN = float("nan")
BODIES = torch.ops.lfm2_fast
GROUPED = [format for format in FORMATS.values() if isinstance(format, Groups)]
TOKENS = [1, 5, 70]
# Whole tiles, rows left over, rows that share a tile with the other half's. Errors of fewer rows
# are no measure: plain PyTorch's may be none by chance.
SHAPES = [(40, 512), (45, 1024), (70, 256)]

_lacking = native_library.why_not(torch.device("cpu"))
pytestmark = [
    pytest.mark.skipif(_lacking is not None, reason=str(_lacking)),
    pytest.mark.usefixtures("threads"),
]


def matrix_of(format: Groups, rows: int, size: int, dtype: torch.dtype) -> Projection:
    """Return random numbers, every bit of them, with scales of any sign and size."""
    torch.manual_seed(rows)
    made = Projection(rows, size, bias=True, format=format)
    low, high = (0, 256) if format.bits == 4 else (-128, 128)
    numbers = torch.randint(low, high, made.weight.shape).to(made.weight.dtype)
    words = torch.empty(made.weight_scale.shape, dtype=made.weight_scale.dtype)
    if words.is_floating_point():
        words.copy_(torch.randn(words.shape) / 64)
    else:
        words.random_(0, 256)
        factors = words.unflatten(1, (-1, words.shape[1] // (size // 256)))[..., : 2 * format.words]
        halves = torch.randn(*factors.shape[:-1], format.words) / 4096
        factors.copy_(halves.half().view(torch.uint8))
    made.weight.data, made.weight_scale = numbers, words
    format.interleave(made.parts)
    made.bias.data = torch.randn(rows).to(dtype)
    return made.requires_grad_(False)


def tokens_of(count: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return tokens of very different size, with a group of zeros."""
    torch.manual_seed(count)
    x = torch.randn(count, size) * torch.logspace(-2, 2, count)[:, None]
    x[:, 32:64] = 0
    return x.to(dtype)


def linear(x: torch.Tensor, matrix: Projection, bias: bool = True) -> torch.Tensor:
    """Return what the reference says, in the dtype of ``x``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    added = matrix.bias.to(x.dtype) if bias else None
    return ref.grouped_linear_ref(x, matrix.dequantized(wide), added)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", GROUPED, ids=lambda format: format.name)
def test_linear_add(format, tokens, shape, dtype, framed, intact, within_budget) -> None:
    """The result replaces the residual or is separate. Tensors are sliced."""
    rows, size = shape
    matrix, x = matrix_of(format, rows, size, dtype), tokens_of(tokens, size, dtype)
    residual = torch.randn(tokens, rows).to(dtype)
    exact = linear(x.double(), matrix) + residual.double()
    plain = linear(x, matrix) + residual
    for out in (framed(torch.full_like(residual, NAN)), framed(residual)):
        base = residual if out.isnan().any() else out
        BODIES.linear_add_native(framed(x), *matrix.parts, matrix.bias, base, out)
        assert intact(out)
        within_budget(out, exact, plain, by_row=True)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", GROUPED, ids=lambda format: format.name)
def test_norms_come_before(format, tokens, shape, dtype, framed, within_budget) -> None:
    """The norm is the extension's own, which others prove."""
    rows, size = shape
    matrix, x = matrix_of(format, 2 * rows, size, dtype), tokens_of(tokens, size, dtype)
    norm = torch.rand(size).to(dtype)
    normed = torch.empty_like(x)
    BODIES.rms_norm_native(x, norm, EPS, normed)
    out = torch.full((tokens, 2 * rows), NAN, dtype=dtype)
    BODIES.norm_linear_native(framed(x), norm, EPS, *matrix.parts, matrix.bias, out)
    within_budget(out, linear(normed.double(), matrix), linear(normed, matrix), by_row=True)

    gates, exact_gates = (linear(y, matrix, bias=False) for y in (normed, normed.double()))
    out = torch.full((tokens, rows), NAN, dtype=dtype)
    BODIES.norm_swiglu_native(framed(x), norm, EPS, *matrix.parts, out)
    within_budget(out, ref.swiglu_ref(exact_gates), ref.swiglu_ref(gates))


@pytest.mark.parametrize("format", GROUPED, ids=lambda format: format.name)
def test_a_token_does_not_depend_on_the_other_tokens(format, dtype, same_bits) -> None:
    matrix, x = matrix_of(format, 203, 512, dtype), tokens_of(130, 512, dtype)
    base = torch.zeros(130, 203, dtype=dtype)

    def run(rows: slice) -> torch.Tensor:
        out = torch.full_like(base[rows], NAN)
        BODIES.linear_add_native(x[rows], *matrix.parts, matrix.bias, base[rows], out)
        return out

    together = run(slice(None))
    for rows in (slice(0, 1), slice(3, 7), slice(60, 129), slice(129, 130)):
        assert same_bits(run(rows), together[rows])


@pytest.mark.parametrize("tokens", [17, 64, 65, 130])
@pytest.mark.parametrize("format", GROUPED, ids=lambda format: format.name)
def test_many_tokens_equal_single_ones(format, tokens, dtype, same_bits) -> None:
    """Threads share the rounding of many tokens, so each begins at another token."""
    matrix, x = matrix_of(format, 45, 2048, dtype), tokens_of(tokens, 2048, dtype)
    x[tokens // 2, 50], norm = NAN, torch.rand(2048).to(dtype)
    base = torch.randn(tokens, 45).to(dtype)
    runs = {
        "linear_add": lambda rows, out: BODIES.linear_add_native(
            x[rows], *matrix.parts, matrix.bias, base[rows], out[rows]
        ),
        "norm_linear": lambda rows, out: BODIES.norm_linear_native(
            x[rows], norm, EPS, *matrix.parts, matrix.bias, out[rows]
        ),
    }
    for run in runs.values():
        together, single = torch.empty_like(base), torch.empty_like(base)
        run(slice(None), together)
        for token in range(tokens):
            run(slice(token, token + 1), single)
        assert together.isnan().all(1).nonzero().flatten().tolist() == [tokens // 2]
        assert same_bits(together, single)


@pytest.mark.parametrize("format", GROUPED, ids=lambda format: format.name)
def test_a_row_does_not_depend_on_those_beside_it(format, dtype, same_bits) -> None:
    """Whole tiles and the last one, which may have fewer rows, give the same."""
    matrix, x = matrix_of(format, 24, 512, dtype), tokens_of(3, 512, dtype)
    rows = format.stored(matrix.parts)

    def run(first: int, last: int) -> torch.Tensor:
        parts = [part[first:last].clone() for part in rows]
        format.interleave(parts)
        out = torch.full((3, last - first), NAN, dtype=dtype)
        BODIES.linear_add_native(x, *parts, None, torch.zeros_like(out), out)
        return out

    whole = run(0, 24)
    for first, last in ((0, 1), (3, 10), (5, 24), (16, 24)):
        assert same_bits(run(first, last), whole[:, first:last])


@pytest.mark.parametrize("format", GROUPED, ids=lambda format: format.name)
@pytest.mark.parametrize("rows", [16, 21])
def test_embedding(format, rows, dtype, framed, intact) -> None:
    matrix = matrix_of(format, rows, 512, dtype)
    tokens = torch.tensor([rows - 1, 0, 9, 9])
    out = framed(torch.full((4, 512), NAN, dtype=dtype))
    BODIES.embed_native(tokens, *matrix.parts, out)
    assert intact(out) and torch.equal(out, matrix.rows(tokens, dtype))


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_nan_in_a_token_changes_no_other_token(bad: float, dtype) -> None:
    matrix, x = matrix_of(INT4, 20, 96, dtype), tokens_of(3, 96, dtype)
    x[1, 50] = bad
    out = torch.zeros(3, 20, dtype=dtype)
    BODIES.linear_add_native(x, *matrix.parts, None, out.clone(), out)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_tensors_that_do_not_fit_are_refused(dtype) -> None:
    x, out = tokens_of(1, 512, dtype), torch.zeros(1, 16, dtype=dtype)
    matrix = matrix_of(INT4, 16, 512, dtype)
    numbers, scales = matrix.parts

    def multiply(x: torch.Tensor, numbers: torch.Tensor, scales: torch.Tensor) -> None:
        BODIES.linear_add_native(x, numbers, scales, None, out, out)

    with pytest.raises(RuntimeError, match="rows of 500 numbers are not whole groups of 32"):
        multiply(x[:, :500], numbers, scales)
    with pytest.raises(RuntimeError, match="weight has size 256 in dimension 1, not 240"):
        multiply(x[:, :480], numbers, scales)
    with pytest.raises(RuntimeError, match="width 15 fit no format of groups"):
        multiply(x, numbers, scales[:, :15].contiguous())
    with pytest.raises(RuntimeError, match="scales must be contiguous"):
        multiply(x, numbers, torch.cat([scales, scales], 1)[:, :16])
    with pytest.raises(RuntimeError, match="weight must be contiguous"):
        multiply(x, torch.cat([numbers, numbers], 1)[:, :256], scales)
    k = matrix_of(Q4_K, 16, 512, dtype)
    with pytest.raises(RuntimeError, match="fit no format of groups"):
        multiply(x[:, :288], k.weight[:, :144].contiguous(), k.weight_scale)
