"""Weight formats: how the matrix of a projection is allocated, quantized, stored and read back.

A format is one object here, one body in each implementation that is fast for it, and its tests.
Implementations choose by ``projection.format``; nothing else asks whether a matrix is quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lfm2_fast.config import CheckpointError

# Name suffix of a tensor -> its shape, and its dtype or None for the model's.
Parts = dict[str, tuple[tuple[int, ...], torch.dtype | None]]


class Format:
    """A dense matrix ``[N, K]`` in the model's dtype; subclasses store it in fewer bits.

    ``name`` is the value of ``load(quantization=)`` and of a checkpoint's config. ``file`` is the
    name of a saved checkpoint's weights.
    """

    name: str | None = None
    file = "model.safetensors"

    def __reduce__(self) -> Any:
        # A copy of a model, pickled or deep, must have these very objects.
        return find_format, (self.name,)

    def parts(self, shape: tuple[int, ...]) -> Parts:
        """Return the tensors that hold a matrix of ``shape``; the first has the numbers.

        All have the matrix's rows as their first axis: projections are stacked and split by rows.
        """
        return {"": (shape, None)}

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Name suffixes of the parts; the numbers' is empty."""
        return tuple(self.parts((0, 0)))

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return rows ``weight [n, K]`` in this format, in the order of ``parts``."""
        return (weight,)

    def fill(
        self, places: Sequence[torch.Tensor], blocks: Iterable[tuple[slice, torch.Tensor]]
    ) -> None:
        """Fill ``places``, in the order of ``parts``, from dense rows and where those belong.

        A block of rows is quantized at a time, on the device of ``places``.
        """
        for here, rows in blocks:
            made = self.quantize(rows.to(places[0].device))
            for place, part in zip(places, made, strict=True):
                place[here] = part

    def dequantize(self, parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return the rows ``[n, K]`` that the parts hold, in ``dtype``; dense ones as they are."""
        return parts[0]


class Int8Rows(Format):
    """8-bit integers and one float32 scale a row: ``weight [N, K]`` int8, ``scale [N]``.

    Symmetric: the largest magnitude of a row becomes 127.
    """

    name = "int8"
    # A name of its own: other programs would read the integers as weights.
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


DENSE, INT8 = Format(), Int8Rows()
FORMATS = {each.name: each for each in (DENSE, INT8)}


def find_format(name: str | None, source: object = "config") -> Format:
    """Return the format of that name; None is dense.

    Raises CheckpointError for an unknown one; ``source`` is what the message calls the config.
    """
    if name not in FORMATS:
        known = ", ".join(repr(each) for each in FORMATS if each)
        raise CheckpointError(
            f"{source}: the matrices are in format {name!r}, which lfm2_fast does not read (it has "
            f"{known}); load the unquantized checkpoint"
        )
    return FORMATS[name]


class Projection(nn.Module):
    """The matrix ``[N, K]`` of a projection or embedding in some ``format``.

    ``weight`` holds the numbers; the format's other parts are buffers, ``weight_scale`` of int8.
    ``bias [N]`` or None is added to the product.
    """

    bias: nn.Parameter | None
    weight_scale: torch.Tensor | None

    def __init__(
        self, rows: int, columns: int, *, bias: bool = False, format: Format = DENSE
    ) -> None:
        super().__init__()
        self.format = format
        self.register_buffer("weight_scale", None)
        for suffix, (shape, dtype) in format.parts((rows, columns)).items():
            part = torch.empty(shape, dtype=dtype)
            if suffix:
                self.register_buffer(f"weight{suffix}", part)
            else:
                self.weight = nn.Parameter(part, requires_grad=False)
        self.register_parameter("bias", nn.Parameter(torch.empty(rows)) if bias else None)

    @property
    def parts(self) -> list[torch.Tensor]:
        """The tensors that hold the matrix, in the order of ``format.parts``."""
        return [getattr(self, f"weight{suffix}") for suffix in self.format.suffixes]

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix ``[N, K]`` in ``dtype``; a dense one as it is."""
        return self.format.dequantize(self.parts, dtype)

    def rows(self, places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the rows ``[T, K]`` at ``places [T]``, in ``dtype``; dense ones as they are."""
        return self.format.dequantize([part.index_select(0, places) for part in self.parts], dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows that ids ``x`` name, or the products of numbers ``x [..., K]``."""
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
        """As any module's, but scales keep their dtype when the model's changes."""
        kept = {name: part for name, part in self._buffers.items() if part is not None}
        super()._apply(fn, recurse)
        for name, part in kept.items():
            self._buffers[name] = part.to(self.weight.device)
        return self
