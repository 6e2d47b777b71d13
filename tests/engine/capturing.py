"""Operations that are driven as those of a GPU are, on the CPU."""

from __future__ import annotations

from dataclasses import replace

import torch

from lfm2_fast.ops.base import Ops
from lfm2_fast.ops.sampling import SamplingState


class Capturing(Ops):
    """The eager operations, run like captured ones: a step ahead, in buckets."""

    captures = True

    def sample(self, logits: torch.Tensor, state: SamplingState) -> torch.Tensor:
        # The parameters are the host's and no part of what is captured: the tensors alone follow.
        kept = zip(state.params, state.top_k.tolist(), strict=True)
        state.params = [replace(params, top_k=top_k) for params, top_k in kept]
        return super().sample(logits, state)
