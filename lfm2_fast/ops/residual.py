"""Residual stream with a pending addition, for implementations that add and norm at once."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lfm2_fast.ops.base import Ops
from lfm2_fast.weights.formats import Projection


@dataclass
class PendingResidual:
    """Sum ``x + delta``, computed by the first norm that reads it."""

    x: torch.Tensor
    delta: torch.Tensor | None

    def __getitem__(self, rows: torch.Tensor) -> PendingResidual:
        return PendingResidual(self.x[rows], None if self.delta is None else self.delta[rows])

    def __len__(self) -> int:
        return len(self.x)


def settled(x: torch.Tensor | PendingResidual) -> torch.Tensor:
    """Return a tensor unchanged, or the sum of a PendingResidual, which is computed once."""
    if isinstance(x, torch.Tensor):
        return x
    if x.delta is not None:
        x.x, x.delta = x.x + x.delta, None
    return x.x


class PendingResidualOps(Ops):
    """Operations that leave an addition at their end to the norm of the next operation.

    ``x`` and ``residual`` may be a tensor, or a ``PendingResidual`` of ``linear_add``.
    """

    leaves_pending = True

    @property
    def settling(self) -> PendingResidualOps:
        made = copy(self)
        made.leaves_pending = False
        return made

    def norm_linear(self, x: Any, norm: nn.RMSNorm, linear: Projection) -> torch.Tensor:
        return self.linear(self._norm(x, norm), linear)

    def linear_add(self, y: torch.Tensor, linear: Projection, residual: Any) -> Any:
        made = PendingResidual(settled(residual), self.linear(y, linear))
        return made if self.leaves_pending else settled(made)

    def add_rms_norm(
        self, x: torch.Tensor, delta: torch.Tensor, norm: nn.RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``x + delta``, perhaps in the memory of ``delta``, and its RMSNorm."""
        raise NotImplementedError

    def _norm(self, x: Any, norm: nn.RMSNorm) -> torch.Tensor:
        """RMSNorm of a tensor or a PendingResidual, which it settles."""
        if isinstance(x, torch.Tensor) or x.delta is None:
            return self.rms_norm(settled(x), norm)
        x.x, normed = self.add_rms_norm(x.x, x.delta, norm)
        x.delta = None
        return normed
