"""A few tokens times a weight: what the kernels that are made of such products share.

A program keeps a tile of the weight ``[N, K]`` in registers, loaded 16 bytes a thread, and takes
one token after another through it: ``sum(tile * x, axis=1)`` in float32. The loop over tokens is
the same code for one as for sixteen, so a row's bits do not depend on the batch. While a tile is
in use, the next is under way.

A weight of the tokens' dtype has no ``scale``. One of int8 has ``scale [N]`` float32, by which the
sum of a row is multiplied in float32, so its numbers are used as they are.

The first tile, like the norms and the taps, is loaded above ``pdl_wait`` (pdl.py), so it is
under way while the previous kernel still runs: without that, launching early would gain nothing.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.pdl import pdl_options
from lfm2_fast.kernels.tiling import Tiling

MOST_TOKENS = 16


@triton.jit
def rows_of(weight_ptr, rows, count, offs_k, K: tl.constexpr):
    """The ``rows [N]`` of a weight ``[count, K]`` without gaps, zero outside of it."""
    mask = (rows < count)[:, None] & (offs_k < K)[None, :]
    at = rows.to(tl.int64)[:, None] * K + offs_k[None, :]
    return tl.load(weight_ptr + at, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def inverse_rms(x_ptr, tokens, stride_x_t, eps, offs_k, K: tl.constexpr, MOST: tl.constexpr):
    """``1 / sqrt(mean(x^2) + eps)`` of each token, float32 ``[MOST]``."""
    offs_t = tl.arange(0, MOST)
    scales = tl.zeros([MOST], tl.float32)
    for token in range(tokens):
        x = tl.load(x_ptr + token * stride_x_t + offs_k, mask=offs_k < K, other=0).to(tl.float32)
        scales = tl.where(offs_t == token, tl.rsqrt(tl.sum(x * x, axis=0) / K + eps), scales)
    return scales


@triton.jit
def normed(x_ptr, norm, scales, token, stride_x_t, offs_k, K: tl.constexpr, MOST: tl.constexpr):
    """A token's RMSNorm in float32, rounded where the reference rounds: scaled, then weighted."""
    x = tl.load(x_ptr + token * stride_x_t + offs_k, mask=offs_k < K, other=0)
    scale = tl.sum(tl.where(tl.arange(0, MOST) == token, scales, 0), axis=0)
    unit = (x.to(tl.float32) * scale).to(x.dtype)
    return (unit.to(tl.float32) * norm.to(tl.float32)).to(x.dtype).to(tl.float32)


@triton.jit
def dots(tile, x, bias_ptr, scale_ptr, rows, count, DTYPE: tl.constexpr):
    """``tile [N, K] @ x [K] * scale + bias`` in float32, rounded once as a number of DTYPE is."""
    out = tl.sum(tile * x[None, :], axis=1)
    if scale_ptr is not None:
        out *= tl.load(scale_ptr + rows, mask=rows < count, other=0)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + rows, mask=rows < count, other=0).to(tl.float32)
    return out.to(DTYPE).to(tl.float32)


def options(x: torch.Tensor, tiling: Tiling, block_k: int, pdl: bool) -> dict[str, Any]:
    """Launch options shared by the few-token kernels, for tokens ``x [T, K]``."""
    return {
        "K": x.shape[1],
        "MOST": MOST_TOKENS,
        "BLOCK_N": tiling.block_n,
        "BLOCK_K": block_k,
        "num_warps": tiling.warps,
        **pdl_options(pdl),
    }


def check_tokens(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    tokens: int,
    count: int,
) -> None:
    """Assert the layout of what is read: few rows, which may stand apart; all else is dense."""
    assert x.shape[0] == tokens <= MOST_TOKENS and x.stride(1) == 1
    assert weight.shape == (count, x.shape[1]) and weight.is_contiguous()
    assert norm is None or (norm.shape == x.shape[1:] and norm.is_contiguous())
    assert bias is None or (bias.shape == (count,) and bias.is_contiguous())
    assert x.dtype != torch.float64
    for given in (norm, bias):
        assert given is None or given.dtype == x.dtype
    assert weight.dtype == (x.dtype if scale is None else torch.int8)
    if scale is not None:
        assert scale.shape == (count,) and scale.is_contiguous() and scale.dtype == torch.float32
