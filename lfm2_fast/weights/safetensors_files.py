"""Tensors of a folder's safetensors files, by Hugging Face's names, and checks that they fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lfm2_fast.config import Config
from lfm2_fast.config_values import FETCH_AGAIN, CheckpointError, read_json
from lfm2_fast.weights.formats import Format, find_format
from lfm2_fast.weights.fusion import HEAD, Fused

INDEX = "model.safetensors.index.json"
# Numbers that are quantized at once: few enough to stay in the processor's caches.
BLOCK = 1 << 18
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Safetensors' names of the integers that formats store.
INTEGERS = {torch.int8: {"I8"}, torch.uint8: {"U8"}}


def variant_of(name: str, variant: str | None) -> str:
    """Return a file's name with a variant in it, as Hugging Face spells it.

    >>> variant_of("model.safetensors", "fp16")
    'model.fp16.safetensors'
    """
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}" if variant else name


@dataclass(frozen=True)
class Stored:
    """Tensor in a safetensors file.

    The file is mapped again for every tensor. Pages that were read through a map count as memory of
    this process until the map is closed. With one map they would grow to the size of the file.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> torch.Tensor:
        with _readable(self.path):
            return _open(self.path).get_tensor(self.name)

    def copy_to(self, place: torch.Tensor) -> None:
        """Copy the values into ``place``."""
        place.copy_(self.read().reshape(place.shape))

    def fill(self, target: Format, places: Sequence[torch.Tensor]) -> None:
        """Fill the parts ``places`` of the ``target`` format, some rows at a time."""
        target.fill(places, self.blocks(max(1, BLOCK // self.shape[1])))

    def blocks(self, rows: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield some rows at a time, each block with its place."""
        with _readable(self.path):
            stored = _open(self.path).get_slice(self.name)
        for first in range(0, self.shape[0], rows):
            here = slice(first, first + rows)
            yield here, stored[here]


def _open(path: Path) -> Any:
    """Open and map a safetensors file. Raises CheckpointError if it is not one."""
    with _readable(path):
        return safe_open(path, framework="pt", device="cpu")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn errors of reading a safetensors file into a CheckpointError."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({error}); {FETCH_AGAIN}") from error


def open_tensors(folder: Path, whole: str, listing: str) -> dict[str, Stored]:
    """Return every tensor of the folder's safetensors files, by Hugging Face's name."""
    index = folder / listing
    if (folder / whole).is_file():  # like Hugging Face, prefer one file to an index
        names = [whole]
    elif index.is_file():
        names = shards(index)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {shortened(missing)}, which {listing} names; {FETCH_AGAIN}"
            )
    else:
        raise CheckpointError(
            f"{folder} holds neither {whole} nor {listing}; lfm2_fast reads safetensors only"
        )
    tensors = {}
    for name in names:
        path = folder / name
        file = _open(path)
        for key in file.keys():
            header = file.get_slice(key)
            tensors[key] = Stored(path, key, tuple(header.get_shape()), header.get_dtype())
    return tensors


def checked_tensors(
    folder: Path, config: Config, table: dict[str, Fused], variant: str | None
) -> dict[str, Stored]:
    """Return the tensors that ``config`` asks for, by Hugging Face's names.

    Raises CheckpointError, which names the file and the tensor, for any that is wrong.
    """
    whole = variant_of(find_format(config.quantization, folder / "config.json").file, variant)
    found = _with_a_head(table, open_tensors(folder, whole, variant_of(INDEX, variant)))
    _check_tensors(folder, config, table, found)
    return found


def shards(index: Path) -> list[str]:
    """Return the files that ``index`` names. Raises CheckpointError if it names none."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map; {FETCH_AGAIN}")
    return sorted({str(name) for name in places.values()})


def _with_a_head(table: dict[str, Fused], found: dict[str, Stored]) -> dict[str, Stored]:
    """Return ``found`` by the names of the class with a head, also if it was saved without one.

    Hugging Face's ``from_pretrained`` takes either, tensor by tensor.
    """
    full = {part.base_name: part.name for fused in table.values() for part in fused.parts}
    return {
        name if (named := full.get(name, name)) in found else named: stored
        for name, stored in found.items()
    }


def _check_tensors(
    folder: Path, config: Config, table: dict[str, Fused], found: dict[str, Stored]
) -> None:
    wanted = {part.name: (part, fused) for fused in table.values() for part in fused.parts}
    missing = [name for name in wanted if name not in found]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {shortened(missing)}, which its config.json asks for; the checkpoint "
            "is incomplete or its config belongs to another one"
        )
    # A tied head is sometimes stored anyway; ``with_stored_head`` has compared it.
    tied = {HEAD} if config.tie_word_embeddings else set()
    unexpected = sorted(found.keys() - wanted.keys() - tied)
    if unexpected:
        where = found[unexpected[0]].path
        raise CheckpointError(
            f"{where} holds {shortened(unexpected)}, which an LFM2 of this config does not have; "
            "its config belongs to another checkpoint, or an adapter was saved with it"
        )
    for name, (part, fused) in wanted.items():
        stored = found[name]
        if stored.shape != part.shape:
            raise CheckpointError(
                f"{stored.path}: {stored.name} has shape {list(stored.shape)}, but config.json "
                f"asks for {list(part.shape)}"
            )
        if stored.dtype not in (
            FLOATS if fused.dtype is None else INTEGERS.get(fused.dtype, FLOATS)
        ):
            raise CheckpointError(
                f"{stored.path}: {stored.name} is stored as {stored.dtype}, which the "
                "config.json does not mention; load the unquantized checkpoint"
            )


def shortened(names: list[str]) -> str:
    """Return a list of names as text: the first three, and the number of the others."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
