"""SwiGLU's kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from lfm2_fast.kernels.swiglu import swiglu_triton
from lfm2_fast.ops import reference as ref

pytestmark = pytest.mark.usefixtures("grid_order")


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("size", [1, 150, 1024, 1025, 2500])
@pytest.mark.parametrize("sliced", [False, True], ids=["dense", "sliced"])
def test_swiglu(
    tokens, size, sliced, kernel_device, kernel_dtype, framed, intact, traced, within_budget
) -> None:
    torch.manual_seed(0)
    gate_up = (4 * torch.randn(tokens, 2 * size)).to(kernel_dtype).to(kernel_device)
    exact, plain = ref.swiglu_ref(gate_up.double()), ref.swiglu_ref(gate_up)
    gate_up = framed(gate_up) if sliced else gate_up
    out = framed(torch.full_like(plain, float("nan")))
    with traced([gate_up], [out]):
        swiglu_triton(gate_up, out)
    assert intact(out)
    within_budget(out, exact, plain)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("gate", [-1e4, -100.0, -88.7, -17.0, -1e-3, 0.0, 1e-3, 17.0, 1e4])
def test_extremes(gate: float, kernel_device, kernel_dtype, within_budget) -> None:
    """Overflow and underflow of exp do not show."""
    gate_up = torch.tensor([[gate, -gate, 0.75, -1.5]]).to(kernel_dtype).to(kernel_device)
    out = torch.full((1, 2), float("nan"), dtype=kernel_dtype, device=kernel_device)
    swiglu_triton(gate_up, out)
    within_budget(out, ref.swiglu_ref(gate_up.double()), ref.swiglu_ref(gate_up))


def test_no_tokens(kernel_device, kernel_dtype) -> None:
    gate_up = torch.empty(0, 64, device=kernel_device, dtype=kernel_dtype)
    swiglu_triton(gate_up, gate_up[:, :32])


def test_wrong_layouts_are_refused(kernel_device) -> None:
    out = torch.empty(4, 32, device=kernel_device)
    for wrong in (
        torch.zeros(64, 4, device=kernel_device).t(),
        torch.zeros(4, 65, device=kernel_device),
        torch.zeros(4, 64, device=kernel_device).half(),
    ):
        with pytest.raises(AssertionError):
            swiglu_triton(wrong, out)
