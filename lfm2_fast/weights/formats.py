"""Matrix: a projection's or an embedding's weight, dense or in 8-bit integers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

QUANTIZATIONS = ("int8",)


class Matrix(nn.Module):
    """``weight [N, K]`` and, of a projection, maybe ``bias [N]``.

    With ``quantization="int8"`` the weight is int8 and ``weight_scale [N]`` float32 is what each
    row must be multiplied by; else ``weight_scale`` is None.
    """

    bias: nn.Parameter | None
    weight_scale: torch.Tensor | None

    def __init__(
        self, rows: int, columns: int, *, bias: bool = False, quantization: str | None = None
    ) -> None:
        super().__init__()
        dtype = None if quantization is None else torch.int8
        weight = torch.empty(rows, columns, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        scale = None if quantization is None else torch.empty(rows, dtype=torch.float32)
        self.register_buffer("weight_scale", scale)
        self.register_parameter("bias", nn.Parameter(torch.empty(rows)) if bias else None)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Matrix:
        """As any module's, but the scales stay float32 whatever the model's dtype becomes."""
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if scale is not None:
            self.weight_scale = scale.to(self.weight.device)
        return self


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight [N, K]`` as int8 and a float32 scale ``[N]``: symmetric, a row's largest is 127."""
    wide = weight.to(torch.float32, copy=True)
    largest = wide.abs().amax(-1)
    # A scale below the smallest normal number would be too coarse to divide by.
    scale = (largest / 127).clamp_min_(torch.finfo(torch.float32).tiny)
    wide /= scale[:, None]
    return wide.round_().to(torch.int8), scale.masked_fill_(largest == 0, 0)
