"""GGUF's blocks as our formats: every number equal to what the package gguf reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lfm2_fast.config_values import CheckpointError
from lfm2_fast.weights import formats, gguf_blocks
from lfm2_fast.weights.formats import INT4

quants = pytest.importorskip("gguf.quants")
# Where a block has float16 words; all its other bytes may be anything.
WORDS = {"Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
ROWS, COLUMNS = 21, 512


def blocks_of(type: str) -> np.ndarray:
    """Return random blocks ``[ROWS, bytes]`` whose scales are finite."""
    _, numbers, size = gguf_blocks.TYPES[type]
    draw = np.random.default_rng(0)
    made = draw.integers(0, 256, (ROWS, COLUMNS // numbers, size), dtype=np.uint8)
    for at in WORDS.get(type, [0]):
        words = draw.standard_normal((*made.shape[:2], 1)).astype(np.float16)
        made[..., at : at + 2] = words.view(np.uint8)
    return made.reshape(ROWS, -1)


@pytest.mark.parametrize("type", gguf_blocks.TYPES)
def test_values_are_ggufs(type: str) -> None:
    from gguf import GGMLQuantizationType

    blocks = blocks_of(type)
    wanted = torch.from_numpy(quants.dequantize(blocks, GGMLQuantizationType[type]))
    format = gguf_blocks.TYPES[type][0]
    parts = gguf_blocks.parts_of(type, torch.from_numpy(blocks))
    for (shape, dtype), part in zip(format.parts((ROWS, COLUMNS)).values(), parts, strict=True):
        assert part.shape == shape and part.dtype == dtype
    assert torch.equal(format.dequantize(parts, torch.float32), wanted)
    wide = gguf_blocks.to_wide(format, parts)
    assert torch.equal(formats.WIDE.dequantize(wide, torch.float32), wanted)
    held = [part.clone() for part in parts]
    format.interleave(held)
    assert torch.equal(format.matrix(held, torch.float32), wanted)
    places = torch.tensor([20, 3, 0, 3])
    assert torch.equal(format.rows(held, places, torch.float32), wanted[places])
    assert all(torch.equal(a, b) for a, b in zip(format.stored(held), parts, strict=True))


@pytest.mark.parametrize("type", gguf_blocks.TYPES)
def test_memory_beside_the_file(type: str) -> None:
    format, numbers, size = gguf_blocks.TYPES[type]
    held = sum(shape[1] * dtype.itemsize for shape, dtype in format.parts((1, COLUMNS)).values())
    most = {"Q6_K": 1.45, "Q5_K": 1.6, "Q5_0": 1.6, "Q5_1": 1.6}.get(type, 1.25)
    assert held <= most * size * COLUMNS / numbers


def test_int4_is_q4_0_byte_for_byte() -> None:
    from gguf import GGMLQuantizationType

    draw = np.random.default_rng(1)
    scales = 2.0 ** draw.integers(-20, 12, (300, 8)).repeat(32, 1)
    weight = (draw.standard_normal((300, 256)) * scales).astype(np.float32)
    weight[0] = 0
    weight[1] = np.where(np.arange(256) % 2, 0.5, -0.5)  # equal magnitudes: the first decides
    wanted = torch.from_numpy(quants.quantize(weight, GGMLQuantizationType.Q4_0))
    found = INT4.quantize(torch.from_numpy(weight))
    for part, same in zip(found, gguf_blocks.parts_of("Q4_0", wanted), strict=True):
        assert torch.equal(part.view(torch.uint8), same.view(torch.uint8))


def test_unknown_types_and_partial_blocks_are_refused() -> None:
    with pytest.raises(CheckpointError, match="IQ4_NL is not one of Q4_0"):
        gguf_blocks.parts_of("IQ4_NL", torch.zeros(2, 18, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="19 bytes are not whole blocks of Q4_0"):
        gguf_blocks.parts_of("Q4_0", torch.zeros(2, 19, dtype=torch.uint8))
