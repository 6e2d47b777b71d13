"""Checkpoints quantized by compressed-tensors (FP8, integers of 4 or 8 bits) in our formats.

A quantized matrix ``[N, K]`` is a few tensors, by the name of its module:

    weight_packed  int32 [N, K / 8] of 4 bits, [N, K / 4] of 8, lowest first, half the range added
    weight         float8 or int8 [N, K]
    weight_scale   [1], [N, 1], [N, groups of K], or one for each block of rows and columns
    weight_zero_point  int8 as weight_scale, or packed along N beside weight_packed

Its values are ``scale * (q - zero_point)``. Rounding of activations is left out.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lfm2_fast.config import OTHER_METHOD as METHOD
from lfm2_fast.config import Config
from lfm2_fast.config_values import CheckpointError, read_json
from lfm2_fast.weights.checkpoint import fill_table, with_stored_head
from lfm2_fast.weights.formats import DENSE, INT4, INT8, MIXED, Q4_1, Q8_0, Format, pack4
from lfm2_fast.weights.fusion import EMBEDDING, Fused, fusion_table
from lfm2_fast.weights.safetensors_files import (
    BLOCK,
    FLOATS,
    INDEX,
    Stored,
    open_tensors,
    shortened,
    variant_of,
)

logger = logging.getLogger(__name__)

READ = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
# Tensors of activations and caches, which stay in the model's dtype here.
UNUSED = (".input_scale", ".input_zero_point", ".output_scale", ".k_scale", ".v_scale")
OTHERWISE = (
    "load the unquantized checkpoint, with quantization='int8' or 'int4', or a GGUF file of it"
)


@dataclass(frozen=True)
class _Matrix:
    """Matrix ``[N, K]`` of a file: ``parts`` are its tensors by suffix, and ``bits`` per number.

    ``block`` has the rows and columns that share a scale, where several rows do.
    """

    shape: tuple[int, int]
    parts: Mapping[str, Stored]
    bits: int
    block: tuple[int, int] | None

    @property
    def is_float(self) -> bool:
        return self.bits == 8 and self.parts.get("", self.parts["_scale"]).dtype == "F8_E4M3"

    @property
    def nearest(self) -> Format:
        """Format that holds it exactly, or, of FP8, with as many bits."""
        columns = self.shape[1]
        scales = self.parts["_scale"].shape
        groups = scales[1] if len(scales) == 2 and scales[0] == self.shape[0] else 1
        asymmetric = "_zero_point" in self.parts
        if self.is_float or (self.bits == 8 and groups == 1 and not asymmetric):
            return INT8
        if self.block or columns % 32 or columns // groups % 32 or (asymmetric and self.bits == 8):
            return DENSE
        if self.bits == 8:
            return Q8_0
        return Q4_1 if asymmetric else INT4

    def fill(self, target: Format, places: Sequence[torch.Tensor]) -> None:
        """Fill the parts ``places`` of the ``target`` format, some rows at a time."""
        columns = self.shape[1]
        for here, numbers, scale, zero in self._rows():
            made: tuple[torch.Tensor, ...]
            if target is INT8 and not self.is_float:
                made = numbers.to(torch.int8), scale[:, 0]
            elif target is Q8_0:
                made = numbers.to(torch.int8), _spread(scale, columns // 32).half()
            elif target is INT4:
                made = pack4((numbers + 8).to(torch.uint8)), _spread(scale, columns // 32).half()
            elif target is Q4_1:
                words = torch.stack([scale, -scale * (zero + 8)], -1)
                words = _spread(words, columns // 32).flatten(1).half()
                made = pack4((numbers + 8).to(torch.uint8)), words
            else:
                made = target.quantize(_values(numbers, scale, zero).to(places[0].device))
            for place, part in zip(places, made, strict=True):
                place[here] = part

    def copy_to(self, place: torch.Tensor) -> None:
        """Copy the values into ``place``, a dense matrix's."""
        for here, numbers, scale, zero in self._rows():
            place[here] = _values(numbers, scale, zero).to(place.dtype)

    def _rows(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield places, numbers ``[n, K]``, scales and zero points ``[n, groups]``, in float32."""
        rows, columns = self.shape
        scale = self._by_row(self.parts["_scale"].read().float())
        zero = torch.zeros(1, 1)
        if "_zero_point" in self.parts:
            found = self.parts["_zero_point"].read()
            if found.dtype == torch.int32:  # packed along the rows
                found = _unpack(found.T, self.bits, rows).T
            zero = self._by_row(found.float())
        packed = self.parts.get("_packed")
        for here, part in (packed or self.parts[""]).blocks(max(1, BLOCK // columns)):
            numbers = part if packed is None else _unpack(part, self.bits, columns)
            yield here, numbers.float(), scale[here], zero if len(zero) == 1 else zero[here]

    def _by_row(self, each: torch.Tensor) -> torch.Tensor:
        """Return numbers of groups as ``[N, groups]``."""
        rows, columns = self.shape
        if each.numel() == 1:
            return each.reshape(1, 1).expand(rows, 1)
        each = each.reshape(each.shape[0], -1)
        if self.block is None:
            return each
        each = each.repeat_interleave(self.block[0], 0)[:rows]
        return each.repeat_interleave(self.block[1], 1)[:, :columns]


def _values(numbers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Return ``scale * (numbers - zero)``, ``[n, K]``."""
    columns = numbers.shape[1]
    return (numbers - _spread(zero, columns)) * _spread(scale, columns)


def _spread(each: torch.Tensor, count: int) -> torch.Tensor:
    """Repeat each number along axis 1, so that there are ``count``."""
    return each.repeat_interleave(count // each.shape[1], 1)


def _unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Return the numbers ``[n, columns]`` int8 of words ``[n, columns * bits / 32]``."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    numbers = packed[..., None] >> shifts & (1 << bits) - 1
    return (numbers.flatten(1)[:, :columns] - (1 << bits - 1)).to(torch.int8)


def sources(
    folder: Path, config: Config, variant: str | None = None
) -> tuple[Config, dict[str, Any]]:
    """Return ``config`` with the format of every matrix, and the stored tensors by dense names.

    Raises CheckpointError, which names the method, for a matrix without a format here, and for
    tensors that do not fit.
    """
    block = _check(folder / "config.json")
    dense = with_stored_head(folder, replace(config, quantization=None, formats=()), variant)
    table = fusion_table(dense)
    stored = open_tensors(
        folder, variant_of("model.safetensors", variant), variant_of(INDEX, variant)
    )
    left = {name for name in stored if not name.endswith(UNUSED)}
    found: dict[str, Any] = {}
    for fused in table.values():
        for part in fused.parts:
            parts = {
                suffix: stored[part.name + suffix]
                for suffix in ("", "_packed", "_scale", "_zero_point", "_shape", "_g_idx")
                if part.name + suffix in stored
            }
            left -= {part.name + suffix for suffix in parts}
            found[part.name] = _source(folder, fused, part.name, part.shape, parts, block)
    if left - {"lm_head.weight"}:
        raise CheckpointError(
            f"{folder} holds {shortened(sorted(left))}, which lfm2_fast does not know; {OTHERWISE}"
        )
    formats, words = _formats_of(table, found)
    logger.log(logging.WARNING if "int8" in words else logging.INFO, "%s: %s", folder, words)
    if not formats:
        return dense, found
    return replace(dense, quantization=MIXED.name, formats=tuple(formats.items())), found


def load_weights(
    folder: Path,
    config: Config,
    found: Mapping[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype | None,
) -> dict[str, torch.Tensor]:
    """Return our fused tensors by name; ``config`` and ``found`` are what ``sources`` returned."""
    table = fusion_table(replace(config, quantization=None, formats=()))
    if dtype is None:
        embedding = found[table[EMBEDDING].parts[0].name]
        dtype = FLOATS[embedding.dtype] if isinstance(embedding, Stored) else torch.bfloat16
    return fill_table(table, config, found, device=device, dtype=dtype)


def _check(path: Path) -> tuple[int, int]:
    """Return rows and columns of a block, where scales are by blocks. Raises CheckpointError."""
    found = read_json(path)["quantization_config"]
    groups = found.get("config_groups") or {}
    groups = list(groups.values()) if isinstance(groups, dict) else []
    groups = [group for group in groups if isinstance(group, dict)]
    formats = {found.get("format"), *(group.get("format") for group in groups)} - {None}
    for format in sorted(map(str, formats)):
        if format not in READ:
            raise CheckpointError(
                f"{path}: weights are in the format {format!r} of {METHOD}, which lfm2_fast does "
                f"not read (it has {', '.join(READ)}); {OTHERWISE}"
            )
    for name in ("sparsity_config", "transform_config"):
        said = found.get(name)
        if said and not (isinstance(said, dict) and said.get("format") == "dense"):
            raise CheckpointError(
                f"{path}: {METHOD}'s {name} is {str(said)[:80]}, which lfm2_fast does not run; "
                f"{OTHERWISE}"
            )
    for group in groups:
        block = (group.get("weights") or {}).get("block_structure")
        if isinstance(block, list) and len(block) == 2 and all(type(n) is int for n in block):
            return max(1, block[0]), max(1, block[1])
    return 128, 128


def _source(
    folder: Path,
    fused: Fused,
    name: str,
    shape: tuple[int, ...],
    parts: dict[str, Stored],
    block: tuple[int, int],
) -> Any:
    """Return a tensor as ``fill_table`` reads it. Raises CheckpointError if it does not fit."""

    def error(message: str) -> CheckpointError:
        return CheckpointError(f"{folder}: {name} {message}; {OTHERWISE}")

    plain = parts.get("")
    if plain is not None and plain.dtype in FLOATS and "_scale" not in parts:
        if plain.shape != shape:
            raise error(f"has shape {list(plain.shape)}, and config.json asks for {list(shape)}")
        return plain
    if not parts:
        raise error("is missing")
    if not fused.is_matrix or "_scale" not in parts or (plain is None) == ("_packed" not in parts):
        raise error(f"is stored as {', '.join(sorted(name + s for s in parts))}")
    if "_g_idx" in parts:
        raise error("has columns in groups by an order of their own (actorder 'group')")
    rows, columns = shape
    packed, scales = parts.get("_packed"), parts["_scale"]
    bits = 8
    if packed is not None:
        bits = packed.shape[-1] * 32 // columns if len(packed.shape) == 2 else 0
        if (
            packed.dtype != "I32"
            or bits not in (4, 8)
            or packed.shape != (rows, columns * bits // 32)
        ):
            raise error(f"is packed as {packed.dtype} {list(packed.shape)}, not in 4 or 8 bits")
    elif plain is not None and (plain.shape != shape or plain.dtype not in ("F8_E4M3", "I8")):
        raise error(f"is stored as {plain.dtype} {list(plain.shape)}")
    wide = scales.shape if len(scales.shape) == 2 else (*scales.shape, 1)[:2]
    by_block = None
    if math.prod(scales.shape) != 1 and (wide[0] != rows or columns % wide[1]):
        by_block = block
        if tuple(wide) != (-(-rows // block[0]), -(-columns // block[1])):
            raise error(f"has scales of shape {list(scales.shape)}")
    if scales.dtype not in FLOATS:
        raise error(f"has scales in {scales.dtype}")
    zero = parts.get("_zero_point")
    if zero is not None:
        expected = {tuple(scales.shape): "I8"}
        if packed is not None and len(scales.shape) == 2:
            expected = {(-(-rows * bits // 32), scales.shape[1]): "I32"} | expected
        if expected.get(tuple(zero.shape)) != zero.dtype:
            raise error(f"has zero points as {zero.dtype} {list(zero.shape)}")
    return _Matrix((rows, columns), parts, bits, by_block)


def _formats_of(table: Mapping[str, Fused], found: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Return the format of every matrix that is not dense, and a sentence about all of them."""
    formats, kinds = {}, Counter[str]()
    for name, fused in table.items():
        each = [found[part.name] for part in fused.parts]
        quantized = [one for one in each if isinstance(one, _Matrix)]
        if not quantized:
            continue
        nearest = {one.nearest for one in quantized}
        target = nearest.pop() if len(nearest) == 1 and len(quantized) == len(each) else DENSE
        if target.name is not None:
            formats[name] = target.name
        stored = "FP8" if quantized[0].is_float else f"{quantized[0].bits}-bit"
        kinds[f"{stored} as {target.name or 'dense ones'}"] += 1
    words = ", ".join(f"{count} matrices of {kind}" for kind, count in kinds.most_common())
    return formats, words or "no matrix is quantized"
