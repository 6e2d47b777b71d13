"""Low-rank changes of adapters inside of the kernels of few tokens, against their meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lfm2_fast.kernels.gemv_low_rank import Change
from lfm2_fast.kernels.linear_add import linear_add_triton
from lfm2_fast.kernels.low_rank import low_rank_down_triton, low_shape
from lfm2_fast.kernels.norm_linear import norm_linear_triton
from lfm2_fast.kernels.norm_swiglu import norm_swiglu_triton
from lfm2_fast.ops.low_rank import low_rank_ref
from lfm2_fast.ops.reference import linear_ref, rms_norm_ref, swiglu_ref
from lfm2_fast.weights.adapter_stack import AdapterStack
from tests.kernels.test_low_rank import ENTRIES, stack_of

PARTS = {"norm_linear": (40, 8, 80), "linear_add": (24,), "norm_swiglu": (40, 40)}


def meant(word: str, given: dict[str, torch.Tensor], stack: AdapterStack) -> torch.Tensor:
    """Return the operation in plain PyTorch."""
    x, bias = given["x"], given.get("bias")
    if word != "linear_add":
        x = rms_norm_ref(x, given["norm"], 1e-5)
    product = linear_ref(x, given["weight"], bias)
    product = low_rank_ref(x, product, given["entries"], stack, bias)
    if word == "linear_add":
        return given["residual"] + product
    return swiglu_ref(product) if word == "norm_swiglu" else product


@pytest.mark.parametrize("word", PARTS)
def test_against_the_meaning(word, kernel_device, kernel_dtype, within_budget, same_bits) -> None:
    """Company changes no bit, and tokens without an adapter have those of a step without any."""
    torch.manual_seed(0)
    like, parts, columns = torch.empty(0, dtype=kernel_dtype, device=kernel_device), PARTS[word], 64
    stack, rows, tokens = stack_of(parts, columns, 8, like), sum(parts), len(ENTRIES)
    sizes = {"x": (tokens, columns), "weight": (rows, columns), "norm": (columns,)}
    sizes |= {"residual": (tokens, rows)} | ({} if word == "norm_swiglu" else {"bias": (rows,)})
    given = {name: torch.randn(size).to(like) for name, size in sizes.items()}
    given["weight"] /= columns**0.5
    given["entries"] = torch.tensor(ENTRIES, device=kernel_device)
    launch: Callable[..., None] = {
        "norm_linear": norm_linear_triton,
        "linear_add": linear_add_triton,
        "norm_swiglu": norm_swiglu_triton,
    }[word]
    normed = {} if word == "linear_add" else {"norm": given["norm"], "eps": 1e-5}

    def run(at: slice, *, changed: bool = True) -> torch.Tensor:
        x, entries = given["x"][at], given["entries"][at].contiguous()
        out = x.new_full((len(x), 40 if word == "norm_swiglu" else rows), float("nan"))
        low = torch.full(low_shape(len(x), columns, 8 * len(parts)), float("nan"))
        low = low.to(kernel_device)
        low_rank_down_triton(x, entries, stack.down, low, **normed)
        bias = given.get("bias")
        change = Change(entries, low, stack.up, stack.gain, stack.shift, bias, parts)
        weight = given["weight"], bias, None
        before: tuple[Any, ...] = (x, *normed.values(), *weight)
        if word == "linear_add":
            before += (given["residual"][at],)
        launch(*before, out, change=change if changed else None)
        return out

    wide = {n: part.double() if part.is_floating_point() else part for n, part in given.items()}
    exact = meant(word, wide, stack.apply(lambda part: part.double()))
    found = run(slice(tokens))
    within_budget(found, exact, meant(word, given, stack))
    others = given["entries"] == 0
    assert same_bits(found[others], run(slice(tokens), changed=False)[others])
    assert not same_bits(found[~others], run(slice(tokens), changed=False)[~others])
    assert same_bits(run(slice(5, 6)), found[5:6])
