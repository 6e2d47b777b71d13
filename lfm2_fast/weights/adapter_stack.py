"""AdapterStack: the low-rank changes of one matrix, an entry for each adapter that is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class AdapterStack:
    """Changes of a fused matrix ``[N, K]`` of P parts; A entries, of which the first is zeros.

    A token ``x [K]`` of entry ``a`` has ``up[a].T @ (down[a] @ x)`` added to its product, each
    part's rows by that part's ``down``: ``down [A, P, R, K]``, ``up [A, R, N]``. ``parts`` has the
    rows of each, ``ends [P]`` where each ends, on the host. ``gain [A, N]`` times the product
    without its bias, and ``shift [A, N]``, are added too: DoRA's scale, and a bias. Of an embedding
    ``[V, H]``, whose K are the tokens, ``down [A, V, R]`` has a row a token, and N is H.
    """

    down: torch.Tensor
    up: torch.Tensor
    gain: torch.Tensor
    shift: torch.Tensor
    parts: tuple[int, ...]
    ends: torch.Tensor

    @classmethod
    def empty(
        cls,
        entries: int,
        rank: int,
        parts: tuple[int, ...],
        columns: int,
        *,
        is_table: bool,
        like: torch.Tensor,
    ) -> AdapterStack:
        """Return zeros for ``entries`` of at most ``rank``; ``parts`` are the rows of each."""
        rows = sum(parts)
        down = (entries, rows, rank) if is_table else (entries, len(parts), rank, columns)
        width = columns if is_table else rows
        return cls(
            like.new_zeros(down),
            like.new_zeros(entries, rank, width),
            like.new_zeros(entries, width),
            like.new_zeros(entries, width),
            parts,
            torch.tensor(parts, device="cpu").cumsum(0),
        )

    @property
    def entries(self) -> int:
        """Entries that there are, the zeros included."""
        return len(self.up)

    @property
    def rank(self) -> int:
        """Largest rank that an entry may have."""
        return self.up.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(part.nbytes for part in (self.down, self.up, self.gain, self.shift))

    def take_over(self, other: AdapterStack) -> None:
        """Copy the entries of a smaller stack."""
        n, r = other.entries, other.rank
        self.down[:n, :, :r] = other.down
        self.up[:n, :r] = other.up
        self.gain[:n], self.shift[:n] = other.gain, other.shift

    def clear(self, entry: int) -> None:
        """Make an entry zeros, as one without a change."""
        for part in (self.down, self.up, self.gain, self.shift):
            part[entry] = 0

    def apply(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> AdapterStack:
        """Return the stack with ``fn``, a move or a cast, applied to its numbers."""
        down, up, gain, shift = (fn(each) for each in (self.down, self.up, self.gain, self.shift))
        return AdapterStack(down, up, gain, shift, self.parts, self.ends)
