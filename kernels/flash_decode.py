"""``attend`` for one token per sequence: QK-norm, RoPE, k and v to their pages, attention.

S sequences, D head size, G query heads per KV head. ``qkv [S, (heads + 2 kv_heads) D]`` has all q
heads, all k, all v. ``q_weight, k_weight [D]``. ``cos, sin [S, D/2]`` float32. ``slots [S]`` int64.
``lengths [S]`` int32, this token included. ``out [S, heads D]``. Position p of a slot is row ``p %
page_size`` of page ``table[slot, p // page_size]`` (int32) in ``k_pages, v_pages [pages, kv_heads,
page_size, D]``. The token's row is written, earlier ones are read.

A context is cut into splits, which are divided among programs (Dao et al., 2023). The cuts depend
only on its length, on the device. So one grid works for all lengths, and neither the batch nor the
grid changes the bits of a row. A split writes the mean of its values to ``partials [S, kv_heads,
splits, G, D]`` and the logarithm of its total weight to ``logsums [S, kv_heads, splits, G]``, both
float32 with any content before. ``splits`` is ``most_splits`` of the context that the pages can
hold. ``arrivals [slots, kv_heads]`` int32 counts the programs that are done. It must be zero, and
the last program resets it to zero. Launches that may overlap after their waits must not share it.

Least bytes: 2 kv_heads D elements a token of context. FLOPs: 4 heads D a token of context.
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
from lfm2_fast.kernels.pdl import pdl_options, pdl_wait

SHORTEST_SPLIT = 128
MOST_SPLITS = 64


@triton.jit(do_not_specialize=["page_size", "most_splits", "stride_table_s"])
def _flash_decode_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    lengths_ptr,
    table_ptr,
    k_pages_ptr,
    v_pages_ptr,
    out_ptr,
    partials_ptr,
    logsums_ptr,
    arrivals_ptr,
    eps,
    scale,
    page_size,
    most_splits,
    stride_qkv_t,
    stride_table_s,
    stride_pages_p,
    stride_pages_h,
    stride_pages_r,
    stride_out_t,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SHORTEST: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
    WHOLE: tl.constexpr,
    VERIFIED: tl.constexpr,
    KEYS_ALONE: tl.constexpr,
    PDL: tl.constexpr,
):
    GROUP: tl.constexpr = HEADS // KV_HEADS
    sequence, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q_norm = _norm_weight(q_weight_ptr, HEAD_DIM, BLOCK_D)
    k_norm = _norm_weight(k_weight_ptr, HEAD_DIM, BLOCK_D)
    # Above the loop over keys, which is pipelined, and above the early exit. The previous step
    # writes the lengths, so only after the wait does a program know if it has work.
    pdl_wait(PDL)
    past = tl.load(lengths_ptr + sequence) - 1
    size = tl.maximum(tl.cdiv(tl.cdiv(past, MOST), BLOCK_N) * BLOCK_N, SHORTEST)
    splits = tl.maximum(tl.cdiv(past, size), 1)
    if tl.program_id(2) >= splits:
        return

    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask_m, mask_d = (offs_m < GROUP)[:, None], (offs_d < HEAD_DIM)[None, :]
    slot = tl.load(slots_ptr + sequence)
    table_ptr += slot * stride_table_s
    k_pages_ptr += kv_head.to(tl.int64) * stride_pages_h
    v_pages_ptr += kv_head.to(tl.int64) * stride_pages_h

    # Programs run in any order, so none may read data of another one. So no program reads the
    # token's own k and v from the pages. The first split takes them from qkv and writes them.
    first_split = tl.program_id(2) == 0
    q, k, v = _own_heads(
        qkv_ptr + sequence * stride_qkv_t, cos_ptr, sin_ptr, sequence, kv_head, q_norm, k_norm, eps,
        first_split, HEADS, KV_HEADS, HEAD_DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    page = tl.load(table_ptr + past // page_size).to(tl.int64)
    at = page * stride_pages_p + past % page_size * stride_pages_r + offs_d[None, :]
    if KEYS_ALONE or not VERIFIED:
        tl.store(k_pages_ptr + at, k, mask=mask_d & first_split)
        tl.store(v_pages_ptr + at, v, mask=mask_d & first_split)
    if KEYS_ALONE:
        return
    score = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1) * scale

    at = (sequence * KV_HEADS + kv_head) * most_splits * GROUP
    logsums_ptr += at
    partials_ptr += at * HEAD_DIM
    out_ptr += sequence * stride_out_t + kv_head * (GROUP * HEAD_DIM)
    at = offs_m[:, None] * HEAD_DIM + offs_d[None, :]
    for split in range(tl.program_id(2), splits, tl.num_programs(2)):
        has_token = split == 0
        best = tl.where(has_token, score, float("-inf"))
        total = tl.zeros([BLOCK_M], tl.float32) + tl.where(has_token, 1.0, 0.0)
        sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32) + tl.where(has_token, v.to(tl.float32), 0)
        end = tl.minimum((split + 1) * size, past)
        seen = tl.zeros([BLOCK_M], tl.int32) + end
        best, total, sums = attend_to_keys(
            q, best, total, sums, split * size, end, seen, k_pages_ptr, v_pages_ptr, table_ptr,
            scale, page_size, stride_pages_p, stride_pages_r, HEAD_DIM, BLOCK_N, BLOCK_D, WHOLE,
            MASKED=True,
        )  # fmt: skip
        mean = sums / total[:, None]
        if splits == 1:
            tl.store(out_ptr + at, mean.to(q.dtype), mask=mask_m & mask_d)
        else:
            partial_ptrs = partials_ptr + split * (GROUP * HEAD_DIM) + at
            tl.store(partial_ptrs, mean, mask=mask_m & mask_d)
            logsum_ptrs = logsums_ptr + split * GROUP + offs_m
            tl.store(logsum_ptrs, best + tl.log2(total), mask=offs_m < GROUP)

    if splits > 1:
        arrivals_ptr += (sequence if VERIFIED else slot) * KV_HEADS + kv_head
        if _arrives_last(arrivals_ptr, tl.minimum(splits, tl.num_programs(2))):
            _add_up(
                partials_ptr, logsums_ptr, out_ptr, splits,
                GROUP, HEAD_DIM, BLOCK_S, BLOCK_G, BLOCK_D,
            )  # fmt: skip


@triton.jit
def _own_heads(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    sequence,
    kv_head,
    q_norm,
    k_norm,
    eps,
    first_split,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return the token's q ``[BLOCK_M, D]`` and, in the first split, its k and v ``[1, D]``."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    angles = sequence * (HEAD_DIM // 2) + offs_d % (HEAD_DIM // 2)
    cos = tl.load(cos_ptr + angles)
    sin = tl.where(offs_d < HEAD_DIM // 2, -1, 1) * tl.load(sin_ptr + angles)
    q_head, mask_m = kv_head * GROUP + offs_m, (offs_m < GROUP)[:, None]
    q = _norm_and_turn(qkv_ptr, q_head, mask_m, q_norm, eps, cos, sin, HEAD_DIM, BLOCK_D)
    k_head = HEADS + kv_head + tl.arange(0, 1)
    k = _norm_and_turn(qkv_ptr, k_head, first_split, k_norm, eps, cos, sin, HEAD_DIM, BLOCK_D)
    v_ptrs = qkv_ptr + (k_head + KV_HEADS)[:, None] * HEAD_DIM + offs_d[None, :]
    v = tl.load(v_ptrs, mask=(offs_d < HEAD_DIM)[None, :] & first_split, other=0)
    return q, k, v


@triton.jit
def _arrives_last(arrivals_ptr, programs):
    """Count this program, and return True in the last of ``programs``, which sees all results.

    Every thread's results come before the barrier, and the barrier before the atomic of one thread.
    The atomic's release makes them visible to a program that acquires the count later. The last
    program acquires all results, and the second barrier passes them to all its threads. It then
    resets the counter. The next launch on this stream waits for this one first, so it reads zero.
    """
    tl.debug_barrier()
    earlier = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    is_last = earlier == programs - 1
    if is_last:
        tl.store(arrivals_ptr, 0)
    return is_last


@triton.jit
def _other(offs_d, HEAD_DIM: tl.constexpr):
    """Return the rotation partner of element i: i + D/2, or i - D/2."""
    return tl.where(offs_d < HEAD_DIM // 2, offs_d + HEAD_DIM // 2, offs_d - HEAD_DIM // 2)


@triton.jit
def _norm_weight(weight_ptr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Norm weight ``[D]`` in float32, and that of the rotation partners."""
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0)
    other = tl.load(weight_ptr + _other(offs_d, HEAD_DIM), mask=mask_d, other=0)
    return weight.to(tl.float32), other.to(tl.float32)


@triton.jit
def _norm_and_turn(
    qkv_ptr,
    head,
    mask_head,
    norm,
    eps,
    cos,
    sin,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Norm, rotate and round heads ``[N, D]``; the left half of ``sin [D]`` is negative."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_head & (offs_d < HEAD_DIM)[None, :]
    qkv_ptr += head[:, None] * HEAD_DIM
    x = tl.load(qkv_ptr + offs_d[None, :], mask=mask, other=0)
    other = tl.load(qkv_ptr + _other(offs_d, HEAD_DIM)[None, :], mask=mask, other=0)
    weight, other_weight = norm
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / HEAD_DIM + eps)[:, None]
    turned = wide * scale * weight * cos + other.to(tl.float32) * scale * other_weight * sin
    return turned.to(x.dtype)


@triton.jit
def _add_up(
    partials_ptr,
    logsums_ptr,
    out_ptr,
    splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the mean of the splits' means, weighted by their total weights, to ``out``."""
    offs_g, offs_d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    mask = (offs_g < GROUP)[:, None] & (offs_d < HEAD_DIM)[None, :]
    at = offs_g[:, None] * HEAD_DIM + offs_d[None, :]
    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    sums = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for first in range(0, splits, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        mask_s = offs_s < splits
        logsums = tl.load(
            logsums_ptr + offs_s[:, None] * GROUP + (offs_g % GROUP)[None, :],
            mask=mask_s[:, None],
            other=float("-inf"),
        )
        means = tl.load(
            partials_ptr + offs_s[:, None, None] * (GROUP * HEAD_DIM) + at[None, :, :],
            mask=mask_s[:, None, None] & mask[None, :, :],
            other=0,
        )
        higher = tl.maximum(best, tl.max(logsums, axis=0))
        shrink = tl.exp2(best - higher)
        weights = tl.exp2(logsums - higher[None, :])
        total = total * shrink + tl.sum(weights, axis=0)
        sums = sums * shrink[:, None] + tl.sum(weights[:, :, None] * means, axis=0)
        best = higher
    out = (sums / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, out, mask=mask)


def flash_decode_triton(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    out: torch.Tensor,
    partials: torch.Tensor,
    logsums: torch.Tensor,
    arrivals: torch.Tensor,
    *,
    verified: bool = False,
    pdl: bool = False,
) -> None:
    """Fill ``out`` and the tokens' rows of the pages; ``qkv`` and ``out`` may have gaps between
    rows.

    A slot may occur once in a launch; a slot of length 1 may occur several times. With ``verified``
    several tokens may be of one slot, each with its own length. One launch then writes all k and v,
    and a second one reads them. ``arrivals`` has a row for each token. ``pdl``: as in
    norm_linear.py.
    """
    sequences, width = out.shape
    _, kv_heads, page_size, head_dim = k_pages.shape
    heads, splits = width // head_dim, partials.shape[2]
    group = heads // kv_heads
    _check_inputs(qkv, q_weight, k_weight, cos, sin, slots, lengths, k_pages, out)
    check_pages(k_pages, v_pages, table)
    assert splits == most_splits(table.shape[1] * page_size)
    assert partials.shape == (sequences, kv_heads, splits, group, head_dim)
    assert logsums.shape == (sequences, kv_heads, splits, group)
    assert partials.dtype == logsums.dtype == torch.float32
    assert arrivals.shape[1:] == (kv_heads,) and arrivals.dtype == torch.int32
    assert len(arrivals) >= sequences if verified else len(arrivals) == table.shape[0]
    assert all(dense.is_contiguous() for dense in (partials, logsums, arrivals))
    if sequences == 0:
        return
    block_d = max(triton.next_power_of_2(head_dim), 16)
    block_g = triton.next_power_of_2(group)
    programs = _programs(sequences * kv_heads, splits)
    with torch.cuda.device_of(qkv):
        for keys_alone in (True, False) if verified else (False,):
            grid = (sequences, kv_heads, 1 if keys_alone else programs)
            _flash_decode_kernel[grid](
                qkv, q_weight, k_weight, cos, sin, slots, lengths, table, k_pages, v_pages, out,
                partials, logsums, arrivals, eps, score_scale(head_dim), page_size, splits,
                qkv.stride(0), table.stride(0), *k_pages.stride()[:3], out.stride(0),
                HEADS=heads,
                KV_HEADS=kv_heads,
                HEAD_DIM=head_dim,
                SHORTEST=SHORTEST_SPLIT,
                MOST=MOST_SPLITS,
                BLOCK_M=max(block_g, 16),
                BLOCK_N=keys_of_block(block_d, qkv.element_size()),
                BLOCK_D=block_d,
                BLOCK_S=max(4096 // (block_g * block_d), 1),
                BLOCK_G=block_g,
                WHOLE=table.shape[1] == 1,
                VERIFIED=verified,
                KEYS_ALONE=keys_alone,
                num_warps=4,
                num_stages=stages(table),
                **pdl_options(pdl),
            )  # fmt: skip


def _check_inputs(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    k_pages: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Assert shapes, dtypes and layouts of everything but the pages and the partial results."""
    sequences, width = out.shape
    kv_heads, head_dim = k_pages.shape[1], k_pages.shape[3]
    assert width % (kv_heads * head_dim) == 0 and head_dim % 2 == 0
    assert qkv.shape == (sequences, width + 2 * kv_heads * head_dim)
    assert qkv.stride(1) == out.stride(1) == 1
    assert q_weight.shape == k_weight.shape == (head_dim,)
    assert cos.shape == sin.shape == (sequences, head_dim // 2)
    assert cos.dtype == sin.dtype == torch.float32
    assert slots.shape == lengths.shape == (sequences,)
    assert qkv.dtype == q_weight.dtype == k_weight.dtype == k_pages.dtype == out.dtype
    for dense in (q_weight, k_weight, cos, sin, slots, lengths):
        assert dense.is_contiguous()


def most_splits(context: int) -> int:
    """Return the largest number of splits of a ``context`` of that many tokens."""
    return min(max(triton.cdiv(context, SHORTEST_SPLIT), 1), MOST_SPLITS)


def _programs(rows: int, splits: int) -> int:
    """Number of programs for the splits of each of ``rows``: sequences times KV heads.

    They are enough to fill a GPU with one long context among short ones. The others exit at once.
    """
    return min(max(2048 // rows, 16), splits)
