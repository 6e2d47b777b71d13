"""Checkpoints in compressed-tensors' layouts, written by hand: every value as its layout says."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lfm2_fast
from lfm2_fast.cli.environment import checkpoint_facts
from lfm2_fast.config_values import CheckpointError
from lfm2_fast.weights.formats import DENSE, INT4, INT8, Q4_1, Q8_0, Format

PROMPT = torch.arange(20, 60)[None]
Tensors = dict[str, torch.Tensor]
Scheme = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]


def packed(numbers: np.ndarray, bits: int) -> torch.Tensor:
    """Return words of 32 bits: the first number in the lowest bits, half the range added."""
    each = 32 // bits
    padded = np.zeros((len(numbers), -(-numbers.shape[1] // each) * each), np.uint64)
    padded[:, : numbers.shape[1]] = (numbers.astype(np.int64) + (1 << bits - 1)).astype(np.uint64)
    words = np.zeros((len(numbers), padded.shape[1] // each), np.uint64)
    for column in range(padded.shape[1]):
        words[:, column // each] |= padded[:, column] << np.uint64(bits * (column % each))
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def grouped(bits: int, size: int | None, asymmetric: bool = False) -> Scheme:
    """Return a scheme of packed integers; ``size`` columns, or all, share a scale."""

    def make(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        draw = np.random.default_rng(weight.numel())
        rows, columns = weight.shape
        each = columns // (size or columns)
        low = -(1 << bits - 1)
        numbers = draw.integers(low, -low, (rows, columns))
        scale = torch.from_numpy(draw.uniform(0.001, 0.02, (rows, each))).to(torch.bfloat16)
        zero = draw.integers(low, -low, (rows, each)) if asymmetric else np.zeros((rows, each))
        wide = np.repeat(scale.double().numpy(), columns // each, 1)
        values = (numbers - np.repeat(zero, columns // each, 1)) * wide
        made = {
            "weight_packed": packed(numbers, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor([rows, columns]),
        }
        if asymmetric:
            made["weight_zero_point"] = packed(zero.T, bits).T.contiguous()
        return made, torch.from_numpy(values)

    return make


def whole_rows(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    draw = np.random.default_rng(weight.numel())
    numbers = torch.from_numpy(draw.integers(-128, 128, tuple(weight.shape), dtype=np.int8))
    scale = torch.from_numpy(draw.uniform(1e-4, 1e-3, (len(weight), 1))).to(torch.bfloat16)
    return {"weight": numbers, "weight_scale": scale}, numbers.double() * scale.double()


def floats(block: tuple[int, int] | None, *, whole: bool = False) -> Scheme:
    """Return FP8 with a scale for each row, block, or matrix."""

    def make(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        draw = np.random.default_rng(weight.numel())
        wide = torch.from_numpy(draw.standard_normal(tuple(weight.shape))) * 100
        numbers = wide.to(torch.float8_e4m3fn)
        rows, columns = weight.shape
        shape = (rows, 1) if block is None else (-(-rows // block[0]), -(-columns // block[1]))
        shape = (1, 1) if whole else shape
        scale = torch.from_numpy(draw.uniform(1e-4, 1e-3, shape)).float()
        spread = np.kron(scale.double().numpy(), np.ones(block or (1, 1)))[:rows, :columns]
        made = {"weight": numbers, "weight_scale": scale[:, 0] if whole else scale}
        return made | {"input_scale": torch.ones(1)}, numbers.double() * torch.from_numpy(spread)

    return make


def write(
    source: Path, folder: Path, scheme: Scheme, *, keep: str = "embed_tokens", **said: Any
) -> dict[str, torch.Tensor]:
    """Write a checkpoint whose matrices are in a scheme; return their values by name.

    Matrices whose names have ``keep`` in them stay as they are.
    """
    shutil.copytree(source, folder, dirs_exist_ok=True)
    tensors, values = load_file(source / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        if tensor.dim() == 2 and keep not in name:
            made, values[name] = scheme(tensor)
            del tensors[name]
            tensors |= {name.removesuffix("weight") + end: part for end, part in made.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text("utf-8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
        **said,
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return values


@pytest.mark.parametrize(
    ("scheme", "format", "error"),
    [
        (grouped(4, 32), INT4, 0),
        (grouped(4, 96), INT4, 0),
        (grouped(4, None), INT4, 0),
        # Float16 rounds scale times zero point, which is at most twice a row's largest value.
        (grouped(4, 64, asymmetric=True), Q4_1, 2**-10),
        (grouped(4, 16), DENSE, 0),
        (grouped(8, 64), Q8_0, 0),
        (grouped(8, None), INT8, 0),
        (whole_rows, INT8, 0),
        # As far from it as 8-bit integers by rows are.
        (floats(None), INT8, 1 / 250),
        (floats(None, whole=True), INT8, 1 / 250),
        (floats((128, 128)), INT8, 1 / 250),
    ],
)
def test_every_value_is_the_layouts(
    tiny: Path, tmp_path: Path, scheme: Scheme, format: Format, error: float
) -> None:
    values = write(tiny, tmp_path, scheme)
    model = lfm2_fast.load(tmp_path, device="cpu", dtype="float32")
    layer = model.network.layers[2]
    assert layer.self_attn.qkv_proj.format is layer.feed_forward.down_proj.format is format
    assert model.network.embed_tokens.format is DENSE
    pairs = {
        "conv.in_proj": (0, ["conv.in_proj"]),
        "self_attn.qkv_proj": (2, [f"self_attn.{each}_proj" for each in "qkv"]),
        "feed_forward.gate_up_proj": (2, ["feed_forward.w1", "feed_forward.w3"]),
        "feed_forward.down_proj": (5, ["feed_forward.w2"]),
    }
    for ours, (i, theirs) in pairs.items():
        found = model.network.get_submodule(f"layers.{i}.{ours}").dequantized(torch.float64)
        wanted = torch.cat([values[f"model.layers.{i}.{each}.weight"] for each in theirs])
        most = wanted.abs().amax(1, keepdim=True)
        allowed = most * error if error else wanted.abs() * 2**-23
        assert ((found - wanted).abs() <= allowed).all(), ours
    assert model(PROMPT).logits.isfinite().all()


def test_it_is_saved_noted_and_never_quantized_twice(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tiny, tmp_path / "a", floats(None), format="float-quantized")
    model = lfm2_fast.load(tmp_path / "a", device="cpu")
    assert model.dtype == torch.bfloat16
    assert caplog.messages[-1].endswith(": 24 matrices of FP8 as int8")
    assert caplog.records[-1].levelno == logging.WARNING
    assert "weight_bytes" not in checkpoint_facts(str(tmp_path / "a"))["model"]
    model.save_pretrained(tmp_path / "b")
    again = lfm2_fast.load(tmp_path / "b", device="cpu")
    assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)
    write(tiny, tmp_path / "c", grouped(4, 16))
    dense = lfm2_fast.load(tmp_path / "c", device="cpu")
    dense.save_pretrained(tmp_path / "d")
    again = lfm2_fast.load(tmp_path / "d", device="cpu")
    assert again.network.config.quantization is None
    assert torch.equal(again(PROMPT).logits, dense(PROMPT).logits)
    with pytest.raises(
        ValueError, match="'int4': .* is already quantized .*leave quantization out"
    ):
        lfm2_fast.load(tmp_path / "a", device="cpu", quantization="int4")


def test_parts_that_stay_dense_make_their_matrix_dense(tiny: Path, tmp_path: Path) -> None:
    values = write(tiny, tmp_path, grouped(4, 32), keep="q_proj")
    found = lfm2_fast.load(tmp_path, device="cpu", dtype="float32").network.layers[2].self_attn
    assert found.qkv_proj.format is DENSE and found.out_proj.format is INT4
    rows = found.qkv_proj.weight[-len(values["model.layers.2.self_attn.v_proj.weight"]) :]
    assert torch.equal(rows.double(), values["model.layers.2.self_attn.v_proj.weight"])


@pytest.mark.parametrize(
    ("said", "changed", "message"),
    [
        ({"format": "nvfp4-pack-quantized"}, {}, "format 'nvfp4-pack-quantized' .*GGUF file of it"),
        ({"format": "marlin-24"}, {}, "format 'marlin-24'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, {}, "sparsity_config"),
        ({"transform_config": {"config_groups": {"u": {}}}}, {}, "transform_config"),
        ({}, {"weight_g_idx": torch.zeros(192, dtype=torch.int32)}, "actorder 'group'"),
        ({}, {"weight_scale": torch.ones(7, 5)}, r"scales of shape \[7, 5\]"),
        ({}, {"weight_packed": torch.ones(192, 9, dtype=torch.int32)}, "not in 4 or 8 bits"),
        ({}, {"weight_zero_point": torch.ones(3, 3)}, "zero points as F32"),
        (
            {},
            {"weight_global_scale": torch.ones(1)},
            "weight_global_scale.*, which lfm2_fast does not know",
        ),
    ],
)
def test_others_are_refused_by_name(
    tiny: Path, tmp_path: Path, said: dict[str, Any], changed: Tensors, message: str
) -> None:
    def scheme(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        made, values = grouped(4, 32)(weight)
        return made | {name: part.clone() for name, part in changed.items()}, values

    write(tiny, tmp_path, scheme, **said)
    with pytest.raises(CheckpointError, match=message) as error:
        lfm2_fast.load(tmp_path, device="cpu")
    assert str(tmp_path) in str(error.value)
