"""Causal attention of any number of tokens per sequence, over their pages.

T tokens of S sequences packed end to end, D head size, G query heads per KV head. ``q [T, heads,
D]``. ``out [T, heads D]``. ``cu_seqlens [S + 1]`` int32, ``slots [S]`` int64. ``lengths [S]`` int32
is the context after this step: the pages hold k and v up to it, these tokens included. Position p
of a slot is row ``p % page_size`` of page ``table[slot, p // page_size]`` (int32) in ``k_pages,
v_pages [pages, kv_heads, page_size, D]``.

A tile is the G query heads of some tokens: keys and values are read once for all of them. Least
bytes: 2 T heads D elements of q and out, 2 kv_heads D a token of context. FLOPs: 4 heads D for
every pair of a query and a key that it sees.
"""

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.online_softmax import (
    attend_to_keys,
    check_pages,
    keys_of_block,
    score_scale,
    stages,
)
from lfm2_fast.kernels.varlen import sequence_of_tile, tile_of_sequence, tiles


@triton.jit(do_not_specialize=["sequences", "page_size", "stride_table_s"])
def _flash_prefill_kernel(
    q_ptr,
    k_pages_ptr,
    v_pages_ptr,
    table_ptr,
    cu_seqlens_ptr,
    slots_ptr,
    lengths_ptr,
    out_ptr,
    scale,
    sequences,
    page_size,
    stride_q_t,
    stride_table_s,
    stride_pages_p,
    stride_pages_h,
    stride_pages_r,
    stride_out_t,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
):
    # The last tiles of a sequence see the most keys. They start first, and short tiles fill the
    # end.
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    sequence = sequence_of_tile(cu_seqlens_ptr, tile, sequences, BLOCK_T)
    tile -= tile_of_sequence(cu_seqlens_ptr, sequence, BLOCK_T)
    first = tl.load(cu_seqlens_ptr + sequence)
    count = tl.load(cu_seqlens_ptr + sequence + 1) - first
    if tile * BLOCK_T >= count:
        return
    length = tl.load(lengths_ptr + sequence)
    start = length - count

    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    offs_t = tile * BLOCK_T + offs_m // GROUP
    mask_m = (offs_m < BLOCK_T * GROUP) & (offs_t < count)
    mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    token = (first + offs_t).to(tl.int64)[:, None]
    at = ((kv_head * GROUP + offs_m % GROUP) * HEAD_DIM)[:, None] + offs_d[None, :]
    q = tl.load(q_ptr + token * stride_q_t + at, mask=mask, other=0)

    table_ptr += tl.load(slots_ptr + sequence) * stride_table_s
    k_pages_ptr += kv_head.to(tl.int64) * stride_pages_h
    v_pages_ptr += kv_head.to(tl.int64) * stride_pages_h
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Every row sees the keys up to the tile's first token. The last block of them may be partly
    # filled.
    seen = start + offs_t + 1
    common = (start + tile * BLOCK_T + 1) // BLOCK_N * BLOCK_N
    best, total, sums = attend_to_keys(
        q, best, total, sums, 0, common, seen, k_pages_ptr, v_pages_ptr, table_ptr,
        scale, page_size, stride_pages_p, stride_pages_r, HEAD_DIM, BLOCK_N, BLOCK_D, WHOLE,
        MASKED=False,
    )  # fmt: skip
    end = tl.minimum(start + (tile + 1) * BLOCK_T, length)
    _, total, sums = attend_to_keys(
        q, best, total, sums, common, end, seen, k_pages_ptr, v_pages_ptr, table_ptr,
        scale, page_size, stride_pages_p, stride_pages_r, HEAD_DIM, BLOCK_N, BLOCK_D, WHOLE,
        MASKED=True,
    )  # fmt: skip
    out = (sums / total[:, None]).to(q.dtype)
    tl.store(out_ptr + token * stride_out_t + at, out, mask=mask)


def flash_prefill_triton(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    most_tokens: int,
) -> None:
    """Fill ``out``; ``q`` and ``out`` may have gaps between rows.

    ``most_tokens``, the length of the longest sequence, chooses the tile: a much larger one idles.
    """
    tokens, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_pages.shape
    sequences, group = slots.shape[0], heads // kv_heads
    assert heads == kv_heads * group and k_pages.shape[3] == head_dim
    assert out.shape == (tokens, heads * head_dim)
    assert q.stride(2) == out.stride(1) == 1 and q.stride(1) == head_dim
    assert q.dtype == k_pages.dtype == out.dtype
    assert cu_seqlens.shape == (sequences + 1,) and lengths.shape == slots.shape
    for dense in (cu_seqlens, slots, lengths):
        assert dense.is_contiguous()
    check_pages(k_pages, v_pages, table)
    if tokens == 0:
        return
    block_m, warps = _tile(most_tokens * group, q.element_size())
    block_t = block_m // group
    block_d = max(triton.next_power_of_2(head_dim), 16)
    assert block_t > 0
    with torch.cuda.device_of(q):
        _flash_prefill_kernel[(tiles(tokens, sequences, block_t) * kv_heads,)](
            q,
            k_pages,
            v_pages,
            table,
            cu_seqlens,
            slots,
            lengths,
            out,
            score_scale(head_dim),
            sequences,
            page_size,
            q.stride(0),
            table.stride(0),
            k_pages.stride(0),
            k_pages.stride(1),
            k_pages.stride(2),
            out.stride(0),
            KV_HEADS=kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            BLOCK_T=block_t,
            BLOCK_M=block_m,
            BLOCK_N=keys_of_block(block_d, q.element_size()),
            BLOCK_D=block_d,
            WHOLE=table.shape[1] == 1,
            num_warps=warps,
            num_stages=stages(table),
        )


def _tile(rows: int, element_size: int) -> tuple[int, int]:
    """Queries and warps of a tile, if no sequence has over ``rows`` query heads."""
    if element_size == 4:  # without matrix units, a larger tile spills
        return 32, 8
    if rows <= 16:
        return 16, 4
    return (64, 4) if rows <= 64 else (128, 8)
