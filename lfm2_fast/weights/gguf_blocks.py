"""Blocks of GGUF files as parts of our formats: bits are moved, and no number changes.

Blocks are ``[n, bytes of a row]`` uint8, as a file has them. Parts are rows, not yet interleaved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lfm2_fast.config_values import CheckpointError
from lfm2_fast.weights import formats
from lfm2_fast.weights.formats import Groups, pack4, unpack4

# GGUF's type -> our format, the numbers of a block, and its bytes.
TYPES: dict[str, tuple[Groups, int, int]] = {
    "Q4_0": (formats.INT4, 32, 18),
    "Q4_1": (formats.Q4_1, 32, 20),
    "Q5_0": (formats.Q8_0, 32, 22),
    "Q5_1": (formats.Q5_1, 32, 24),
    "Q8_0": (formats.Q8_0, 32, 34),
    "Q4_K": (formats.Q4_K, 256, 144),
    "Q5_K": (formats.Q5_K, 256, 176),
    "Q6_K": (formats.Q6_K, 256, 210),
}


def parts_of(type: str, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return numbers and scales of the format ``TYPES[type]``, from blocks of that type.

    Raises CheckpointError for an unknown type, or rows that are not whole blocks.
    """
    if type not in TYPES:
        raise CheckpointError(f"GGUF type {type} is not one of {', '.join(TYPES)}")
    size = TYPES[type][2]
    if blocks.shape[1] % size:
        raise CheckpointError(
            f"rows of {blocks.shape[1]} bytes are not whole blocks of {type}, which have {size}"
        )
    each = blocks.unflatten(1, (-1, size))
    if type in ("Q4_0", "Q4_1", "Q8_0"):
        words = 2 if type == "Q4_1" else 1
        scales, numbers = each[..., : 2 * words], each[..., 2 * words :]
        if type == "Q8_0":
            numbers = numbers.view(torch.int8)
        return numbers.flatten(1), _halves(scales)
    if type in ("Q5_0", "Q5_1"):
        words = 2 if type == "Q5_1" else 1
        scales, high, low = each.split([2 * words, 4, 16], -1)
        bits = high[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
        numbers = unpack4(low.flatten(1)) | bits.flatten(1) << 4
        made = numbers.view(torch.int8)
        return made - 16 if type == "Q5_0" else made, _halves(scales)
    if type == "Q6_K":
        return _q6_k(each)
    return _with_minimums(each, type)


def to_wide(format: Groups, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same matrix in format ``wide``, from its parts in ``format``.

    So stacked matrices have one format, although a file has them in several.
    """
    numbers, words = parts
    values = unpack4(numbers) if format.bits == 4 else numbers
    scale, minimum = format.group_scales(words, torch.float32)
    both = torch.stack([scale, torch.zeros_like(scale) if minimum is None else minimum], -1)
    both = both.repeat_interleave(format.group // formats.WIDE.group, 1)
    return values.to(torch.int8) - format.offset, both.flatten(1)


def _halves(raw: torch.Tensor) -> torch.Tensor:
    """Return the float16 words of bytes ``[n, blocks, b]``, a row's one after another."""
    return raw.flatten(1).contiguous().view(torch.float16)


def _with_minimums(blocks: torch.Tensor, type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the parts of Q4_K or Q5_K: six bits a scale or minimum, 12 bytes for eight of each.

    Our format adds a minimum and GGUF subtracts it, so its float16 factor changes its sign.
    """
    high_bytes = 32 if type == "Q5_K" else 0
    factors, small, high, low = blocks.split([4, 12, high_bytes, 128], -1)
    a, b, c = small.split(4, -1)
    scales = torch.cat([a & 0x3F, c & 0x0F | a >> 2 & 0x30], -1)
    minimums = torch.cat([b & 0x3F, c >> 4 | b >> 2 & 0x30], -1)
    factors = factors.clone()
    factors[..., 3] ^= 0x80
    words = torch.cat([factors, scales, minimums], -1).flatten(1)
    # Each 32 bytes have two groups, one in their lower and one in their upper bits.
    chunks = low.unflatten(-1, (4, 1, 32))
    numbers = torch.cat([chunks & 0x0F, chunks >> 4], -2).flatten(-3)
    if type == "Q4_K":
        return pack4(numbers.flatten(1)), words
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    numbers = numbers | (high[..., None, :] >> shifts & 1).flatten(-2) << 4
    return numbers.flatten(1).view(torch.int8), words


def _q6_k(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the parts of Q6_K: a signed byte scales sixteen numbers of six bits, less 32."""
    low, high, small, factor = blocks.split([128, 64, 16, 2], -1)
    low = low.unflatten(-1, (2, 1, 64))
    low = torch.cat([low & 0x0F, low >> 4], -2).flatten(-3)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    high = (high.unflatten(-1, (2, 1, 32)) >> shifts & 3).flatten(-3)
    numbers = (low | high << 4).view(torch.int8) - 32
    return numbers.flatten(1), torch.cat([factor, small], -1).flatten(1)
