"""RMSNorm and rotary embedding of q and k, and k and v into their pages, in one launch.

T tokens of S sequences packed end to end, D head size. ``qkv [T, (heads + 2 kv_heads) D]`` has all
q heads, all k, all v. ``q_weight, k_weight [D]``. ``cos, sin [T, D/2]`` float32. ``positions [T]``
int64, ``cu_seqlens [S + 1]`` int32, ``slots [S]`` int64. ``q [T, heads, D]``. ``k_pages, v_pages
[pages, kv_heads, page_size, D]``. Position p of a slot is row ``p % page_size`` of page
``table[slot, p // page_size]``, int32. ``write_from [S]`` int32 or None is the first position to
write k and v. Tokens after the last sequence are padding; their ``q`` is not written.

A head is normed and rotated, element i with i + D/2, in float32 and rounded once; v is copied.
Least bytes: 2T(heads + 2 kv_heads)D elements, 4TD of cos and sin.
"""

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.varlen import sequence_of_token


@triton.jit(do_not_specialize=["tokens", "sequences", "page_size", "stride_table_s"])
def _qk_norm_rope_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    cu_seqlens_ptr,
    slots_ptr,
    write_from_ptr,
    table_ptr,
    q_ptr,
    k_pages_ptr,
    v_pages_ptr,
    eps,
    tokens,
    sequences,
    page_size,
    stride_qkv_t,
    stride_table_s,
    stride_pages_p,
    stride_pages_h,
    stride_pages_r,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Row n is one head of one token, so only the last program has idle rows, for any number of
    # heads.
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = (offs_n // (HEADS + 2 * KV_HEADS)).to(tl.int64)
    head = offs_n % (HEADS + 2 * KV_HEADS)
    is_q, is_v = head < HEADS, head >= HEADS + KV_HEADS
    mask_n = token < tokens
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HALF

    # Only the heads depend on the projection that makes qkv. All other loads come first.
    sequence = token
    if sequences < tokens:
        sequence = sequence_of_token(cu_seqlens_ptr, token, sequences)
        mask_n &= token < tl.load(cu_seqlens_ptr + sequences)
    mask = mask_n[:, None] & mask_d[None, :]
    position = tl.load(positions_ptr + token, mask=mask_n, other=0).to(tl.int32)
    slot = tl.load(slots_ptr + sequence, mask=mask_n, other=0)
    page = tl.load(table_ptr + slot * stride_table_s + position // page_size, mask=mask_n, other=0)
    cos = tl.load(cos_ptr + token[:, None] * HALF + offs_d[None, :], mask=mask, other=0)
    sin = tl.load(sin_ptr + token[:, None] * HALF + offs_d[None, :], mask=mask, other=0)
    weight_left = _weight(q_weight_ptr, k_weight_ptr, is_q, offs_d, mask_d)
    weight_right = _weight(q_weight_ptr, k_weight_ptr, is_q, offs_d + HALF, mask_d)

    at = (token * stride_qkv_t + head * (2 * HALF))[:, None] + offs_d[None, :]
    left = tl.load(qkv_ptr + at, mask=mask, other=0)
    right = tl.load(qkv_ptr + at + HALF, mask=mask, other=0)
    wide_left, wide_right = left.to(tl.float32), right.to(tl.float32)
    squares = tl.sum(wide_left * wide_left + wide_right * wide_right, axis=1)
    scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
    unit_left, unit_right = wide_left * scale * weight_left, wide_right * scale * weight_right
    turned_left = (unit_left * cos - unit_right * sin).to(left.dtype)
    turned_right = (unit_right * cos + unit_left * sin).to(left.dtype)

    at = ((token * HEADS + head) * (2 * HALF))[:, None] + offs_d[None, :]
    mask_q = mask & is_q[:, None]
    tl.store(q_ptr + at, turned_left, mask=mask_q)
    tl.store(q_ptr + at + HALF, turned_right, mask=mask_q)
    kv_head = (head - HEADS) % KV_HEADS
    row = (position % page_size).to(tl.int64)
    row = page.to(tl.int64) * stride_pages_p + row * stride_pages_r
    at = (row + kv_head * stride_pages_h)[:, None] + offs_d[None, :]
    if write_from_ptr is not None:
        mask &= (position >= tl.load(write_from_ptr + sequence, mask=mask_n, other=0))[:, None]
    mask_k = mask & (~is_q & ~is_v)[:, None]
    tl.store(k_pages_ptr + at, turned_left, mask=mask_k)
    tl.store(k_pages_ptr + at + HALF, turned_right, mask=mask_k)
    mask_v = mask & is_v[:, None]
    tl.store(v_pages_ptr + at, left, mask=mask_v)
    tl.store(v_pages_ptr + at + HALF, right, mask=mask_v)


@triton.jit
def _weight(q_weight_ptr, k_weight_ptr, is_q, offs_d, mask_d):
    """Norm weight of each row in float32; that of v rows is not used."""
    q_weight = tl.load(q_weight_ptr + offs_d, mask=mask_d, other=0).to(tl.float32)
    k_weight = tl.load(k_weight_ptr + offs_d, mask=mask_d, other=0).to(tl.float32)
    return tl.where(is_q[:, None], q_weight[None, :], k_weight[None, :])


def qk_norm_rope_triton(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    cu_seqlens: torch.Tensor,
    slots: torch.Tensor,
    write_from: torch.Tensor | None,
    table: torch.Tensor,
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
) -> None:
    """Fill ``q`` and the tokens' rows of the pages; ``qkv`` may have gaps between rows."""
    tokens, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_pages.shape
    sequences, half = slots.shape[0], head_dim // 2
    assert head_dim == 2 * half == k_pages.shape[3] and k_pages.shape == v_pages.shape
    assert qkv.shape == (tokens, (heads + 2 * kv_heads) * head_dim) and qkv.stride(1) == 1
    assert q_weight.shape == k_weight.shape == (head_dim,)
    assert cos.shape == sin.shape == (tokens, half) and cos.dtype == sin.dtype == torch.float32
    assert qkv.dtype == q_weight.dtype == k_weight.dtype == q.dtype == k_pages.dtype
    assert qkv.dtype == v_pages.dtype != torch.float64
    assert k_pages.stride() == v_pages.stride() and k_pages.stride(3) == table.stride(1) == 1
    for dense in (q_weight, k_weight, cos, sin, positions, q):
        assert dense.is_contiguous()
    assert positions.shape == (tokens,) and cu_seqlens.shape == (sequences + 1,)
    assert write_from is None or write_from.shape == slots.shape and write_from.is_contiguous()
    if tokens == 0:
        return
    block_n = 32
    rows = tokens * (heads + 2 * kv_heads)
    assert rows < 2**31
    with torch.cuda.device_of(qkv):
        _qk_norm_rope_kernel[(triton.cdiv(rows, block_n),)](
            qkv,
            q_weight,
            k_weight,
            cos,
            sin,
            positions,
            cu_seqlens,
            slots,
            write_from,
            table,
            q,
            k_pages,
            v_pages,
            eps,
            tokens,
            sequences,
            page_size,
            qkv.stride(0),
            table.stride(0),
            k_pages.stride(0),
            k_pages.stride(1),
            k_pages.stride(2),
            HEADS=heads,
            KV_HEADS=kv_heads,
            HALF=half,
            BLOCK_N=block_n,
            BLOCK_D=triton.next_power_of_2(half),
            num_warps=4,
        )
