"""GGUF files: the header, read within bounds, and the place of each tensor.

A header is checked before any memory is allocated for it. Counts and lengths must fit into the
file, and types and shapes of tensors must match their bytes. Layout of a file:

    "GGUF", version, number of tensors, number of entries
    entries:  key, type, value
    tensors:  name, number of axes, length of each (fastest first), type, offset in the data
    data, aligned
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm2_fast.config_values import FETCH_AGAIN, CheckpointError

MAGIC = b"GGUF"
# Codes of metadata values: numbers by their struct format, then the two of no fixed length.
NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Limits far above every header of a language model, against hostile files.
MOST_ITEMS = 1 << 21
MOST_BYTES = 1 << 26
MOST_TENSORS = 1 << 16
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class GGUFTensor:
    """Tensor of a file: its shape ``[rows, columns]`` in our order, GGUF's type, and its bytes.

    The file is mapped again for every read. Pages that were read through a map count as memory of
    this process until the map is closed. With one map they would grow to the size of the file.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int

    def raw(self) -> Any:
        """Return the bytes ``[rows, bytes of a row]``, mapped; of a vector one row."""
        import numpy

        try:
            bytes = numpy.memmap(self.path, numpy.uint8, "r", self.offset, (self.nbytes,))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}; {FETCH_AGAIN}") from error
        return bytes.reshape(math.prod(self.shape[:-1]), -1)


@dataclass(frozen=True)
class GGUFFile:
    """Metadata of a file, or of the first of its parts, and the tensors of all."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def is_gguf(path: Path) -> bool:
    """Return True for a file that begins as GGUF does, with any name."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def require_gguf() -> Any:
    """Return the package ``gguf``. Raises ValueError, which names the extra, if it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            "GGUF files need the package gguf: pip install 'lfm2-fast[gguf]'"
        ) from error
    return gguf


def parts_of_split(path: Path) -> list[Path]:
    """Return all files of the checkpoint of ``path``, in order.

    Raises CheckpointError if some are missing.
    """
    found = SPLIT.fullmatch(path.name)
    if found is None:
        return [path]
    stem, _, count = found.groups()
    if int(count) > MOST_TENSORS:
        raise CheckpointError(f"{path} claims to be one of {int(count)} files; {FETCH_AGAIN}")
    names = [path.with_name(split_name(stem, i, int(count))) for i in range(int(count))]
    missing = [each.name for each in names if not each.is_file()]
    if missing or not names:
        raise CheckpointError(
            f"{path} is one of {int(count)} files, of which {', '.join(missing[:3])} "
            f"{'and more are' if len(missing) > 3 else 'is'} missing; fetch all of them"
        )
    return names


def split_name(stem: str, index: int, count: int) -> str:
    """Return a part's name as llama.cpp writes it; ``index`` counts from 0."""
    return f"{stem}-{index + 1:05}-of-{count:05}.gguf"


def read_gguf(path: Path) -> GGUFFile:
    """Read the header of a GGUF file, and of the files that it was split into.

    Raises CheckpointError, which names the file, for any fault, and ValueError if the package
    ``gguf`` is missing.
    """
    require_gguf()
    paths = parts_of_split(path)
    metadata, tensors = _read_one(paths[0])
    for other in paths[1:]:
        more = _read_one(other)[1]
        twice = sorted(tensors.keys() & more.keys())
        if twice:
            raise CheckpointError(f"{other}: tensor {twice[0]!r} is in an earlier part too")
        tensors |= more
    count = metadata.get("split.count", 1)
    if count not in (0, len(paths)):
        raise CheckpointError(
            f"{paths[0]} was split into {count} files, and its name says {len(paths)}: give the "
            "files the names that they were published with, like model-00001-of-00002.gguf"
        )
    return GGUFFile(paths[0], metadata, tensors)


def _read_one(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as area:
            return _Header(path, area).read()
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error}; {FETCH_AGAIN}") from error


class _Header:
    """Reads a header's parts one after another, and never beyond its end."""

    def __init__(self, path: Path, area: mmap.mmap) -> None:
        self.path, self.area = path, area
        self.size = len(area)
        self.at = 0
        self.items = 0

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}; {FETCH_AGAIN}")

    def take(self, count: int) -> bytes:
        """Return the next ``count`` bytes."""
        if count > min(self.size, MOST_BYTES) - self.at:
            what = "is truncated" if self.size <= MOST_BYTES else "is not one of a model"
            raise self.error(f"the header {what}: {count} bytes should follow byte {self.at}")
        self.at += count
        return self.area[self.at - count : self.at]

    def numbers(self, format: str, count: int = 1) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{format}", self.take(count * struct.calcsize(f"<{format}")))

    def number(self, format: str) -> Any:
        return self.numbers(format)[0]

    def count(self, what: str, most: int, least: int) -> int:
        """Return the number of following items, each of at least ``least`` bytes."""
        found = self.number("Q")
        if found > most or found * least > self.size - self.at:
            raise self.error(f"it claims {found} {what}, more than the file can hold")
        return found

    def string(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"a string before byte {self.at} is not UTF-8") from error

    def value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self.string()
        if kind in NUMBERS:
            # The byte of a truth value may have any value.
            return bool(self.number("B")) if kind == 7 else self.number(NUMBERS[kind])
        if kind != ARRAY:
            raise self.error(f"{key!r} is of type {kind}, which GGUF does not have")
        inner = self.number("I")
        if inner not in NUMBERS and inner != STRING:
            raise self.error(f"{key!r} holds items of type {inner}, which are not supported")
        size = 8 if inner == STRING else struct.calcsize(f"<{NUMBERS[inner]}")
        count = self.count(f"items of {key!r}", MOST_ITEMS - self.items, size)
        self.items += count
        if inner == STRING:
            return [self.string() for _ in range(count)]
        return list(self.numbers("B" if inner == 7 else NUMBERS[inner], count))

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        if self.take(4) != MAGIC:
            raise self.error("it does not begin with 'GGUF', so it is not a GGUF file")
        version = self.number("I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            what = "its bytes are in big-endian order" if swapped else f"it is of version {version}"
            raise self.error(f"{what}; versions 2 and 3 in little-endian order are read")
        tensors = self.count("tensors", MOST_TENSORS, 24)
        entries = self.count("entries", MOST_TENSORS, 13)
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self.string()
            if key in metadata:
                raise self.error(f"{key!r} is in it twice")
            metadata[key] = self.value(self.number("I"), key)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment % 8:
            raise self.error(f"general.alignment is {alignment!r}, not a multiple of 8")
        infos = list(self.tensors(tensors))
        start = -(-self.at // alignment) * alignment
        return metadata, {each.name: each for each in self.placed(infos, start, alignment)}

    def tensors(self, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        names = set()
        for _ in range(count):
            name = self.string()
            if name in names:
                raise self.error(f"tensor {name!r} is in it twice")
            names.add(name)
            axes = self.number("I")
            if not 1 <= axes <= 4:
                raise self.error(f"tensor {name!r} has {axes} axes")
            shape = self.numbers("Q", axes)[::-1]
            yield name, shape, self.number("I"), self.number("Q")

    def placed(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> Iterator[GGUFTensor]:
        """Yield the tensors, after a check that their bytes are in the file."""
        gguf = require_gguf()
        for name, shape, code, offset in infos:
            try:
                type = gguf.GGMLQuantizationType(code)
                numbers, size = gguf.GGML_QUANT_SIZES[type]
            except (ValueError, KeyError) as error:
                raise self.error(
                    f"tensor {name!r} is of GGUF type {code}, which gguf does not know"
                ) from error
            if 0 in shape or shape[-1] % numbers:
                raise self.error(
                    f"tensor {name!r} {list(shape)} is not whole blocks of {type.name}"
                )
            nbytes = math.prod(shape) // numbers * size
            if offset % alignment or start + offset + nbytes > self.size:
                raise self.error(
                    f"tensor {name!r} should have {nbytes} bytes at {start + offset}, and the file "
                    f"ends at {self.size}"
                )
            yield GGUFTensor(self.path, name, shape, type.name, start + offset, nbytes)
