"""Every operation in plain PyTorch: its meaning, and the code that runs if no faster one can.

Shapes: T tokens of B sequences packed end to end, H hidden, W conv width, D head size. Numbers are
rounded where Hugging Face's ``Lfm2ForCausalLM`` rounds, so that results agree in every dtype. In
float64 each function is the oracle of the faster implementations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from lfm2_fast.cache.batch import Batch, DecodeInputs


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis.

    Normalised in float32 (or wider), cast to ``x.dtype``, then scaled. (Zhang and Sennrich, 2019)
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def linear_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x @ weight.T + bias``: ``x [T, K]``, ``weight [N, K]``, result ``[T, N]``."""
    return F.linear(x, weight, bias)


def dynamic_linear_ref(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``linear_ref`` of an int8 weight, with every token of ``x`` rounded to int8 too.

    The products are exact. Each is multiplied by its token's and its row's scale. This is the
    meaning of the native int8 code and the oracle of its tests.
    """
    numbers, scales = quantize_ref(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    products = (numbers.double() @ weight.double().T).to(wide)
    out = products * (scales.to(wide)[:, None] * scale.to(wide))
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)


def quantize_ref(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ``x [T, K]`` as int8, the largest number as 127, and their scales ``[T]``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    most = wide.abs().amax(-1, keepdim=True)
    # Not 127 / most, which torch computes as 127 * (1 / most).
    factor = torch.where(most > 1e-35, torch.full_like(most, 127) / most, 0)
    return (wide * factor).round().to(torch.int8), (most / 127)[:, 0]


def grouped_linear_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``linear_ref`` with every 32 numbers of a token rounded to int8, with one scale.

    ``weight [N, K]`` is a dequantized matrix in groups. This is the meaning of the native code for
    formats in groups, and the oracle of its tests.
    """
    numbers, scales = quantize_ref(x.reshape(-1, 32))
    wide = torch.promote_types(x.dtype, torch.float32)
    rounded = (numbers.to(wide) * scales.to(wide)[:, None]).view(x.shape)
    return linear_ref(rounded, weight.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)


def swiglu_ref(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of ``gate_up [T, 2F]``, gate first; result ``[T, F]``. (Shazeer, 2020)"""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gated_conv_ref(
    bcx: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    window: torch.Tensor,
    batch: Batch,
) -> torch.Tensor:
    """``C * causal_conv(B * x)``, depthwise, for any number of tokens per sequence.

    ``bcx [T, 3H]`` has B, C and x side by side; ``weight [H, W]`` has its newest tap last; result
    ``[T, H]``. ``window [slots, ring, H]`` has the W - 1 rows of ``B * x`` before each sequence's
    first token (zeros before its start). The newest rows are written to it.
    """
    ring, past = window.shape[1], weight.shape[1] - 1
    b, c, x = bcx.chunk(3, dim=-1)
    bx = b * x
    out = torch.empty_like(bx)
    first = 0
    for slot, start, n in batch.required_host:
        rows = bx[first : first + n]
        before = torch.arange(start - past, start, device=bx.device)
        old = window[slot, before % ring].masked_fill(before[:, None] < 0, 0)
        out[first : first + n] = _taps(torch.cat([old, rows]).unfold(0, past + 1, 1), weight, bias)
        kept = min(n, ring)
        newest = torch.arange(start + n - kept, start + n, device=bx.device) % ring
        window[slot, newest] = rows[n - kept :]
        first += n
    return c * out


def gated_conv_step_ref(
    bcx: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    window: torch.Tensor,
    batch: Batch,
) -> torch.Tensor:
    """``gated_conv_ref`` for one token per sequence: writes one row of each window, gathers it.

    Adjacent tokens may be of one slot: a row is written before any is read. The ring must then hold
    all that these tokens read and write.
    """
    ring, past = window.shape[1], weight.shape[1] - 1
    b, c, x = bcx.chunk(3, dim=-1)
    window[batch.slots, batch.positions % ring] = b * x
    taps = batch.positions[:, None] - torch.arange(past, -1, -1, device=bcx.device)
    rows = window[batch.slots[:, None], taps % ring].masked_fill(taps[..., None] < 0, 0)
    return c * _taps(rows.transpose(1, 2), weight, bias)


def _taps(history: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``sum(history [T, H, W] * weight [H, W]) + bias`` over W, summed wide, rounded once."""
    wide = torch.promote_types(history.dtype, torch.float32)
    out = (history.to(wide) * weight.to(wide)).sum(-1)
    if bias is not None:
        out = out + bias.to(wide)
    return out.to(history.dtype)


def rope_ref(
    positions: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``[T, 1, D]`` of rotary embedding; both halves are equal. (Su et al., 2021)

    ``inv_freq`` is ``[D/2]`` for all tokens, or ``[T, D/2]``. Both results are times ``scale``.
    """
    angles = positions.to(inv_freq.dtype)[:, None, None] * inv_freq.unsqueeze(-2)
    angles = torch.cat([angles, angles], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    return cos.to(dtype), sin.to(dtype)


def rotate_ref(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``x [T, heads, D]``, pairing element i with i + D/2."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def qk_norm_rope_ref(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    rope: tuple[torch.Tensor, torch.Tensor],
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    table: torch.Tensor,
    batch: Batch,
) -> torch.Tensor:
    """Normalise q and k per head, rotate them, and write k and v into the cache.

    ``qkv [T, (heads + 2 * kv_heads) * D]`` holds all q heads, then all k, then all v; ``q_weight``
    and ``k_weight`` are ``[D]``; ``rope`` is the result of ``rope_ref``. Position p of a slot is
    row ``p % page_size`` of page ``table[slot, p // page_size]`` in the pages ``[pages, kv_heads,
    page_size, D]``. Keys and values are written at the tokens' positions, from ``batch.write_from``
    on. Result: q, ``[T, heads, D]``.
    """
    kv_heads, head_dim = k_pages.shape[1], k_pages.shape[3]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    q = rotate_ref(rms_norm_ref(q, q_weight, eps), *rope)
    k = rotate_ref(rms_norm_ref(k, k_weight, eps), *rope)
    host, page_size = batch.required_host, k_pages.shape[2]
    first = 0
    for (slot, start, n), written in zip(host, host.write_from or host.starts, strict=True):
        here = slice(first + max(written - start, 0), first + n)
        positions = torch.arange(max(written, start), start + n, device=table.device)
        at = table[slot, positions // page_size].long(), positions % page_size
        k_pages[at[0], :, at[1]] = k[here]
        v_pages[at[0], :, at[1]] = v[here]
        first += n
    return q


def attention_ref(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    table: torch.Tensor,
    batch: Batch,
) -> torch.Tensor:
    """Causal grouped-query attention of each sequence's newest tokens over its pages.

    ``q [T, heads, D]``, result ``[T, heads * D]``. The pages are as in ``qk_norm_rope_ref``, and
    have the keys and values of these tokens already. Query heads of a group share one KV head
    (Ainslie et al., 2023).
    """
    out = torch.empty_like(q)
    first = 0
    for slot, start, n in batch.required_host:
        here, end = slice(first, first + n), start + n
        pages = table[slot, : -(-end // k_pages.shape[2])].long()
        keys, values = (
            each[pages].transpose(0, 1).flatten(1, 2)[:, :end] for each in (k_pages, v_pages)
        )
        out[here] = _attend_one(q[here], keys, values, start)
        first += n
    return out.flatten(1)


def _attend_one(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int
) -> torch.Tensor:
    """One sequence: ``q [n, heads, D]`` over ``keys, values [kv_heads, start + n, D]``."""
    n, heads, head_dim = q.shape
    kv_heads, end, _ = keys.shape
    group = heads // kv_heads
    if n == 1:
        # A group's query heads become queries of its KV head: nothing is repeated or masked.
        folded = q.view(1, kv_heads, group, head_dim)
        return F.scaled_dot_product_attention(folded, keys[None], values[None]).view_as(q)
    mask = None
    if start:
        seen = torch.arange(end, device=q.device)
        mask = seen <= seen[start:, None]
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys.repeat_interleave(group, dim=0)[None],
        values.repeat_interleave(group, dim=0)[None],
        attn_mask=mask,
        is_causal=mask is None,
    )
    return out[0].transpose(0, 1)


def keep_streams_ref(
    streams: Sequence[torch.Tensor],
    slots: torch.Tensor,
    positions: torch.Tensor,
    ring: torch.Tensor,
) -> None:
    """Store the streams of T tokens, L of ``[T, H]``, in ``ring [slots, size, L * H]``.

    They lie side by side, at the token's slot and at its position modulo ``size``. ``slots`` and
    ``positions [T]`` int64.
    """
    ring.index_put_((slots, positions % ring.shape[1]), torch.cat(list(streams), -1))


def advance_ref(
    chosen: torch.Tensor,
    eos: torch.Tensor,
    dummy_slot: int | None,
    inputs: DecodeInputs,
    written: torch.Tensor,
) -> None:
    """Turn the ``inputs`` of a decode step into the next step's, in place, from ``chosen [B]``.

    A row that chose one of its ``eos [B, E]``, or has NO_TOKEN, is finished. It runs on without
    effect, at the first position of ``dummy_slot``. If that is None, it stays at the position after
    its text, which nothing reads. ``written [B]`` gets the chosen tokens unchanged. In the next
    step's tokens, 0 replaces NO_TOKEN, because each must be a row of the embedding.
    """
    tokens, slots, positions, lengths, finished = inputs
    positions += ~finished
    finished |= (chosen[:, None] == eos).any(-1) | (chosen < 0)
    written.copy_(chosen)
    tokens.copy_(chosen.clamp(min=0))
    if dummy_slot is not None:
        positions.masked_fill_(finished, 0)
        slots.masked_fill_(finished, dummy_slot)
    lengths.copy_(positions + 1)
