"""Arguments of every operation of the extension: schemas, refusals, no tokens at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lfm2_fast.ops import native_library

EPS = 1e-5
BODIES = torch.ops.lfm2_fast

_lacking = native_library.why_not(torch.device("cpu"))
pytestmark = [
    pytest.mark.skipif(_lacking is not None, reason=str(_lacking)),
    pytest.mark.usefixtures("threads"),
]


def arguments() -> dict[str, dict[str, Any]]:
    """Small good arguments of every operation."""
    x, ints = torch.randn(3, 8), torch.arange(3)
    runs = {
        "cu_seqlens": torch.tensor([0, 1, 2, 3], dtype=torch.int32),
        "slots": ints,
        "lengths": torch.tensor([4, 5, 6], dtype=torch.int32),
    }
    pages = torch.zeros(6, 1, 4, 8)
    paged = {
        "k_pages": pages,
        "v_pages": pages.clone(),
        "table": torch.arange(6, dtype=torch.int32).view(3, 2),
    }
    conv = {
        "bcx": torch.randn(3, 24),
        "weight": torch.randn(8, 3),
        "bias": torch.randn(8),
        "window": torch.zeros(3, 4, 8),
    }
    floats = torch.full((3,), 0.5, dtype=torch.float64)
    numbers = torch.randint(-127, 128, (6, 8), dtype=torch.int8)
    matrix = {"weight": numbers, "scales": torch.rand(6)}
    return {
        "rms_norm": {"x": x, "weight": torch.randn(8), "eps": EPS, "out": torch.zeros(3, 8)},
        "add_rms_norm": {
            "x": x, "delta": x.clone(), "weight": torch.randn(8), "eps": EPS,
            "total": torch.zeros(3, 8), "out": torch.zeros(3, 8),
        },
        "embed": {
            "tokens": ints, "weight": numbers, "scales": torch.rand(6), "out": torch.zeros(3, 8),
        },
        "swiglu": {"gate_up": x, "out": torch.zeros(3, 4)},
        "gated_conv_step": {**conv, "positions": ints, "slots": ints, "out": torch.zeros(3, 8)},
        "gated_conv": {**conv, **runs, "out": torch.zeros(3, 8)},
        "rope": {
            "positions": ints, "inv_freq": torch.rand(4),
            "cos": torch.zeros(3, 1, 8), "sin": torch.zeros(3, 1, 8),
        },
        "qk_norm_rope": {
            "qkv": torch.randn(3, 32), "q_weight": torch.randn(8), "k_weight": torch.randn(8),
            "eps": EPS, "cos": torch.rand(3, 1, 8), "sin": torch.rand(3, 1, 8), **paged, **runs,
            "write_from": torch.zeros(3, dtype=torch.int32), "q": torch.zeros(3, 2, 8),
        },
        "flash_decode": {
            "q": torch.randn(3, 2, 8), **paged, "slots": ints, "lengths": runs["lengths"],
            "out": torch.zeros(3, 16),
        },
        "flash_prefill": {
            "q": torch.randn(3, 2, 8), **paged, **runs, "out": torch.zeros(3, 16),
        },
        "norm_linear": {
            "x": x, "norm": torch.randn(8), "eps": EPS, **matrix, "bias": torch.randn(6),
            "out": torch.zeros(3, 6),
        },
        "linear_add": {
            "y": x, **matrix, "bias": torch.randn(6), "residual": torch.randn(3, 6),
            "out": torch.zeros(3, 6),
        },
        "norm_swiglu": {
            "x": x, "norm": torch.randn(8), "eps": EPS, **matrix, "out": torch.zeros(3, 3),
        },
        "quantize": {
            "x": x, "out": torch.zeros(3, 8, dtype=torch.int8), "scales": torch.zeros(3),
        },
        "finish_products": {
            "products": torch.ones(3, 6, dtype=torch.int32), "token_scales": torch.rand(3),
            "row_scales": torch.rand(6), "bias": torch.randn(6), "out": torch.zeros(3, 6),
        },
        "best_tokens": {"logits": x, "out": torch.zeros(3, dtype=torch.int64)},
        "penalize": {"logits": x, "seen": x > 0, "penalty": floats, "out": torch.zeros(3, 8)},
        "warp": {
            "logits": x, "temperature": floats, "top_k": ints, "top_p": floats, "min_p": floats,
            "out": torch.zeros(3, 8),
        },
        "draw": {
            "scores": x, "seeds": ints, "rows": ints, "positions": ints,
            "out": torch.zeros(3, dtype=torch.int64),
        },
        "keep_stream": {
            "x": x, "slots": ints, "positions": ints, "first": 4, "ring": torch.zeros(3, 2, 16),
        },
        "advance": {
            "chosen": ints, "eos": torch.tensor([[2, 5]] * 3), "dummy_slot": 3,
            "tokens": ints.clone(), "slots": ints.clone(), "positions": ints.clone(),
            "lengths": ints.int(), "finished": ints > 1, "written": ints.clone(),
        },
    }  # fmt: skip


@pytest.mark.parametrize("name", arguments())
def test_schemas_say_what_is_written(name: str) -> None:
    body = getattr(BODIES, f"{name}_native").default
    torch.library.opcheck(body, tuple(arguments()[name].values()))


def hostile(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Tensors that cannot stand in for ``tensor``: another type, size, rank or layout."""
    wrong = [tensor.to(torch.complex64), tensor[None], tensor[..., 0], tensor.new_empty(0)]
    wrong.append(torch.stack([tensor, tensor], -1)[..., 0])
    wrong.append(tensor.half() if tensor.dtype == torch.float32 else tensor.float())
    wrong.append(torch.cat([tensor, tensor], 0))
    return wrong


# An operation reads its own size and type from some arguments: these are right by definition.
GIVEN = {
    "table": "size", "inv_freq": "size", "window": "size", "k_pages": "size", "eos": "size",
    "ring": "size",
    "logits": "type", "quantize.x": "type", "finish_products.out": "type",
    "embed.out": "type",
}  # fmt: skip


@pytest.mark.parametrize("name", arguments())
def test_wrong_arguments_are_refused(name: str) -> None:
    body = getattr(BODIES, f"{name}_native")
    body(**arguments()[name])
    for place, value in arguments()[name].items():
        by = GIVEN.get(place) or GIVEN.get(f"{name}.{place}")
        for wrong in hostile(value) if isinstance(value, torch.Tensor) else []:
            if by == "type" and wrong.dtype == torch.float16:
                continue
            if (
                by == "size"
                and wrong.dtype == value.dtype
                and wrong.dim() == value.dim()
                and wrong.is_contiguous()
            ):
                continue
            with pytest.raises(RuntimeError):
                body(**{**arguments()[name], place: wrong})


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("embed", {"tokens": [0, 6, 1]}, "token 6 must be from 0 to 5"),
        ("embed", {"tokens": [0, -1, 1]}, "token -1"),
        ("gated_conv_step", {"slots": [0, 1, 3]}, "slot 3 must be from 0 to 2"),
        ("gated_conv_step", {"slots": [0, 1, -1]}, "slot -1"),
        ("gated_conv_step", {"positions": [0, -1, 2]}, "position -1"),
        ("keep_stream", {"slots": [0, 1, 3]}, "slot 3 must be from 0 to 2"),
        ("keep_stream", {"positions": [0, -1, 2]}, "position -1"),
        ("gated_conv", {"slots": [0, 1, 7]}, "slot 7"),
        ("gated_conv", {"cu_seqlens": [0, 2, 1, 3]}, "must not fall"),
        ("gated_conv", {"cu_seqlens": [0, 1, 2, 2]}, "from 0 to 3"),
        ("gated_conv", {"lengths": [4, 0, 6]}, "context of 0"),
        ("qk_norm_rope", {"lengths": [4, 9, 6]}, "too few for 9 tokens"),
        ("qk_norm_rope", {"table": [[0, 6], [2, 3], [4, 5]]}, None),
        ("qk_norm_rope", {"table": [[6, 1], [2, 3], [4, 5]]}, "page 6 must be from 0 to 5"),
        ("flash_decode", {"lengths": [4, 0, 6]}, "nothing to attend to"),
        ("flash_decode", {"lengths": [4, 9, 6]}, "too few for 9 tokens"),
        ("flash_decode", {"table": [[0, 1], [-1, 3], [4, 5]]}, "page -1"),
        ("flash_decode", {"slots": [0, 1, 3]}, "slot 3"),
        ("rope", {"inv_freq": [[0.5] * 4] * 2}, "inv_freq has size 2 in dimension 0, not 3"),
        ("rope", {"inv_freq": [[0.5] * 4] * 3}, None),
    ],
)
def test_places_that_are_not_there_are_refused(name: str, changed: dict, message: str) -> None:
    given = arguments()[name]
    for place, values in changed.items():
        given[place] = torch.tensor(values, dtype=given[place].dtype)
    body = getattr(BODIES, f"{name}_native")
    if message is None:
        body(**given)
    else:
        with pytest.raises(RuntimeError, match=message):
            body(**given)


@pytest.mark.parametrize("first", [9, -1, 2**63 - 1])
def test_streams_beyond_the_ring_are_refused(first: int) -> None:
    with pytest.raises(RuntimeError, match="too few for 8"):
        BODIES.keep_stream_native(**{**arguments()["keep_stream"], "first": first})


def test_pages_of_no_tokens_are_refused() -> None:
    for name in ("qk_norm_rope", "flash_decode"):
        given = arguments()[name]
        given.update(k_pages=torch.zeros(6, 1, 0, 8), v_pages=torch.zeros(6, 1, 0, 8))
        with pytest.raises(RuntimeError, match="pages of no tokens"):
            getattr(BODIES, f"{name}_native")(**given)


def test_no_columns() -> None:
    given = arguments()["norm_swiglu"]
    given.update(weight=given["weight"][:0], scales=given["scales"][:0], out=torch.zeros(3, 0))
    BODIES.norm_swiglu_native(**given)


def test_no_tokens() -> None:
    kept = ("table", "window", "inv_freq", "weight", "q_weight", "k_weight", "bias")
    kept += ("k_pages", "v_pages", "norm", "scales", "row_scales")
    for name, some in arguments().items():
        none = {
            place: value
            if not isinstance(value, torch.Tensor) or (place in kept and name != "quantize")
            else value[:0]
            for place, value in some.items()
        }
        if "cu_seqlens" in none:
            none["cu_seqlens"] = torch.zeros(1, dtype=torch.int32)
        getattr(BODIES, f"{name}_native")(**none)
