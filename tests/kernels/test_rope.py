"""The kernel that makes cosines and sines, against the reference."""

from __future__ import annotations

import pytest
import torch

from lfm2_fast.kernels.rope import rope_triton
from lfm2_fast.ops import reference as ref

pytestmark = pytest.mark.usefixtures("grid_order")


@pytest.mark.parametrize("half", [1, 12, 32])
@pytest.mark.parametrize("positions", [[0], [1, 7, 100, 127_999], list(range(13))], ids=len)
def test_rope(half, positions, kernel_device, framed, traced, within_budget) -> None:
    """Results are as exact as float32 angles allow, up to the longest context."""
    at = torch.tensor(positions, device=kernel_device)
    inv_freq = 1e6 ** (-torch.arange(half, device=kernel_device) / half)
    out = torch.full((2, len(positions), half), float("nan"), device=kernel_device)
    with traced([at, inv_freq], [out]):
        rope_triton(at, inv_freq, *out)
    exact = ref.rope_ref(at, inv_freq.double(), torch.float64)
    plain = ref.rope_ref(at, inv_freq, torch.float32)
    for ours, a, b in zip(out, exact, plain, strict=True):
        within_budget(ours, a[:, 0, :half], b[:, 0, :half])


@pytest.mark.parametrize("half", [1, 12, 32])
def test_frequencies_of_each_token_and_a_scale(half, kernel_device, traced, within_budget) -> None:
    at = torch.tensor([0, 3, 100, 127_999, 7], device=kernel_device)
    inv_freq = 1e6 ** (-torch.arange(half, device=kernel_device) / half)
    inv_freq = inv_freq / torch.arange(1, 6, device=kernel_device)[:, None]
    out = torch.full((2, len(at), half), float("nan"), device=kernel_device)
    with traced([at, inv_freq], [out]):
        rope_triton(at, inv_freq, *out, scale=1.3)
    exact = ref.rope_ref(at, inv_freq.double(), torch.float64, 1.3)
    plain = ref.rope_ref(at, inv_freq, torch.float32, 1.3)
    for ours, a, b in zip(out, exact, plain, strict=True):
        within_budget(ours, a[:, 0, :half], b[:, 0, :half])


def test_no_tokens(kernel_device) -> None:
    out = torch.empty(2, 0, 32, device=kernel_device)
    rope_triton(
        torch.empty(0, dtype=torch.int64, device=kernel_device),
        torch.ones(32, device=kernel_device),
        *out,
    )
