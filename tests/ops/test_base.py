"""Common behaviour of all backends: the token of the best logit, or none."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lfm2_fast.ops.base import Ops
from lfm2_fast.ops.sampling import NO_TOKEN
from lfm2_fast.ops.select import BackendError, choose
from lfm2_fast.weights.formats import Projection


@pytest.fixture(params=["eager", "native", pytest.param("triton", marks=pytest.mark.interpreter)])
def ops(request: pytest.FixtureRequest, kernel_device: torch.device) -> Callable[..., Ops]:
    """The backend's operations, and where they run."""
    device = kernel_device if request.param == "triton" else torch.device("cpu")
    try:
        return choose(request.param, device, torch.float32), device
    except BackendError as error:
        pytest.skip(str(error))


# A row's first number decides: the head's first column is so large that its product overflows.
ROWS = {"number": 0.0, "masked": -1.0, "infinite": 1.0, "nan": math.nan}


# A few rows, and enough rows that each backend uses its other code.
@pytest.mark.parametrize("count", [1, 3, 15, 37])
@pytest.mark.parametrize("large", [range(11), range(0, 11, 2)], ids=["all", "some"])
def test_head_argmax(ops: tuple[Ops, torch.device], count: int, large: range) -> None:
    """Rows of all kinds side by side, where ``large`` tokens' logits overflow, or none does."""
    torch.manual_seed(count)
    body, device = ops
    head, norm = Projection(11, 24), nn.RMSNorm(24, eps=1e-5)
    head.weight.data.normal_()
    head.weight.data[:, 0] = 0
    head.weight.data[list(large), 0] = torch.finfo(torch.float32).max
    x = torch.randn(count, 24)
    kinds = [list(ROWS)[(row + count) % 4] for row in range(count)]
    x[:, 0] = torch.tensor([100 * ROWS[kind] for kind in kinds])
    logits = nn.functional.linear(norm(x), head.weight).where(~x[:, :1].isnan(), math.nan)
    expected = []
    for kind, row in zip(kinds, logits, strict=True):
        told = kind == "number" or (kind == "masked" and len(large) < 11)
        expected.append(int(row.argmax()) if told else NO_TOKEN)
        assert told == bool(row.max().isfinite()), "the case is none"
    found = body.head_argmax(x.to(device), norm.to(device), head.to(device))
    assert found.dtype == torch.int64 and found.tolist() == expected
