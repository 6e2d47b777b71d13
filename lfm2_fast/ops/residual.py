"""The residual stream with its last addition pending, for bodies that add and norm at once."""

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
    """The sum ``x + delta``, to be made by the norm that reads it first."""

    x: torch.Tensor
    delta: torch.Tensor | None

    def __getitem__(self, rows: torch.Tensor) -> PendingResidual:
        return PendingResidual(self.x[rows], None if self.delta is None else self.delta[rows])

    def __len__(self) -> int:
        return len(self.x)


def settled(x: torch.Tensor | PendingResidual) -> torch.Tensor:
    """A tensor as it is; of a PendingResidual the sum, which is made once."""
    if isinstance(x, torch.Tensor):
        return x
    if x.delta is not None:
        x.x, x.delta = x.x + x.delta, None
    return x.x


class PendingResidualOps(Ops):
    """Operations that leave the addition at the end of one to the norm that begins the next.

    ``x`` and ``residual`` may be a tensor or a ``PendingResidual``, which ``linear_add`` gives.
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
        """``x + delta``, which may take the place of ``delta``, and its RMSNorm."""
        raise NotImplementedError

    def _norm(self, x: Any, norm: nn.RMSNorm) -> torch.Tensor:
        """RMSNorm of a tensor or a PendingResidual, which is settled by it."""
        if isinstance(x, torch.Tensor) or x.delta is None:
            return self.rms_norm(settled(x), norm)
        x.x, normed = self.add_rms_norm(x.x, x.delta, norm)
        x.delta = None
        return normed
