"""GGUF file as a checkpoint: the formats of its matrices, and our fused tensors."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lfm2_fast.config import Config
from lfm2_fast.config_values import CheckpointError
from lfm2_fast.weights.checkpoint import fill_table
from lfm2_fast.weights.formats import DENSE, MIXED, WIDE, Format
from lfm2_fast.weights.fusion import Fused, formats_of, fusion_table
from lfm2_fast.weights.gguf_blocks import TYPES, parts_of, to_wide
from lfm2_fast.weights.gguf_config import FLOATS
from lfm2_fast.weights.gguf_file import GGUFFile, GGUFTensor, require_gguf
from lfm2_fast.weights.safetensors_files import BLOCK, shortened

logger = logging.getLogger(__name__)

# Types that need a number beside the tensor, or that no weight has.
REFUSED = {"NVFP4", "Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}


@dataclass(frozen=True)
class _Source:
    """Tensor of a file under Hugging Face's name, as ``fill_table`` reads it."""

    stored: GGUFTensor
    name: str
    shape: tuple[int, ...]

    @property
    def type(self) -> str:
        return self.stored.type

    def fill(self, target: Format, places: Sequence[torch.Tensor]) -> None:
        """Fill the parts ``places`` of the ``target`` format; types that it holds are moved."""
        for here, raw in self._bytes():
            if self.type in TYPES and target in (TYPES[self.type][0], WIDE):
                made: tuple[torch.Tensor, ...] = parts_of(self.type, raw)
                if target is WIDE:
                    made = to_wide(TYPES[self.type][0], made)
            else:
                made = target.quantize(self._values(raw).to(places[0].device))
            for place, part in zip(places, made, strict=True):
                place[here] = part

    def copy_to(self, place: torch.Tensor) -> None:
        """Copy the values into ``place``, a vector's or a dense matrix's."""
        for here, raw in self._bytes():
            rows = place if place.dim() == 1 else place[here]
            rows.copy_(self._values(raw).reshape(rows.shape))

    def _bytes(self) -> Any:
        """Yield some rows of bytes at a time, each with their place."""
        whole = self.stored.raw()
        count = max(1, BLOCK // self.stored.shape[-1])
        for first in range(0, len(whole), count):
            # A copy, because torch warns of read-only memory.
            yield slice(first, first + count), torch.from_numpy(whole[first : first + count].copy())

    def _values(self, raw: torch.Tensor) -> torch.Tensor:
        if self.type in FLOATS:
            return raw.view(FLOATS[self.type])
        gguf = require_gguf()
        made = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[self.type])
        return torch.from_numpy(made)


def with_formats(file: GGUFFile, config: Config) -> Config:
    """Return ``config`` with a format for every matrix of the file that can be kept exactly.

    Parts that are stacked have one format: their common one, or ``WIDE``, which holds each.
    """
    dense = replace(config, quantization=None, formats=())
    table = fusion_table(dense)
    sources, formats = _sources(file, table), {}
    for name, fused in table.items():
        types = {sources[part.name].type for part in fused.parts}
        if fused.is_matrix and types <= TYPES.keys():
            each = {TYPES[type][0] for type in types}
            formats[name] = (each.pop() if len(each) == 1 else WIDE).name or ""
    if not formats:
        return dense
    return replace(dense, quantization=MIXED.name, formats=tuple(formats.items()))


def load_weights(
    file: GGUFFile,
    config: Config,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str | None = None,
) -> dict[str, torch.Tensor]:
    """Return our fused tensors by name; vectors and dense matrices in ``dtype``, on ``device``.

    ``config`` is from ``with_formats``: matrices in its formats are moved, and no number of them
    changes. ``quantization`` converts a file of dense matrices while it is read. A note says which
    types were kept and which converted. Raises CheckpointError for tensors that do not fit.
    """
    table = fusion_table(replace(config, quantization=None, formats=()))
    sources = _sources(file, table)
    wanted = replace(config, quantization=config.quantization or quantization)
    _note(file, table, sources, formats_of(wanted), dtype)
    return fill_table(table, wanted, sources, device=device, dtype=dtype)


def _note(
    file: GGUFFile,
    table: Mapping[str, Fused],
    sources: Mapping[str, _Source],
    formats: Mapping[str, Format],
    dtype: torch.dtype,
) -> None:
    """Log which types of matrices are kept exactly, and the targets of the others.

    It is a warning if the file has types without a format here, which take more memory.
    """
    kept: Counter[str] = Counter()
    converted: dict[str, Counter[str]] = {}
    for name, fused in table.items():
        for part in fused.parts if fused.is_matrix else ():
            type, target = sources[part.name].type, formats[name]
            exact = type in TYPES if target is not DENSE else FLOATS.get(type) == dtype
            into = target.name or str(dtype).removeprefix("torch.")
            (kept if exact else converted.setdefault(into, Counter()))[type] += 1
    words = [f"{_counted(kept)} kept exactly"] if kept else []
    words += [f"{_counted(types)} converted to {into}" for into, types in converted.items()]
    widened = any(type not in FLOATS for types in converted.values() for type in types)
    level = logging.WARNING if widened else logging.INFO
    logger.log(level, "%s: %s", file.path, "; ".join(words))


def _counted(types: Counter[str]) -> str:
    return ", ".join(f"{count} {type}" for type, count in types.most_common())


def gguf_names(table: Mapping[str, Fused], layers: int) -> dict[str, str]:
    """Return GGUF's name of each of Hugging Face's tensors, as llama.cpp's converter gives it."""
    gguf = require_gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LFM2, layers)
    parts = [part.name for fused in table.values() for part in fused.parts]
    return {name: names.get_name(name, (".weight", ".bias")) for name in parts}


def _sources(file: GGUFFile, table: Mapping[str, Fused]) -> dict[str, _Source]:
    """Return the file's tensors by Hugging Face's names.

    Raises CheckpointError for tensors that are missing, unknown, of another shape, or of a type
    that is not read.
    """
    parts = {part.name: part for fused in table.values() for part in fused.parts}
    layers = 1 + max(int(name.split(".")[2]) for name in parts if ".layers." in name)
    names = gguf_names(table, layers)
    if "output_norm.weight" in file.tensors:  # of older files
        names = {ours: _old(name) for ours, name in names.items()}
    missing = [name for name in names.values() if name not in file.tensors]
    if missing:
        raise CheckpointError(
            f"{file.path} lacks {shortened(missing)}, which its metadata ask for; the file is "
            "incomplete, or belongs to another model"
        )
    unknown = sorted(file.tensors.keys() - set(names.values()))
    if unknown:
        raise CheckpointError(
            f"{file.path} holds {shortened(unknown)}, which an LFM2 of this kind does not have; "
            "use llama.cpp for this file"
        )
    found = {}
    for ours, theirs in names.items():
        stored, part = file.tensors[theirs], parts[ours]
        # A convolution's taps are [H, W] there.
        shape = tuple(n for i, n in enumerate(part.shape) if not (len(part.shape) == 3 and i == 1))
        if stored.shape != shape:
            raise CheckpointError(
                f"{file.path}: {theirs} has shape {list(stored.shape)}, and the metadata ask for "
                f"{list(shape)}"
            )
        if stored.type in REFUSED:
            raise CheckpointError(
                f"{file.path}: {theirs} is stored as {stored.type}, which lfm2_fast does not read; "
                "take a file of Q4_0, Q4_K_M, Q5_K_M, Q6_K, Q8_0, F16 or BF16"
            )
        found[ours] = _Source(stored, theirs, part.shape)
    return found


def _old(name: str) -> str:
    return name.replace("token_embd_norm", "output_norm")


def check_quantization(file: GGUFFile, config: Config, quantization: str | None) -> None:
    """Raise ValueError if ``quantization`` is given for a file that is already quantized."""
    if quantization is not None and config.quantization is not None:
        types = Counter(t.type for t in file.tensors.values() if t.type not in FLOATS)
        raise ValueError(
            f"quantization={quantization!r}: {file.path} is already quantized ({_counted(types)}), "
            "and is used as it is; leave quantization out, or give a file in F16 or BF16"
        )
