"""Adapter merged while a checkpoint is read: ``W + scale * up @ down``, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from lfm2_fast.config import Config
from lfm2_fast.config_values import CheckpointError
from lfm2_fast.weights.adapter import Adapter, LowRank
from lfm2_fast.weights.formats import Format, Source
from lfm2_fast.weights.fusion import BASE, EMBEDDING, HEAD

# Numbers of a matrix that are changed at once.
BLOCK = 1 << 20

Blocks = Callable[[int], Iterator[tuple[slice, torch.Tensor]]]


class Blocked(Source, Protocol):
    """Stored tensor that can be read some rows at a time."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def blocks(self, rows: int) -> Iterator[tuple[slice, torch.Tensor]]: ...


@dataclass(frozen=True)
class InMemory:
    """Tensor that is there, as ``fill_table`` reads stored ones."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def copy_to(self, place: torch.Tensor) -> None:
        """Copy the values into ``place``."""
        place.copy_(self.tensor.reshape(place.shape))

    def fill(self, target: Format, places: Sequence[torch.Tensor]) -> None:
        """Fill the parts ``places`` of the ``target`` format."""
        target.fill(places, self.blocks(_rows_of(self.shape)))

    def blocks(self, rows: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield some rows at a time, each with its place."""
        for first in range(0, self.shape[0], rows):
            here = slice(first, first + rows)
            yield here, self.tensor[here]


@dataclass(frozen=True)
class Merged:
    """Matrix with an adapter's change, as ``fill_table`` reads stored ones."""

    shape: tuple[int, ...]
    base: Blocks
    change: LowRank
    transposed: bool = False

    def copy_to(self, place: torch.Tensor) -> None:
        """Copy the changed values into ``place``."""
        for here, rows in self.blocks(_rows_of(self.shape)):
            place[here] = rows.to(place.dtype)

    def fill(self, target: Format, places: Sequence[torch.Tensor]) -> None:
        """Fill the parts ``places`` of the ``target`` format with the changed values."""
        target.fill(places, self.blocks(_rows_of(self.shape)))

    def blocks(self, rows: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield some changed rows at a time, in float32 or wider, each with its place."""
        magnitude = self.change.magnitude
        factors = None
        if magnitude is not None and self.transposed:
            squares = sum((rows**2).sum(0) for _, rows in self._sums(rows))
            assert isinstance(squares, torch.Tensor)
            factors = magnitude / squares.sqrt()
        for here, made in self._sums(rows):
            if factors is not None:
                made = made * factors
            elif magnitude is not None:
                made = made * (magnitude[here] / made.norm(dim=1))[:, None]
            yield here, made

    def _sums(self, rows: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield ``W + scale * up @ down``, some rows at a time, summed wider than ``W``."""
        for here, base in self.base(rows):
            wide = torch.float32 if base.dtype.itemsize < 4 else torch.float64
            up, down = self.change.up.to(wide), self.change.down.to(wide)
            left, right = (down[:, here].T, up.T) if self.transposed else (up[here], down)
            made = torch.addmm(base.to(wide), left, right, alpha=self.change.scale)
            yield here, made.to(torch.promote_types(base.dtype, torch.float32))


def _rows_of(shape: Sequence[int]) -> int:
    return max(1, BLOCK // shape[1])


def merged_config(config: Config, adapter: Adapter) -> Config:
    """Return the config of a checkpoint of ``config`` with the adapter merged.

    Raises CheckpointError for what cannot be merged, naming it.
    """
    if config.quantization is not None:
        raise CheckpointError(
            f"{adapter.folder} cannot be merged into weights in format {config.quantization!r}: "
            "load the model without adapter= and call load_adapter(), or load the unquantized "
            "checkpoint with quantization="
        )
    for module, change in adapter.low_rank.items():
        if change.bias is not None and not (config.conv_bias and ".conv." in module):
            raise CheckpointError(
                f"{adapter.folder}: lora_bias=True adds a bias to {module}, which has none to "
                "merge it into; load the model without adapter= and call load_adapter()"
            )
    return replace(config, tie_word_embeddings=False) if adapter.unties else config


def merged_tensors(
    found: Mapping[str, Blocked], config: Config, adapter: Adapter
) -> dict[str, Blocked]:
    """Return the tensors ``found`` of a dense checkpoint of ``config``, with the adapter's changes.

    All are by Hugging Face's names.
    """
    made, bases, embedding = dict(found), dict(adapter.bases), BASE + EMBEDDING
    if config.tie_word_embeddings and HEAD in bases:
        # One table for all names under which it may be saved.
        bases.setdefault(embedding, bases.pop(HEAD))
    made.update({name: InMemory(tensor) for name, tensor in bases.items()})
    if config.tie_word_embeddings and adapter.unties:
        made[HEAD] = made[embedding]
    made.update({name: InMemory(tensor) for name, tensor in adapter.replaced.items()})
    for module, change in adapter.low_rank.items():
        name, bias = f"{module}.weight", f"{module}.bias"
        base = made[name]
        made[name] = Merged(base.shape, base.blocks, change, transposed=name == embedding)
        if change.bias is not None:
            own = torch.cat([rows.float() for _, rows in made[bias].blocks(len(change.bias))])
            made[bias] = InMemory(own + change.scale * change.bias)
    return made
