"""RMSNorm's kernels, alone and after a residual addition, against the reference."""

from __future__ import annotations

import pytest
import torch

from lfm2_fast.kernels.rms_norm import add_rms_norm_triton, rms_norm_triton
from lfm2_fast.ops import reference as ref

pytestmark = pytest.mark.usefixtures("grid_order")

EPS = 1e-5
SHAPES = [(1, 1), (3, 7), (5, 128), (2, 1000), (2, 2048), (1, 2049)]
ids = dict(ids=lambda shape: "x".join(map(str, shape)))


def rows(tokens: int, hidden: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows of very different size, the last one zero where there are several."""
    scale = torch.logspace(-3, 3, tokens)[:, None]
    scale[1:][-1:] = 0
    return (torch.randn(tokens, hidden) * scale).to(dtype).to(device)


@pytest.mark.parametrize("shape", SHAPES, **ids)
@pytest.mark.parametrize("sliced", [False, True], ids=["dense", "sliced"])
def test_rms_norm(
    shape, sliced, kernel_device, kernel_dtype, framed, intact, traced, within_budget
) -> None:
    torch.manual_seed(0)
    x = rows(*shape, kernel_dtype, kernel_device)
    weight = torch.randn(shape[1], device=kernel_device).to(kernel_dtype)
    exact = ref.rms_norm_ref(x.double(), weight.double(), EPS)
    plain = ref.rms_norm_ref(x, weight, EPS)
    x = framed(x) if sliced else x
    out = framed(torch.full_like(exact, float("nan"), dtype=kernel_dtype))
    with traced([x, weight], [out]):
        rms_norm_triton(x, weight, EPS, out)
    assert intact(out)
    within_budget(out, exact, plain, by_row=True)


@pytest.mark.parametrize("shape", SHAPES, **ids)
@pytest.mark.parametrize("place", ["apart", "x", "delta"])
def test_add_rms_norm(
    shape, place, kernel_device, kernel_dtype, framed, intact, traced, same_bits, within_budget
) -> None:
    """The sum may be written over either term; what is normed is the sum as it was rounded."""
    torch.manual_seed(0)
    x, delta = (rows(*shape, kernel_dtype, kernel_device) for _ in range(2))
    weight = torch.randn(shape[1], device=kernel_device).to(kernel_dtype)
    sums = x + delta
    exact = ref.rms_norm_ref(sums.double(), weight.double(), EPS)
    plain = ref.rms_norm_ref(sums, weight, EPS)
    x, delta, apart, out = (framed(t) for t in (x, delta, *[torch.full_like(x, float("nan"))] * 2))
    total = {"apart": apart, "x": x, "delta": delta}[place]
    with traced([x, delta, weight], [total, out]):
        add_rms_norm_triton(x, delta, weight, EPS, total, out)
    assert same_bits(total, sums) and intact(total) and intact(out)
    within_budget(out, exact, plain, by_row=True)
    alone = torch.empty_like(out)
    rms_norm_triton(total, weight, EPS, alone)
    assert same_bits(out, alone)


def test_extremes(kernel_device, within_budget) -> None:
    """Squares that overflow float16 do not, and a row of zeros stays zero."""
    x = torch.tensor([[60000.0], [1e-7], [0.0]], device=kernel_device).half().expand(3, 100)
    x, weight = x.contiguous(), torch.ones(100, device=kernel_device).half()
    out = torch.full_like(x, float("nan"))
    rms_norm_triton(x, weight, EPS, out)
    exact = ref.rms_norm_ref(x.double(), weight.double(), EPS)
    within_budget(out, exact, ref.rms_norm_ref(x, weight, EPS), by_row=True)
    assert not out[2].any()


def test_no_tokens(kernel_device, kernel_dtype) -> None:
    x = torch.empty(0, 64, device=kernel_device, dtype=kernel_dtype)
    rms_norm_triton(x, x.new_ones(64), EPS, x)
    add_rms_norm_triton(x, x, x.new_ones(64), EPS, x, x)


def test_wrong_layouts_are_refused(kernel_device) -> None:
    x, weight = torch.zeros(4, 64, device=kernel_device), torch.zeros(64, device=kernel_device)
    good = {"x": x, "weight": weight, "eps": EPS, "out": torch.empty_like(x)}
    rms_norm_triton(**good)
    for wrong in (
        {"x": torch.zeros(64, 4, device=kernel_device).t()},
        {"weight": torch.zeros(128, device=kernel_device)[::2]},
        {"x": x.half()},
        {"out": x[:3]},
    ):
        with pytest.raises(AssertionError):
            rms_norm_triton(
                **{"x": x, "weight": weight, "out": torch.empty_like(x), **wrong}, eps=1
            )
