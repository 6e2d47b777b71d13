"""Attention to keys that are read block by block: the shared part of the attention kernels.

A tile of M queries keeps three results of the keys so far. ``best [M]`` is the largest score.
``total [M]`` is the sum of the weights ``2 ** (score - best)``. ``sums [M, D]`` is the sum of
values times weights. A higher best scales the other two down. (Milakov and Gimelshein, 2018; Dao,
2023)

A score is ``q . k * scale``, and ``scale`` is ``log2(e) / sqrt(D)``: GPUs compute powers of two,
and the factor to powers of e costs nothing here. All numbers are float32, except the weights. They
are rounded to the dtype of the values, because the matrix units need equal dtypes.
"""

import math

import torch
import triton
import triton.language as tl


@triton.jit
def attend_to_keys(
    q,
    best,
    total,
    sums,
    begin,
    end,
    seen,
    k_ptr,
    v_ptr,
    table_ptr,
    scale,
    page_size,
    stride_pages_p,
    stride_pages_r,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return ``best, total, sums`` after the keys ``begin`` to ``end`` of one KV head of a slot.

    Row m sees the keys before ``seen[m]``. Without MASKED every row sees all of them, and they fill
    their blocks. Values are masked at the load, not only by their weights: NaN times 0 is NaN.
    WHOLE means that one page has the whole sequence.
    """
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    if WHOLE:
        page = tl.load(table_ptr).to(tl.int64) * stride_pages_p
        k_ptr += page
        v_ptr += page
    for first in range(begin, end, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end
        mask = offs_d < HEAD_DIM
        if MASKED:
            mask = mask & mask_n[:, None]
        if WHOLE:
            rows = offs_n * stride_pages_r
        elif MASKED:
            page = tl.load(table_ptr + offs_n // page_size, mask=mask_n, other=0)
            rows = page.to(tl.int64) * stride_pages_p + offs_n % page_size * stride_pages_r
        else:
            page = tl.load(table_ptr + offs_n // page_size)
            rows = page.to(tl.int64) * stride_pages_p + offs_n % page_size * stride_pages_r
        k = tl.load(k_ptr + rows[:, None] + offs_d, mask=mask, other=0)
        # The scale is applied in the exponent, as one multiply-add with the difference.
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            scores = tl.where(offs_n[None, :] < seen[:, None], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1) * scale)
        shrink = tl.exp2(best - higher)
        weights = tl.exp2(scores * scale - higher[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        v = tl.load(v_ptr + rows[:, None] + offs_d, mask=mask, other=0)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
        best = higher
    return best, total, sums


def score_scale(head_dim: int) -> float:
    """Factor of the dot products of q and k."""
    return math.log2(math.e) / math.sqrt(head_dim)


def keys_of_block(block_d: int, element_size: int) -> int:
    """Keys of eight kilobytes. With the same for values, two loading blocks fit on any GPU."""
    return min(max(8192 // (block_d * element_size), 16), 64)


def stages(table: torch.Tensor) -> int:
    """Number of stages of the loop over keys that keep two blocks loading.

    Triton divides the stages between these loads and the loads of the table before them.
    """
    return 3 if table.shape[1] == 1 else 5


def check_pages(k_pages: torch.Tensor, v_pages: torch.Tensor, table: torch.Tensor) -> None:
    """Assert the layout of ``attend_to_keys``. Its offsets in a page have 32 bits."""
    assert k_pages.shape == v_pages.shape and k_pages.stride() == v_pages.stride()
    assert k_pages.dtype == v_pages.dtype != torch.float64
    assert k_pages.stride(3) == table.stride(1) == 1 and table.dtype == torch.int32
    assert k_pages.shape[2] * k_pages.stride(2) < 2**31
