"""Weight formats: how a matrix is allocated, quantized, stored and read back.

A format is one object here, fast code in some implementations, and its tests. Implementations
choose their code by ``projection.format``. No other code asks if a matrix is quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from lfm2_fast.config_values import CheckpointError
from lfm2_fast.weights.adapter_stack import AdapterStack
from lfm2_fast.weights.interleave import interleave, rows_of, take_rows

# Name suffix of a tensor -> its shape, and its dtype or None for the model's.
Parts = dict[str, tuple[tuple[int, ...], torch.dtype | None]]


class Format:
    """Dense matrix ``[N, K]`` in the model's dtype; subclasses store it in fewer bits.

    ``name`` is its name in a checkpoint's config. ``file`` is the name of a saved checkpoint's
    weights. ``from_dense`` is true if ``quantize`` makes it, so that ``load(quantization=)``
    accepts it. ``on_gpu`` is true if GPUs have code for it.
    """

    name: str | None = None
    file = "model.safetensors"
    from_dense = True
    on_gpu = True

    def __reduce__(self) -> Any:
        # A copy of a model, pickled or deep, must have these same objects.
        return find_format, (self.name,)

    def parts(self, shape: tuple[int, ...]) -> Parts:
        """Return the tensors that hold a matrix of ``shape``; the first has the numbers.

        The first axis of each is the rows of the matrix: projections are stacked and split by rows.
        """
        return {"": (shape, None)}

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Name suffixes of the parts; the numbers' is empty."""
        return tuple(self.parts((0, 0)))

    def of_matrix(self, columns: int, *, is_table: bool) -> Format:
        """Return the format of one matrix ``[N, columns]`` of a model that is in this format.

        ``is_table`` is true for the embedding and the head.
        """
        return self

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return rows ``weight [n, K]`` in this format, in the order of ``parts``."""
        return (weight,)

    def fill(
        self, places: Sequence[torch.Tensor], blocks: Iterable[tuple[slice, torch.Tensor]]
    ) -> None:
        """Fill ``places``, in the order of ``parts``, from blocks of dense rows and their places.

        A block of rows is quantized at a time, on the device of ``places``.
        """
        for here, rows in blocks:
            made = self.quantize(rows.to(places[0].device))
            for place, part in zip(places, made, strict=True):
                place[here] = part

    def dequantize(self, parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return the rows ``[n, K]`` of the parts in ``dtype``; dense ones unchanged."""
        return parts[0]

    def interleave(self, parts: Sequence[torch.Tensor]) -> None:
        """Put a filled matrix into the order that implementations read, in place."""

    def stored(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the parts of a matrix row after row, as files have them."""
        return list(parts)

    def rows(
        self, parts: Sequence[torch.Tensor], places: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the rows ``[n, K]`` at ``places [n]`` of a matrix, in ``dtype``."""
        return self.dequantize([part.index_select(0, places) for part in parts], dtype)

    def matrix(self, parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return a whole matrix ``[N, K]`` in ``dtype``; a dense one unchanged."""
        return self.dequantize(self.stored(parts), dtype)


class Int8Rows(Format):
    """8-bit integers and one float32 scale a row: ``weight [N, K]`` int8, ``scale [N]``.

    Symmetric: the largest magnitude of a row becomes 127.
    """

    name = "int8"
    # Its own name, because other programs would read the integers as weights.
    file = "model.int8.safetensors"

    def parts(self, shape: tuple[int, ...]) -> Parts:
        return {"": (shape, torch.int8), "_scale": (shape[:1], torch.float32)}

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = weight.to(torch.float32, copy=True)
        largest = wide.abs().amax(-1)
        # A scale below the smallest normal number would be too coarse to divide by.
        scale = (largest / 127).clamp_min_(torch.finfo(torch.float32).tiny)
        wide /= scale[:, None]
        return wide.round_().to(torch.int8), scale.masked_fill_(largest == 0, 0)

    def dequantize(self, parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        numbers, scale = parts
        wide = torch.promote_types(dtype, torch.float32)
        return (numbers.to(wide) * scale.to(wide)[:, None]).to(dtype)


class Groups(Format):
    """Integers ``q`` in groups along K: a group's values are ``scale * (q - offset) + minimum``.

    ``bits`` is 4 (two numbers a byte) or 8. ``scales`` is the dtype of a group's scale and, with
    ``minimums``, of its minimum: float16 or float32 words, or bytes. Bytes are multiplied by two
    float16 words that 256 numbers share. GGUF's types fit without loss (``weights.gguf_blocks``).

    A row of ``weight_scale`` has scale and minimum of its first group, then of the next. With bytes
    it has for each 256 numbers both float16 words, then all scales, then all minimums.
    """

    file = "model.int4.safetensors"

    def __init__(
        self,
        name: str,
        bits: int,
        *,
        group: int = 32,
        scales: torch.dtype = torch.float16,
        minimums: bool = False,
        offset: int = 0,
    ) -> None:
        self.name = name
        self.from_dense = self.on_gpu = name == "int4"
        self.bits, self.group, self.scales = bits, group, scales
        self.offset, self.words = offset, 1 + minimums
        self.units = 4, max(2, scales.itemsize)
        # Columns must be a multiple of this.
        self.block = 256 if scales.itemsize == 1 else 32

    def parts(self, shape: tuple[int, ...]) -> Parts:
        rows, columns = shape
        if columns % self.block:
            raise CheckpointError(
                f"a matrix of {columns} columns cannot be in format {self.name!r}, whose groups "
                f"need a multiple of {self.block}"
            )
        scales = columns // self.group * self.words
        if self.scales.itemsize == 1:
            scales += columns // self.block * 2 * self.words
        numbers = torch.uint8 if self.bits == 4 else torch.int8
        return {
            "": ((rows, columns * self.bits // 8), numbers),
            "_scale": ((rows, scales), torch.uint8 if self.scales.itemsize == 1 else self.scales),
        }

    def of_matrix(self, columns: int, *, is_table: bool) -> Format:
        """Return int8 for the embedding and the head, which would lose most, and for sizes without
        whole groups.
        """
        return INT8 if is_table or columns % self.block else self

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``weight [n, K]`` in 4 bits as GGUF's Q4_0: the largest magnitude becomes -8.

        Raises ValueError for the other formats, which are read only.
        """
        if not self.from_dense:
            raise ValueError(f"nothing is quantized to {self.name!r}: use 'int4' or 'int8'")
        wide = weight.to(torch.float32, copy=True).unflatten(1, (-1, self.group))
        low, high = wide.amin(2), wide.amax(2)
        most = torch.where(high > -low, high, low)
        tie = high == -low
        # Of equal magnitudes the first counts. One argmax over all would take ten times as long.
        if bool(tie.any()):
            equal = wide[tie]
            most[tie] = equal.gather(1, equal.abs().argmax(1, keepdim=True))[:, 0]
        scale = most / -8
        factor = torch.where(scale == 0, 0, 1 / scale)
        numbers = wide.mul_(factor[..., None]).add_(8.5).clamp_(0, 15).to(torch.uint8)
        bound = torch.finfo(torch.float16).max
        return pack4(numbers.flatten(1)), scale.clamp_(-bound, bound).half()

    def dequantize(self, parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        numbers, words = parts
        wide = torch.promote_types(dtype, torch.float32)
        values = unpack4(numbers) if self.bits == 4 else numbers
        made = (values.to(wide) - self.offset if self.offset else values.to(wide)).unflatten(
            1, (-1, self.group)
        )
        scale, minimum = self.group_scales(words, wide)
        made = made.mul_(scale[..., None])
        if minimum is not None:
            made = made.add_(minimum[..., None])
        return made.flatten(1).to(dtype)

    def group_scales(
        self, words: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return scales and minimums ``[n, K / group]`` of rows of ``weight_scale``, in ``dtype``.

        Without minimums the second is None.
        """
        if self.scales.itemsize > 1:
            each = words.to(dtype).unflatten(1, (-1, self.words))
            return each[..., 0], each[..., 1] if self.words == 2 else None
        blocks = words.unflatten(1, (-1, (2 + self.block // self.group) * self.words))
        factors, small = blocks[..., : 2 * self.words], blocks[..., 2 * self.words :]
        factors = factors.contiguous().view(torch.float16).to(dtype)
        small = small.contiguous().view(self.scales).to(dtype).unflatten(-1, (self.words, -1))
        made = factors[..., None] * small
        return made[..., 0, :].flatten(1), made[..., 1, :].flatten(1) if self.words == 2 else None

    def interleave(self, parts: Sequence[torch.Tensor]) -> None:
        for part, unit in zip(parts, self.units, strict=True):
            interleave(part, unit)

    def stored(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [rows_of(part, unit) for part, unit in zip(parts, self.units, strict=True)]

    def rows(
        self, parts: Sequence[torch.Tensor], places: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        taken = [take_rows(part, u, places) for part, u in zip(parts, self.units, strict=True)]
        return self.dequantize(taken, dtype)


class Mixed(Format):
    """Matrices of a model in different formats, which its config lists by name."""

    name = "mixed"
    file = "model.mixed.safetensors"
    from_dense = False


class Compressed(Format):
    """Matrices as compressed-tensors stores them; they are read into other formats."""

    name = "compressed-tensors"
    from_dense = False


def pack4(numbers: torch.Tensor) -> torch.Tensor:
    """Return numbers 0 to 15 ``[n, K]`` as bytes ``[n, K / 2]``.

    A group's first half is in the lower bits of its 16 bytes, its second in the upper.
    """
    halves = numbers.unflatten(1, (-1, 2, 16))
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)


def unpack4(packed: torch.Tensor) -> torch.Tensor:
    """Return the numbers ``[n, K]`` of bytes ``[n, K / 2]``; undoes ``pack4``."""
    halves = packed.unflatten(1, (-1, 1, 16))
    return torch.cat([halves & 15, halves >> 4], 2).flatten(1)


DENSE, INT8, MIXED, COMPRESSED = Format(), Int8Rows(), Mixed(), Compressed()
INT4 = Groups("int4", 4, offset=8)
Q4_1 = Groups("q4_1", 4, minimums=True)
Q4_K = Groups("q4_k", 4, scales=torch.uint8, minimums=True)
Q8_0 = Groups("q8_0", 8)
Q5_1 = Groups("q5_1", 8, minimums=True)
Q5_K = Groups("q5_k", 8, scales=torch.uint8, minimums=True)
Q6_K = Groups("q6_k", 8, group=16, scales=torch.int8)
# Holds any of the others without loss.
WIDE = Groups("wide", 8, group=16, scales=torch.float32, minimums=True)
FORMATS = {
    each.name: each
    for each in (DENSE, INT8, MIXED, COMPRESSED, INT4, Q4_1, Q4_K, Q8_0, Q5_1, Q5_K, Q6_K, WIDE)
}


def find_format(name: str | None, source: object = "config") -> Format:
    """Return the format of that name; None is dense.

    Raises CheckpointError for an unknown name; ``source`` is the config's name in the message.
    """
    if name not in FORMATS:
        known = ", ".join(repr(each) for each in FORMATS if each)
        raise CheckpointError(
            f"{source}: the matrices are in format {name!r}, which lfm2_fast does not read (it has "
            f"{known}); load the unquantized checkpoint"
        )
    return FORMATS[name]


class Source(Protocol):
    """Stored tensor, as ``fill_table`` reads it."""

    def fill(self, target: Format, places: Sequence[torch.Tensor]) -> None:
        """Fill the parts ``places`` of the ``target`` format."""

    def copy_to(self, place: torch.Tensor) -> None:
        """Copy the values into ``place``."""


class Projection(nn.Module):
    """Matrix ``[N, K]`` of a projection or embedding, in some ``format``.

    ``weight`` holds the numbers; the format's other parts are buffers, ``weight_scale`` of int8.
    ``bias [N]`` or None is added to the product. ``adapters`` are changes beside the matrix, or
    None. ``replaced`` are matrices that adapters have instead of some rows, by entry in the stacks
    and first row. Only a forward pass that gets the tokens' adapters uses both.
    """

    bias: nn.Parameter | None
    weight_scale: torch.Tensor | None

    def __init__(
        self, rows: int, columns: int, *, bias: bool = False, format: Format = DENSE
    ) -> None:
        super().__init__()
        self.shape = rows, columns
        self.adapters: AdapterStack | None = None
        self.replaced: dict[tuple[int, int], Projection] = {}
        self.register_buffer("weight_scale", None)
        self.store_as(format)
        self.register_parameter("bias", nn.Parameter(torch.empty(rows)) if bias else None)

    def store_as(self, format: Format) -> None:
        """Hold the matrix in ``format``, its tensors new and empty."""
        self.format = format
        for suffix, (shape, dtype) in format.parts(self.shape).items():
            part = torch.empty(shape, dtype=dtype)
            if suffix:
                self.register_buffer(f"weight{suffix}", part)
            else:
                self.weight = nn.Parameter(part, requires_grad=False)

    @property
    def parts(self) -> list[torch.Tensor]:
        """Tensors of the matrix, in the order of ``format.parts``."""
        return [getattr(self, f"weight{suffix}") for suffix in self.format.suffixes]

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix ``[N, K]`` in ``dtype``; a dense one unchanged."""
        return self.format.matrix(self.parts, dtype)

    def rows(self, places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the rows ``[T, K]`` at ``places [T]``, in ``dtype``; dense ones unchanged."""
        return self.format.rows(self.parts, places, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows of ids ``x``, or the products of numbers ``x [..., K]``."""
        if x.is_floating_point():
            return F.linear(x, self.dequantized(x.dtype), self.bias)
        dtype = self.weight.dtype if self.weight.is_floating_point() else torch.get_default_dtype()
        return self.rows(x.flatten(), dtype).view(*x.shape, -1)

    def share(self, other: Projection) -> None:
        """Use the tensors of ``other``, as a tied head does."""
        self.weight = other.weight
        self._buffers.update(other._buffers)

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> Projection:
        """Convert as any module does, but let scales keep their dtype."""
        kept = {name: part for name, part in self._buffers.items() if part is not None}
        super()._apply(fn, recurse)
        for name, part in kept.items():
            self._buffers[name] = part.to(self.weight.device)
        if self.adapters is not None:
            self.adapters = self.adapters.apply(fn)
        for own in self.replaced.values():
            own._apply(fn)
        return self
