"""Conv windows: rings of conv layers' last inputs, and the rows that a slot may still read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lfm2_fast.cache.batch import on_device
from lfm2_fast.cache.page_pool import CacheError
from lfm2_fast.config import Config


@dataclass
class ConvWindow:
    """One conv layer's past ``B * x``: ``rows [slots, ring, hidden]``, by position modulo ring."""

    rows: torch.Tensor


class ConvWindows:
    """Rings of all conv layers, ``ring = past + spare`` rows a slot, where ``past = width - 1``.

    A row's place follows from its position, so a step writes one row and shifts nothing. A later
    row overwrites an earlier one. ``first_kept`` is the first position that a ring still holds.
    A window that it no longer holds is restored by running the last ``replay_length`` tokens again.
    """

    def __init__(
        self,
        config: Config,
        slots: int,
        *,
        spare: int,
        dummy_slot: bool,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.slots, self.device = slots, torch.device(device)
        self.past = config.conv_L_cache - 1
        self.ring = self.past + spare
        count = config.layer_types.count("conv")
        self.replay_length = self.past * count
        shape = (slots + dummy_slot, self.ring, config.hidden_size)
        # A cache made inside torch.inference_mode must stay writable outside of it.
        with torch.inference_mode(False):
            self.layers = [
                ConvWindow(torch.zeros(shape, device=device, dtype=dtype)) for _ in range(count)
            ]
        # By slot: the first position whose row is still in the ring, counting failed steps; and the
        # length to which launched steps may have extended the slot.
        self._oldest = [0] * slots
        self._expected = [0] * slots

    @property
    def nbytes(self) -> int:
        """Bytes that the rings take on their device."""
        return sum(layer.rows.nbytes for layer in self.layers)

    def first_kept(self, slot: int) -> int:
        """Return the first position whose row is surely still in the ring."""
        return max(self._oldest[slot], self._expected[slot] - self.ring)

    def holds(self, slot: int, length: int) -> bool:
        """Return True if the ring holds the rows that token ``length`` needs."""
        return length == 0 or max(0, length - self.past) >= self.first_kept(slot)

    def check(self, slot: int, length: int) -> None:
        """Raise CacheError if the ring does not hold the rows that token ``length`` needs."""
        if not self.holds(slot, length):
            raise CacheError(
                f"slot {slot} cannot continue from token {length}: its conv rows before that were "
                f"overwritten (it can remove {self.ring - self.past} tokens; a step that failed "
                "counts too); reset the slot and run its tokens again"
            )

    def note_step(self, slot: int, start: int, known: int, end: int) -> None:
        """Note that a step runs a slot's tokens from ``start`` to ``end``.

        The first ``known - start`` of them are a replay. It restores one whole window; older rows
        are wrong.
        """
        kept = self.first_kept(slot) if known and start == known else 0
        if start < known:
            kept = max(known - self.past, 0)
        self._oldest[slot], self._expected[slot] = max(kept, end - self.ring), 0

    def expect(self, slot: int, length: int) -> None:
        """Note that launched steps may extend the slot to ``length`` tokens."""
        self._expected[slot] = length

    def overwrite(self, slot: int, length: int) -> None:
        """Note that a step writes the slot's rows up to ``length`` tokens, accepted or not."""
        self._oldest[slot] = max(self._oldest[slot], length - self.ring)

    def restart(self, slot: int, held: int = 0) -> None:
        """Note that a slot holds ``held`` tokens, but none of their rows."""
        self._oldest[slot], self._expected[slot] = held + 1 if held else 0, 0

    def reorder(self, moved: Mapping[int, int]) -> None:
        """Copy the rows of slots, ``{slot: source}``, all at the same time."""
        kept = {slot: self.first_kept(source) for slot, source in moved.items()}
        to, source = (
            on_device(list(slots), torch.int64, self.device) for slots in (moved, moved.values())
        )
        for layer in self.layers:
            layer.rows[to] = layer.rows[source]
        for slot, first in kept.items():
            self._oldest[slot], self._expected[slot] = first, 0

    def oldest(self) -> torch.Tensor:
        """Return the first kept position of every slot, for ``load``."""
        return torch.tensor([self.first_kept(slot) for slot in range(self.slots)]).long()

    def load(self, oldest: torch.Tensor, rows: list[torch.Tensor]) -> None:
        """Hold the ``rows [slots, ring, hidden]`` of each layer, kept from ``oldest`` on."""
        for layer, saved in zip(self.layers, rows, strict=True):
            layer.rows[: self.slots].copy_(saved)
        self._oldest, self._expected = oldest.tolist(), [0] * self.slots
