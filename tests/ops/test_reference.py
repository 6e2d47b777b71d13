"""The operations' meanings, against formulas written another way, and their own invariants."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.config import Config
from lfm2_fast.ops import reference as ref
from tests.batches import whole_pages

HIDDEN = 6


def a_cache(slots: int, width: int, spare: int) -> Cache:
    config = Config.from_dict(
        {
            "model_type": "lfm2",
            "vocab_size": 8,
            "hidden_size": HIDDEN,
            "intermediate_size": 8,
            "block_auto_adjust_ff_dim": False,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "layer_types": ["conv"],
            "conv_L_cache": width,
            "max_position_embeddings": 512,
        }
    )
    return Cache(config, slots, 512, device="cpu", dtype=torch.float64, spare=spare)


def naive_conv(bcx: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The whole of one sequence from its start, tap by tap."""
    b, c, x = bcx.chunk(3, dim=-1)
    bx, width = b * x, weight.shape[1]
    out = torch.zeros_like(bx)
    for t in range(len(bx)):
        for tap in range(width):
            source = t - (width - 1 - tap)
            if source >= 0:
                out[t] += weight[:, tap] * bx[source]
    return c * (out + bias)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), width=st.integers(2, 8), spare=st.integers(1, 5))
def test_gated_conv_over_any_batches(data: st.DataObject, width: int, spare: int) -> None:
    """Any chunks of several sequences, in any slots and order, equal each sequence at once."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randn(HIDDEN, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(HIDDEN, generator=generator, dtype=torch.float64)
    cache = a_cache(3, width, spare)
    window = cache.layers[0].rows.fill_(math.nan)
    inputs: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    outputs: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    for _ in range(data.draw(st.integers(1, 5))):
        slots = data.draw(st.permutations([0, 1, 2]))[: data.draw(st.integers(1, 3))]
        top = data.draw(st.sampled_from([1, 3, 12]))
        counts = [data.draw(st.integers(1, top)) for _ in slots]
        batch = cache.next_batch(counts, slots, "cpu")
        bcx = torch.randn(sum(counts), 3 * HIDDEN, generator=generator, dtype=torch.float64)
        cache.reserve(batch)
        body = ref.gated_conv_step_ref if batch.max_query == 1 else ref.gated_conv_ref
        out = body(bcx, weight, bias, window, batch)
        cache.commit_batch(batch)
        for slot, part, result in zip(slots, bcx.split(counts), out.split(counts), strict=True):
            inputs[slot].append(part)
            outputs[slot].append(result)
    for slot in range(3):
        if not inputs[slot]:
            continue
        bcx = torch.cat(inputs[slot])
        expected = naive_conv(bcx, weight, bias)
        torch.testing.assert_close(torch.cat(outputs[slot]), expected, rtol=1e-12, atol=1e-12)
        b, _, x = bcx.chunk(3, dim=-1)
        for position in range(max(0, len(bcx) - cache.ring), len(bcx)):
            moved = window[slot, position % cache.ring]
            assert torch.equal(moved, (b * x)[position])


def test_step_and_many_token_bodies_are_equal_to_the_bit() -> None:
    width, counts = 4, [1, 1, 1]
    bcx = torch.randn(3, 3 * HIDDEN, dtype=torch.float64)
    weight, window = torch.randn(HIDDEN, width).double(), torch.randn(3, 4, HIDDEN).double()
    other, cache = window.clone(), a_cache(3, width, 1)
    batch = cache.next_batch(counts, [2, 0, 1], "cpu")
    many = ref.gated_conv_ref(bcx, weight, None, window, batch)
    assert torch.equal(many, ref.gated_conv_step_ref(bcx, weight, None, other, batch))
    assert torch.equal(window, other)


def test_rms_norm_formula_and_extremes() -> None:
    x = torch.randn(4, 10, dtype=torch.float64) * torch.logspace(-8, 8, 4).double()[:, None]
    weight = torch.randn(10, dtype=torch.float64)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(ref.rms_norm_ref(x, weight, 1e-5), expected)
    assert not ref.rms_norm_ref(torch.zeros(2, 10), torch.ones(10), 1e-5).any()
    big = torch.full((1, 10), 60000.0, dtype=torch.float16)
    assert torch.allclose(
        ref.rms_norm_ref(big, torch.ones(10, dtype=torch.float16), 1e-5), torch.ones(1).half()
    )


def test_rotation_is_relative_and_keeps_length() -> None:
    freq = 1.0 / 10000 ** (torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    q, k = torch.randn(1, 2, 8).double(), torch.randn(1, 2, 8).double()

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        return ref.rotate_ref(x, *ref.rope_ref(torch.tensor([position]), freq, torch.float64))

    near = (turned(q, 9) * turned(k, 4)).sum()
    far = (turned(q, 1009) * turned(k, 1004)).sum()
    torch.testing.assert_close(near, far)
    torch.testing.assert_close(turned(q, 500).norm(dim=-1), q.norm(dim=-1))
    assert torch.equal(turned(q, 0), q)
    first = turned(torch.tensor([[[1.0, 0, 0, 0, 0, 0, 0, 0]]]).double(), 1)[0, 0]
    torch.testing.assert_close(first[[0, 4]], torch.tensor([math.cos(1), math.sin(1)]).double())


def test_rotation_by_each_tokens_own_frequencies_and_a_scale() -> None:
    freq = torch.rand(5, 4, dtype=torch.float64)
    positions = torch.tensor([0, 3, 9, 100, 7])
    made = ref.rope_ref(positions, freq, torch.float64, 1.5)
    for token, position in enumerate(positions):
        alone = ref.rope_ref(position[None], freq[token], torch.float64)
        for ours, plain in zip(made, alone, strict=True):
            assert torch.equal(ours[token], 1.5 * plain[0])


@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 6), (5, 1), (5, 3)])
def test_attention_against_a_sum_over_keys(group: int, start: int, count: int) -> None:
    kv_heads, dim = 2, 4
    cache = a_cache(2, 3, 1)
    cache.lengths[1] = start
    batch = cache.next_batch([count], [1], "cpu")
    pages = torch.full((2, 2, kv_heads, 12, dim), math.nan, dtype=torch.float64)
    table = whole_pages(pages[0])
    heads = kv_heads * group
    qkv = torch.randn(count, (heads + 2 * kv_heads) * dim, dtype=torch.float64)
    ones = torch.ones(dim, dtype=torch.float64)
    rope = torch.ones(count, 1, dim).double(), torch.zeros(count, 1, dim).double()
    q = ref.qk_norm_rope_ref(qkv, 2 * ones, 3 * ones, 1e-9, rope, pages[0], pages[1], table, batch)
    parts = qkv.view(count, -1, dim)
    unit = parts / parts.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(q, 2 * unit[:, :heads])
    k, v = 3 * unit[:, heads : heads + kv_heads], parts[:, heads + kv_heads :]
    torch.testing.assert_close(pages[0, 1, :, start : start + count], k.transpose(0, 1))
    assert torch.equal(pages[1, 1, :, start : start + count], v.transpose(0, 1))
    pages[:, 1, :, :start] = torch.randn(2, kv_heads, start, dim, dtype=torch.float64)
    got = ref.attention_ref(q, pages[0], pages[1], table, batch).view(count, -1, dim)
    for t in range(count):
        for head in range(kv_heads * group):
            keys = pages[0, 1, head // group, : start + t + 1]
            values = pages[1, 1, head // group, : start + t + 1]
            weights = (keys @ q[t, head] / math.sqrt(dim)).softmax(0)
            torch.testing.assert_close(got[t, head], weights @ values)


def test_swiglu_formula() -> None:
    gate, up = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(ref.swiglu_ref(torch.cat([gate, up], -1)), expected)
