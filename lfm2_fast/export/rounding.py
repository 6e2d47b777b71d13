"""Rounding of weights to few bits as vendors' quantizers do it, for the error to expect of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.weights.formats import Projection


@dataclass(frozen=True)
class Rounding:
    """Numbers of the matrices: ``bits`` a weight, one scale for ``group`` columns, or for a row.

    ``tables`` are the bits of embedding and head, with a scale for each of their groups too.
    16 bits are float16.
    """

    bits: int
    group: int | None = None
    tables: int | None = None


def round_weights(network: Lfm2, rounding: Rounding) -> None:
    """Round the matrices of a dense network, in place, each weight to the nearest number.

    Norms, taps of convolutions and biases stay.
    """
    tables = {id(network.embed_tokens), id(network.lm_head)}
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, Projection):
                bits = rounding.tables or rounding.bits if id(module) in tables else rounding.bits
                module.weight.copy_(rounded(module.weight, bits, rounding.group))


def rounded(weight: torch.Tensor, bits: int, group: int | None) -> torch.Tensor:
    """Return ``weight [N, K]`` rounded to ``bits``, with a scale for ``group`` columns or a row.

    The number of largest magnitude in a group becomes the smallest integer, so that one level more
    is used than with equal bounds. The last group of a row may be shorter.
    """
    if bits == 16:
        return weight.to(torch.float16).to(weight.dtype)
    parts = []
    for part in weight.split(group or weight.shape[1], dim=1):
        largest = part.gather(1, part.abs().argmax(1, keepdim=True))
        scale = largest / -(2 ** (bits - 1))
        levels = (part / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        parts.append(torch.where(scale == 0, 0, levels * scale))
    return torch.cat(parts, 1)
