"""Checkpoints: a folder -> checked, fused tensors on their device; and back."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import mmap
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lfm2_fast.config import Config
from lfm2_fast.weights.adapter import Adapter
from lfm2_fast.weights.adapter_merge import merged_config, merged_tensors
from lfm2_fast.weights.formats import DENSE, Source, find_format
from lfm2_fast.weights.fusion import (
    EMBEDDING,
    HEAD,
    Fused,
    dtype_tensor,
    formats_of,
    fusion_table,
    interleave,
)
from lfm2_fast.weights.safetensors_files import (
    BLOCK,
    FLOATS,
    INDEX,
    checked_tensors,
    open_tensors,
    variant_of,
)

T = TypeVar("T")
logger = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
# Most bytes of a piece of memory that several weights share. It is freed with the last of them.
AREA = 1 << 28
# Weights begin at a cache line of the processor.
LINE = 64


def load_weights(
    folder: Path,
    config: Config,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    quantization: str | None = None,
    variant: str | None = None,
    adapter: Adapter | None = None,
) -> dict[str, torch.Tensor]:
    """Load our fused tensors, by name, in ``dtype`` (None: the stored one) on ``device``.

    If the tensors are stored in several dtypes, None means the embedding's, or the last norm's if
    the embedding is quantized. The files are mapped, and every tensor is copied from the map
    straight into its place. With ``quantization`` the matrices of a dense checkpoint become that
    format on the way; those of a quantized one (``config.quantization``) stay as they are. An
    ``adapter`` is merged into a dense checkpoint on the way; the result has ``merged_config``. All
    names, shapes and dtypes are checked before the first copy. Raises CheckpointError, which names
    the file and the tensor, for any that is wrong.
    """
    table = fusion_table(config)
    found = checked_tensors(folder, config, table, variant)
    if dtype is None:
        dtype = FLOATS[found[table[dtype_tensor(table)].parts[0].name].dtype]
    tensors: Mapping[str, Source] = found
    if adapter is not None:
        tensors = merged_tensors(found, config, adapter)
        config = merged_config(config, adapter)
        table = fusion_table(config)
    wanted = replace(config, quantization=config.quantization or quantization)
    return fill_table(table, wanted, tensors, device=device, dtype=dtype)


def fill_table(
    table: Mapping[str, Fused],
    config: Config,
    found: Mapping[str, Source],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Return our fused tensors on ``device``, read from ``found``, the tensors by their HF names.

    Dense matrices of ``table`` are converted to the formats of ``config``. All others are copied.
    """
    formats = formats_of(config)
    targets, wanted = {}, {}
    for name, fused in table.items():
        target = formats[name] if fused.is_matrix else DENSE
        converts = fused.is_matrix and fused.format is DENSE and target is not DENSE
        parts = target.parts(fused.shape) if converts else {"": (fused.shape, fused.dtype)}
        targets[name] = target if converts else None, [name + suffix for suffix in parts]
        for suffix, (shape, own) in parts.items():
            wanted[name + suffix] = shape, own or dtype
    weights = _empty(wanted, device)
    with progress(table.items()) as tensors:
        for name, fused in tensors:
            format, made = targets[name]
            first = 0
            for part in fused.parts:
                places = [weights[each][first : first + part.rows] for each in made]
                if format is not None:
                    found[part.name].fill(format, places)
                    _trim()
                else:
                    found[part.name].copy_to(places[0])
                first += part.rows
    interleave(config, weights)
    return weights


def with_stored_head(folder: Path, config: Config, variant: str | None = None) -> Config:
    """Return ``config``, untied if the checkpoint has a head that differs from the embedding.

    A config may say that they are tied although the head was tuned separately. The weights decide,
    as in Hugging Face's class, and a warning says so.
    """
    whole = variant_of(find_format(config.quantization, folder / "config.json").file, variant)
    if not config.tie_word_embeddings or config.quantization is not None:
        return config
    found = open_tensors(folder, whole, variant_of(INDEX, variant))
    embedding = fusion_table(config)[EMBEDDING].parts[0]
    head, table = found.get(HEAD), found.get(embedding.name, found.get(embedding.base_name))
    if head is None or table is None or head.shape != table.shape:
        return config
    rows = max(1, BLOCK // head.shape[1])
    pairs = zip(head.blocks(rows), table.blocks(rows), strict=True)
    if all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in pairs):
        return config
    logger.warning(
        "%s: config.json says tie_word_embeddings, but %s differs from the embedding; it is used",
        head.path,
        HEAD,
    )
    return replace(config, tie_word_embeddings=False)


def progress(
    tensors: Collection[T], what: str = "loading weights"
) -> AbstractContextManager[Iterable[T]]:
    """Wrap ``tensors`` in a progress bar on a terminal if they take long and tqdm is installed."""
    with suppress(ImportError):
        from tqdm import tqdm

        return tqdm(tensors, desc=what, unit="tensor", delay=1.0, leave=False, disable=None)
    return nullcontext(tensors)


def _empty(
    wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device
) -> dict[str, torch.Tensor]:
    """Allocate memory for weights; on a CPU in large pages, if the system has them.

    A matrix is then read faster: fewer addresses are translated, and the processor's prefetch,
    which stops at the end of a page, goes further. The system gives a large page only inside of one
    piece of memory, so weights lie side by side in few pieces. Each is a storage of its own.
    """
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in wanted.items()
        }
    pieces: list[dict[str, int]] = []  # where each weight begins in a piece
    end = AREA
    for name, (shape, dtype) in wanted.items():
        size = math.prod(shape) * dtype.itemsize
        if end + size > AREA:
            pieces.append({})
            end = 0
        pieces[-1][name] = end
        end += -(-size // LINE) * LINE
    made = {}
    for starts in pieces:
        last, start = list(starts.items())[-1]
        shape, dtype = wanted[last]
        size = start + math.prod(shape) * dtype.itemsize
        area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without large pages; the memory works anyway
            area.madvise(mmap.MADV_HUGEPAGE)
        for name, start in starts.items():
            shape, dtype = wanted[name]
            flat = torch.frombuffer(area, dtype=dtype, count=math.prod(shape), offset=start)
            made[name] = flat.view(shape)
    return made


def save(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    format: str | None,
    dtype: torch.dtype,
    generation_config: Mapping[str, Any],
    variant: str | None = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """Write ``tensors``, by Hugging Face's names, as a checkpoint for Hugging Face.

    ``config`` becomes config.json, ``format`` names the weight format. Weights of more than
    ``max_shard_size`` are split into files with an index. Every file is complete before it gets its
    name, so a full disk damages no earlier file. Weights of an earlier save that a loader would
    confuse with these are removed last. Raises OSError for errors of the file system.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder.mkdir(parents=True, exist_ok=True)
    whole = find_format(format).file
    stem, _, ending = variant_of(whole, variant).rpartition(".")
    shards = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern=f"{stem}{{suffix}}.{ending}", max_shard_size=max_shard_size
    )
    for file, names in shards.filename_to_tensors.items():
        target = folder / file
        with complete(target) as path:
            try:
                own = {name: tensors[name].contiguous() for name in names}
                save_file(own, path, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"could not write {target}: {error}") from error
    index = variant_of(INDEX, variant)
    stored = str(dtype).removeprefix("torch.")
    documents: dict[str, Any] = {"config.json": {**config, "dtype": stored, "torch_dtype": stored}}
    if generation_config:
        documents[GENERATION_CONFIG] = dict(generation_config)
    if shards.is_sharded:
        documents[index] = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    for name, document in documents.items():
        with complete(folder / name) as path:
            path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    # Loaders prefer a whole file to an index, and look for an index beside it.
    stale = (folder / variant_of(whole, variant)) if shards.is_sharded else (folder / index)
    stale.unlink(missing_ok=True)


@contextmanager
def complete(path: Path) -> Iterator[Path]:
    """Give a temporary path. It replaces ``path`` if the block succeeds, and is removed if not."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _trim() -> None:
    """Return freed memory to the system; glibc would keep gigabytes. Other C libraries lack it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
