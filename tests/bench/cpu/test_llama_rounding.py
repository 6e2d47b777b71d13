"""llama.cpp's rounding in our eager model: what is rounded, and that it ends with its block."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.cpu.llama_rounding import attention, rounded, rounding


def test_attention_is_exact_attention_but_for_rounding() -> None:
    torch.manual_seed(0)
    q, keys, values = torch.randn(3, 1, 4, 40, 16)
    for few, given in (
        (40, {"is_causal": True}),
        (7, {"attn_mask": torch.arange(40) <= torch.arange(33, 40)[:, None]}),
        (7, {}),
    ):
        right = F.scaled_dot_product_attention(q[:, :, -few:], keys, values, **given)
        found = attention(q[:, :, -few:], keys, values, **given)
        error = float((found - right).norm() / right.norm())
        assert 1e-4 < error < 2e-3


def test_keys_are_rounded_to_float16() -> None:
    q, keys = torch.full((1, 1, 1, 1), 1024.0), torch.tensor([1, 1 + 2**-12]).view(1, 1, 2, 1)
    values = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    assert F.scaled_dot_product_attention(q, keys, values).item() > 0.55
    assert attention(q, keys, values).item() == 0.5


def test_each_sum_of_values_is_rounded_to_float16() -> None:
    q, keys = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 3, 1)
    values = torch.tensor([1, 2**-11, 2**-11]).view(1, 1, 3, 1)
    assert attention(q, keys, values).item() == torch.tensor(1 / 3).item()
    assert attention(q, keys, values.flip(2)).item() == torch.tensor((1 + 2**-10) / 3).item()


def test_activations_are_rounded_by_the_matrix_they_meet() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 512)
    assert rounded(x, "F32") is x
    errors = [
        float((rounded(x, type) - x).norm() / x.norm()) for type in ("F16", "BF16", "Q8_0", "Q6_K")
    ]
    assert errors == sorted(errors) and len(set(errors)) == 4


def test_rounding_ends_with_its_block() -> None:
    plain = F.linear, F.scaled_dot_product_attention
    x, half, wide = torch.randn(1, 8), torch.randn(8, 8), torch.randn(8, 8)
    with pytest.raises(ZeroDivisionError), rounding({half.data_ptr(): "F16"}):
        assert F.linear(x, half).equal(plain[0](rounded(x, "F16"), half))
        assert F.linear(x, wide).equal(plain[0](x, wide))
        assert F.scaled_dot_product_attention is attention
        raise ZeroDivisionError
    assert plain == (F.linear, F.scaled_dot_product_attention)
