"""llama.cpp's rounding of activations, keys and values, within a block of our eager model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

# Types that llama.cpp rounds activations for in groups of 256; of 32 for the others.
K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def half(x: torch.Tensor) -> torch.Tensor:
    """Return float32 numbers rounded to float16."""
    return x.to(torch.float16).float()


def rounded(x: torch.Tensor, type: str) -> torch.Tensor:
    """Return activations as llama.cpp rounds them before a product with a matrix of ``type``."""
    if type == "F16":
        return half(x)
    if type == "BF16":
        return x.to(torch.bfloat16).float()
    if type == "F32":
        return x
    groups = x.unflatten(-1, (-1, 256 if type in K_TYPES else 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    whole = (groups / scale.where(scale > 0, 1)).round()
    return (whole * (scale if type in K_TYPES else half(scale))).flatten(-2)


def attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """``F.scaled_dot_product_attention`` with queries, keys, values and their sums in float16.

    llama.cpp adds one value at a time and rounds each sum. Where it runs 64 tokens or more at once,
    it has queries and sums in float32 instead. It runs a prompt's last 4 tokens apart from those.
    """
    scores = half(q) @ half(keys).mT * q.shape[-1] ** -0.5
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = torch.zeros_like(q)
    for weight, value in zip(weights.split(1, -1), half(values).split(1, -2), strict=True):
        total = half(total + weight * value)
    return total / weights.sum(-1, keepdim=True)


@contextmanager
def rounding(types: dict[int, str]) -> Iterator[None]:
    """Round within the block as llama.cpp does, for matrices of these ``types`` by address."""
    plain = F.linear, F.scaled_dot_product_attention

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        return plain[0](rounded(x, types.get(weight.data_ptr(), "F32")), weight, bias)

    F.linear, F.scaled_dot_product_attention = linear, attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.linear, F.scaled_dot_product_attention = plain
