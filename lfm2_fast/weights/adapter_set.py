"""AdapterSet: the adapters that are loaded beside a model's weights, by name."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lfm2_fast.config import Config
from lfm2_fast.config_values import CheckpointError
from lfm2_fast.weights.adapter import Adapter, LowRank, read_adapter
from lfm2_fast.weights.adapter_stack import AdapterStack
from lfm2_fast.weights.formats import DENSE, Projection
from lfm2_fast.weights.fusion import EMBEDDING, fusion_table

# Ranks and entries are made in these steps, so that captured graphs, which point at the stacks,
# seldom have to be captured again.
RANK_STEP, FIRST_ADAPTERS = 8, 4
TABLE = EMBEDDING.removesuffix(".weight")


@dataclass(eq=False)
class LoadedAdapter:
    """Adapter's ``entry`` in the stacks, which stays its own as long as anything holds this.

    ``number`` is one that no other adapter of the set had or will have.
    """

    name: str
    folder: Path
    entry: int
    number: int


class AdapterSet:
    """Loads adapters into stacks beside ``projections``, those of a model of ``config`` by name.

    ``active`` is the adapter of tokens that have no other, or None. ``version`` counts how often
    stacks were made or grew, and replaced matrices came or went: captured graphs point at them.
    """

    def __init__(self, config: Config, projections: Mapping[str, Projection]) -> None:
        self.config, self.projections = config, dict(projections)
        self._places = _places(config)
        self.active: LoadedAdapter | None = None
        self.version = 0
        self._loaded: dict[str, LoadedAdapter] = {}
        # Number of the last adapter; itertools.count cannot be copied from Python 3.14 on.
        self._number = 0
        # Entries and rank of every stack; the first entry is zeros.
        self._entries, self._rank = 1, 0
        self._owners: list[weakref.ref[LoadedAdapter] | None] = [None]
        # Adapters that were unloaded while something held them.
        self._unloaded: list[weakref.ref[LoadedAdapter]] = []
        # Room that was asked for stays when no adapter is left.
        self._is_reserved = False
        self.max_adapters: int | None = None
        self.max_rank: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        references = ("_owners", "_unloaded")
        return {name: value for name, value in self.__dict__.items() if name not in references}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._owners, self._unloaded = [None] * self._entries, []
        for each in self._loaded.values():
            self._owners[each.entry] = weakref.ref(each)

    def __len__(self) -> int:
        return len(self._loaded)

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters, in the order in which they were loaded."""
        return list(self._loaded)

    def find(self, name: str) -> LoadedAdapter:
        """Return the adapter of that name. Raises ValueError, naming those that there are."""
        if name not in self._loaded:
            known = ", ".join(map(repr, self._loaded)) or "none"
            raise ValueError(f"adapter {name!r} is not loaded; load_adapter() has loaded {known}")
        return self._loaded[name]

    @property
    def whole(self) -> frozenset[int]:
        """Entries of adapters with whole matrices in place of the base's."""
        replaced = (projection.replaced for projection in self.projections.values())
        return frozenset(entry for each in replaced for entry, _ in each)

    def reserve(self, adapters: int, rank: int) -> None:
        """Have room for ``adapters`` of at most ``rank`` each, in the stacks that there are.

        A module that no adapter had so far gets its stack when one has. The room stays when no
        adapter is left.
        """
        self._is_reserved = True
        self._grow(adapters, rank)

    def limit(self, adapters: int | None = None, rank: int | None = None) -> None:
        """Reserve room for ``adapters`` of at most ``rank``, and refuse to load what exceeds it.

        None is no limit. Raises ValueError for one below 1.
        """
        for name, value in (("max_adapters", adapters), ("max_lora_rank", rank)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1; leave it out for no limit")
        self.max_adapters, self.max_rank = adapters, rank
        if adapters is not None or rank is not None:
            self.reserve(adapters or 0, rank or 0)

    def _grow(self, adapters: int, rank: int) -> None:
        entries, rank = adapters + 1, math.ceil(rank / RANK_STEP) * RANK_STEP
        if entries <= self._entries and rank <= self._rank:
            return
        self._entries, self._rank = max(entries, self._entries), max(rank, self._rank)
        self._owners += [None] * (self._entries - len(self._owners))
        for name, projection in self.projections.items():
            if projection.adapters is not None:
                before = projection.adapters
                projection.adapters = self._new_stack(name, before.up)
                projection.adapters.take_over(before)
        self.version += 1

    # Not in a caller's inference mode: later loads write to these tensors outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def load(self, folder: Path, name: str, like: torch.Tensor) -> LoadedAdapter:
        """Load the adapter in ``folder`` as ``name``, in the dtype and on the device of ``like``.

        Raises ValueError for a name that is taken or empty, and for an adapter beyond the limits.
        Raises CheckpointError as ``read_adapter`` does, and for what cannot stand beside the
        weights. Nothing has changed then.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"the adapter's name must be a text that is not empty, got {name!r}")
        if name in self._loaded:
            raise ValueError(f"adapter {name!r} is loaded already: unload_adapter() it first")
        if self.max_adapters is not None and len(self) >= self.max_adapters:
            raise ValueError(
                f"adapter {name!r} has no room: max_adapters={self.max_adapters} are loaded; "
                "unload one of them first"
            )
        adapter = read_adapter(folder, self.config)
        self._check_whole_tensors(adapter)
        entry = self._free_entry()
        most = max((len(change.down) for change in adapter.low_rank.values()), default=0)
        self._check_limit(adapter, most)
        adapters = self._entries - 1
        if entry > adapters:
            adapters = max(FIRST_ADAPTERS, 2 * adapters)
        self._grow(adapters, most)
        self._drop_replaced()
        for projection in self.projections.values():
            if projection.adapters is not None:
                projection.adapters.clear(entry)
        for module, change in adapter.low_rank.items():
            self._write(entry, module, change, like)
        for name_of, tensor in adapter.replaced.items():
            module, _, kind = name_of.rpartition(".")
            write = self._write_bias if kind == "bias" else self._replace
            write(entry, module, tensor, like)
        self._number += 1
        made = LoadedAdapter(name, folder, entry, self._number)
        self._loaded[name], self._owners[entry] = made, weakref.ref(made)
        return made

    def unload(self, name: str) -> None:
        """Forget an adapter. Its entry serves another one when no request runs with it any more.

        Its whole matrices are freed then, and the stacks with the last adapter, if no room was
        reserved. Raises ValueError for a name that is not loaded.
        """
        if self.active is self.find(name):
            self.active = None
        self._unloaded.append(weakref.ref(self._loaded.pop(name)))
        self.release_unused()

    def release_unused(self) -> bool:
        """Free the memory of adapters that were unloaded, once nothing holds them.

        Return True if something was freed.
        """
        held = [each for each in self._unloaded if each() is not None]
        if len(held) == len(self._unloaded):
            return False
        self._unloaded = held
        self._drop_replaced()
        if not (self._loaded or held or self._is_reserved):
            # The entries stay as they are counted: steps on a caller's cache may name them.
            for projection in self.projections.values():
                projection.adapters = None
            self._rank = 0
            self.version += 1
        return True

    def _drop_replaced(self) -> None:
        """Free the replaced matrices of entries that nothing holds."""
        for projection in self.projections.values():
            for key in list(projection.replaced):
                owner = self._owners[key[0]]
                if owner is None or owner() is None:
                    del projection.replaced[key]
                    self.version += 1

    def _free_entry(self) -> int:
        """Return the first entry that nothing holds, or the one after the last."""
        for entry in range(1, self._entries):
            owner = self._owners[entry]
            if owner is None or owner() is None:
                return entry
        return self._entries

    def _new_stack(self, name: str, like: torch.Tensor) -> AdapterStack:
        rows = [(place.stop - place.start) for of, _, place in self._places.values() if of == name]
        projection = self.projections[name]
        return AdapterStack.empty(
            self._entries,
            self._rank,
            tuple(rows),
            projection.shape[1],
            is_table=name == TABLE,
            like=like,
        )

    def _check_whole_tensors(self, adapter: Adapter) -> None:
        """Raise CheckpointError for a tensor that is of no matrix, or should be the base's own."""
        for name in adapter.replaced:
            if name.rpartition(".")[0] not in self._places:
                raise CheckpointError(
                    f"{adapter.folder} replaces {name} (modules_to_save or bias), and only tensors "
                    "of projections, embedding and head stand beside the base's: load the model "
                    "with adapter=, which merges it"
                )
        for name, tensor in adapter.bases.items():
            place = self._places.get(name.removesuffix(".weight"))
            if place is None or not _holds(self.projections[place[0]], tensor):
                raise CheckpointError(
                    f"{adapter.folder} was saved with a {name} that is not this base's: load the "
                    "unquantized base with adapter=, which merges it"
                )

    def _check_limit(self, adapter: Adapter, rank: int) -> None:
        """Raise CheckpointError for an adapter that the room for ``max_rank`` cannot hold."""
        if self.max_rank is None:
            return
        if rank > self.max_rank:
            raise CheckpointError(
                f"{adapter.folder} has rank {rank}, and max_lora_rank={self.max_rank} here: raise "
                "that limit, or leave it out"
            )
        for name in adapter.replaced:
            if name.endswith(".weight"):
                raise CheckpointError(
                    f"{adapter.folder} replaces {name} (modules_to_save), for which "
                    f"max_lora_rank={self.max_rank} keeps no room: leave that limit out, or load "
                    "the model with adapter=, which merges it"
                )

    def _replace(self, entry: int, module: str, matrix: torch.Tensor, like: torch.Tensor) -> None:
        """Let tokens of an entry have a module's dense ``matrix`` instead of the base's."""
        name, _, rows = self._places[module]
        projection = self.projections[name]
        with torch.device("meta"):
            own = Projection(*matrix.shape)
        own.weight = nn.Parameter(matrix.to(like), requires_grad=False)
        if projection.bias is not None:
            own.bias = nn.Parameter(projection.bias[rows].clone(), requires_grad=False)
        projection.replaced[entry, rows.start] = own
        self.version += 1

    def _write(self, entry: int, module: str, change: LowRank, like: torch.Tensor) -> None:
        """Write a module's change into its stack, as one entry."""
        name, part, rows = self._places[module]
        projection = self.projections[name]
        if projection.adapters is None:
            projection.adapters = self._new_stack(name, like)
            self.version += 1
        stack, rank, up = projection.adapters, len(change.down), change.scale * change.up
        device = stack.up.device
        down, up = change.down.to(device), up.to(device)
        is_table = name == TABLE
        if is_table:
            rows = slice(0, projection.shape[1])
        if change.magnitude is not None:
            weight = projection.dequantized(torch.float32)
            whole = weight.T + up @ down if is_table else weight[rows] + up @ down
            factor = change.magnitude.to(device) / whole.norm(dim=1)
            stack.gain[entry, rows] = (factor - 1).to(stack.gain)
            up = up * factor[:, None]
        if is_table:
            stack.down[entry, :, :rank] = down.T
        else:
            stack.down[entry, part, :rank] = down
        stack.up[entry, :rank, rows] = up.T.to(stack.up)
        if change.bias is not None:
            stack.shift[entry, rows] = change.scale * change.bias.to(stack.shift)

    def _write_bias(self, entry: int, module: str, bias: torch.Tensor, like: torch.Tensor) -> None:
        """Write the difference of a module's own bias to the base's into its stack."""
        name, _, rows = self._places[module]
        projection = self.projections[name]
        if projection.adapters is None:
            projection.adapters = self._new_stack(name, like)
            self.version += 1
        assert projection.bias is not None
        shift = projection.adapters.shift
        shift[entry, rows] += bias.to(shift) - projection.bias


def _places(config: Config) -> dict[str, tuple[str, int, slice]]:
    """Return our projection, the part of it and its rows, by Hugging Face's name of a module."""
    dense = replace(config, quantization=None, formats=(), tie_word_embeddings=False)
    made = {}
    for name, fused in fusion_table(dense).items():
        if fused.is_matrix:
            first = 0
            for place, part in enumerate(fused.parts):
                rows = slice(first, first + part.rows)
                first = rows.stop
                made[part.name.removesuffix(".weight")] = name.removesuffix(".weight"), place, rows
    return made


def _holds(projection: Projection, tensor: torch.Tensor) -> bool:
    """Return True if the matrix of ``projection`` was made of the dense ``tensor``."""
    format, parts = projection.format, projection.parts
    if not format.from_dense:
        return False
    own = tensor.to(parts[0].device)
    if format is DENSE:
        return torch.equal(own.to(parts[0].dtype), parts[0])
    stored = format.stored(parts)
    return all(map(torch.equal, format.quantize(own), stored))
