"""Cache: the keys and values, and the conv windows, of every sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lfm2_fast.cache.batch import Batch
from lfm2_fast.config import Config

MIN_PAGE = 64
MARKS = 16


@dataclass
class KVPages:
    """One attention layer's ``k, v [pages, kv_heads, page_size, head_dim]``.

    ``table [slots, pages per slot]`` int32, shared by all layers, says which pages hold a slot's
    sequence, in order. This cache gives every slot one page as long as its sequence, which the
    eager body relies on: slot i owns page i.
    """

    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored per slot, by name."""
        return {"k": self.k, "v": self.v}


@dataclass
class ConvWindow:
    """One conv layer's past ``B * x``: ``rows [slots, ring, hidden]``, by position modulo ring."""

    rows: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored per slot, by name."""
        return {"rows": self.rows}


@dataclass
class Mark:
    """A slot's conv windows at one length, ``rows`` one ``[ring, hidden]`` per conv layer."""

    rows: list[torch.Tensor]
    oldest: int


class CacheError(RuntimeError):
    """The cache cannot do what was asked: no room left, or the state needed is gone."""


class Cache:
    """What the model remembers of ``slots`` sequences, each with its own length.

    A sequence's keys and values fill one page, which grows geometrically up to ``max_length``
    tokens. A conv layer keeps a ring of the last ``width - 1 + spare`` rows of ``B * x``, addressed
    by position, so a step writes one row and shifts nothing, and up to ``spare`` tokens can be
    taken back by ``rollback``. ``lengths[slot]``, on the host, is the truth of how much context
    every slot holds; whatever lies beyond it in the tensors is never read.

    ``history[slot]`` lists the token ids that a slot holds, as far as ``record_tokens`` was told.
    Unlike keys and values, conv rows that a ring has passed over are gone; ``mark`` keeps a slot's
    window at its present length (60 to 270 kB at the published sizes), and ``resume`` goes back to
    the newest such place.

    ``dummy_slot`` is the index of an extra slot, which finished sequences write to while others
    still run, or None. ``reallocations`` counts how often the pages have moved. ``kept`` holds the
    decode buffers and graphs that use these pages.
    """

    kept: Any = None

    def __init__(
        self,
        config: Config,
        slots: int,
        max_length: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        spare: int = 1,
        dummy_slot: bool = False,
    ) -> None:
        if slots < 0 or max_length < 1 or spare < 1:
            raise ValueError(
                "a cache needs slots >= 0, max_length >= 1 and spare >= 1, got "
                f"slots={slots}, max_length={max_length}, spare={spare}"
            )
        config = config.to_internal() if hasattr(config, "to_internal") else config
        self.signature = signature(config, dtype, device)
        self.slots = slots
        self.dummy_slot = slots if dummy_slot else None
        self.reallocations = 0
        self.max_length = max_length
        self.past = config.conv_L_cache - 1
        self.ring = self.past + spare
        self.lengths = [0] * slots
        # The first position whose conv row is still in the ring, counting steps that broke off,
        # and the context to which steps that were launched may have gone.
        self._oldest = [0] * slots
        self._expected = [0] * slots
        self.history: list[list[int]] = [[] for _ in range(slots)]
        self._marks: list[dict[int, Mark]] = [{} for _ in range(slots)]
        self._capacity = min(MIN_PAGE, max_length)
        self.layers: list[KVPages | ConvWindow] = []
        places = slots + dummy_slot
        page = (places, config.num_key_value_heads, self._capacity, config.head_dim)
        window = (places, self.ring, config.hidden_size)
        # A cache made inside torch.inference_mode must stay writable outside of it.
        with torch.inference_mode(False):
            table = torch.arange(places, dtype=torch.int32, device=device)[:, None]
            for kind in config.layer_types:
                if kind == "conv":
                    rows = torch.zeros(window, device=device, dtype=dtype)
                    self.layers.append(ConvWindow(rows))
                else:
                    k = torch.empty(page, device=device, dtype=dtype)
                    self.layers.append(KVPages(k, torch.empty_like(k), table))

    def __getstate__(self) -> dict[str, Any]:
        """A copy keeps nothing that points at the tensors of this one."""
        return {name: value for name, value in self.__dict__.items() if name != "kept"}

    def get_seq_length(self) -> int:
        """Tokens held by the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def nbytes(self) -> int:
        """Bytes that the pages and windows take on their device."""
        return sum(t.nbytes for layer in self.layers for t in layer.tensors().values())

    def next_batch(
        self,
        query_lengths: Sequence[int],
        slots: Sequence[int],
        device: torch.device | str,
        final_lengths: Sequence[int] | None = None,
    ) -> Batch:
        """Return the batch that continues each ``slots[i]`` by ``query_lengths[i]`` tokens.

        ``final_lengths`` are those of ``Batch.prepare``. Raises ValueError for a slot that the
        cache does not have, and as ``Batch.prepare`` does.
        """
        for slot in slots:
            if not 0 <= slot < self.slots:
                raise ValueError(f"slot {slot} is not one of the cache's {self.slots} slots")
        starts = [self.lengths[slot] for slot in slots]
        return Batch.prepare(query_lengths, starts, slots, device, final_lengths)

    def reserve(self, batch: Batch) -> None:
        """Make room for ``batch`` and note which conv rows it will overwrite.

        Called before a step runs. Raises CacheError when a sequence would pass ``max_length`` or
        the conv rows that it continues from are gone; then nothing has changed.
        """
        for slot, start, n in batch.required_host:
            if start != self.lengths[slot]:
                raise CacheError(
                    f"the batch continues slot {slot} at token {start}, but the cache holds "
                    f"{self.lengths[slot]}; prepare a new batch for every step"
                )
            if start + n > self.max_length:
                raise CacheError(
                    f"slot {slot} holds {start} tokens and {n} more do not fit into the cache's "
                    f"max_length of {self.max_length}; start a cache with a larger max_length"
                )
            self._check_window(slot, start)
        self._grow(max((start + n for _, start, n in batch.required_host), default=0))
        for slot, start, n in batch.required_host:
            kept = self._first_kept(slot) if start else 0
            self._oldest[slot], self._expected[slot] = max(kept, start + n - self.ring), 0

    def commit_batch(self, batch: Batch) -> None:
        """Count the tokens of ``batch`` as held. Called after a step has run."""
        for slot, start, n in batch.required_host:
            self.lengths[slot] = start + n

    def make_room(self, tokens: int) -> None:
        """See that every slot has room for a context of so many tokens, before steps are launched.

        Raises CacheError when that is more than ``max_length``.
        """
        if tokens > self.max_length:
            raise CacheError(
                f"{tokens} tokens do not fit into the cache's max_length of {self.max_length}; "
                "start a cache with a larger max_length"
            )
        self._grow(tokens)

    def expect_length(self, slot: int, length: int) -> None:
        """Note that launched steps may extend the slot to ``length`` tokens.

        They overwrite its conv rows. A later call replaces this value.
        """
        self._expected[slot] = length

    def commit_token(self, slot: int, token: int) -> None:
        """Count one more token that an expected step has run in ``slot``."""
        if len(self.history[slot]) == self.lengths[slot]:
            self.history[slot].append(token)
        self.lengths[slot] += 1

    def record_tokens(self, batch: Batch, chunks: Iterable[Sequence[int]]) -> None:
        """Note which tokens ``batch`` ran, one chunk per sequence, in the slots' histories.

        A slot whose history already lacks earlier tokens stays as it is: a prefix is all it tells.
        """
        for (slot, start, _), chunk in zip(batch.required_host, chunks, strict=True):
            if len(self.history[slot]) == start:
                self.history[slot].extend(chunk)

    def rollback(self, tokens: int, slots: Iterable[int] | None = None) -> None:
        """Take back the last ``tokens`` of every given slot (default: all), as if never run.

        Raises CacheError when a slot holds fewer, or when its conv rows from before them have been
        overwritten; make the cache with a larger ``spare`` then. On an error nothing has changed.
        """
        chosen = range(self.slots) if slots is None else list(slots)
        if tokens < 0:
            raise ValueError(f"cannot take back {tokens} tokens")
        for slot in chosen:
            length = self.lengths[slot] - tokens
            if length < 0:
                raise CacheError(
                    f"cannot take back {tokens} tokens of slot {slot}, "
                    f"it holds {self.lengths[slot]}"
                )
            self._check_window(slot, length)
        for slot in chosen:
            self._truncate(slot, self.lengths[slot] - tokens)

    def reset(self, slots: Iterable[int] | None = None) -> None:
        """Forget every token of the given slots (default: all)."""
        for slot in range(self.slots) if slots is None else slots:
            self._truncate(slot, 0)

    def mark(self, slot: int) -> None:
        """Keep the slot's conv windows as they are now, so that ``resume`` can come back here.

        A slot keeps its newest MARKS marks.
        """
        marks = self._marks[slot]
        marks.pop(self.lengths[slot], None)
        rows = [layer.rows[slot].clone() for layer in self.layers if isinstance(layer, ConvWindow)]
        marks[self.lengths[slot]] = Mark(rows, self._first_kept(slot))
        if len(marks) > MARKS:
            del marks[min(marks)]

    def resume(self, slot: int, length: int) -> int:
        """Go back to the longest restorable context of at most ``length`` tokens; give its length.

        That is ``length`` itself if the ring still holds its conv rows, else a mark, else 0.
        """
        length = min(length, self.lengths[slot])
        if not self._has_window(slot, length):
            marks = self._marks[slot]
            length = max((marked for marked in marks if marked <= length), default=0)
            # First the bookkeeping: if the copies break off, the window still counts as gone.
            self._truncate(slot, length)
            if length:
                windows = (layer for layer in self.layers if isinstance(layer, ConvWindow))
                for window, rows in zip(windows, marks[length].rows, strict=True):
                    window.rows[slot] = rows
                self._oldest[slot], self._expected[slot] = marks[length].oldest, 0
        self._truncate(slot, length)
        return length

    def copy(self, source: int, target: int) -> None:
        """Make slot ``target`` hold what slot ``source`` holds."""
        held = self.lengths[source]
        self._truncate(target, 0)
        for layer in self.layers:
            if isinstance(layer, ConvWindow):
                layer.rows[target] = layer.rows[source]
            else:
                layer.k[target, :, :held] = layer.k[source, :, :held]
                layer.v[target, :, :held] = layer.v[source, :, :held]
        self.lengths[target] = held
        self._oldest[target], self._expected[target] = self._first_kept(source), 0
        self.history[target] = list(self.history[source])
        self._marks[target] = dict(self._marks[source])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A copy of everything held, as named tensors that ``load_state_dict`` takes back."""
        state = {
            "lengths": torch.tensor(self.lengths, dtype=torch.int64),
            "oldest": torch.tensor(list(map(self._first_kept, range(self.slots)))).long(),
            "recorded": torch.tensor([len(h) for h in self.history], dtype=torch.int64),
            "history": torch.tensor([t for h in self.history for t in h], dtype=torch.int64),
        }
        held = self.get_seq_length()
        for i, layer in enumerate(self.layers):
            if isinstance(layer, ConvWindow):
                state[f"layers.{i}.rows"] = layer.rows[: self.slots].clone()
            else:
                state[f"layers.{i}.k"] = layer.k[: self.slots, :, :held].clone()
                state[f"layers.{i}.v"] = layer.v[: self.slots, :, :held].clone()
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Hold what ``state`` says. Raises CacheError if it is from a cache of another shape."""
        held = int(state["lengths"].max()) if self.slots else 0
        recorded = int(state["recorded"].sum()) if self.slots else 0
        wanted: dict[str, tuple[int, ...]]
        wanted = {name: (self.slots,) for name in ("lengths", "oldest", "recorded")}
        wanted["history"] = (recorded,)
        for i, layer in enumerate(self.layers):
            for name, tensor in layer.tensors().items():
                shape = [self.slots, *tensor.shape[1:]]
                if name != "rows":
                    shape[2] = held
                wanted[f"layers.{i}.{name}"] = tuple(shape)
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if found != wanted or held > self.max_length:
            wrong = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
            raise CacheError(
                f"this state is not of a cache with {self.slots} slots, ring {self.ring} and "
                f"max_length {self.max_length}; it differs in {wrong or ['lengths']}"
            )
        self._grow(held)
        for i, layer in enumerate(self.layers):
            if isinstance(layer, ConvWindow):
                layer.rows[: self.slots].copy_(state[f"layers.{i}.rows"])
            else:
                layer.k[: self.slots, :, :held].copy_(state[f"layers.{i}.k"])
                layer.v[: self.slots, :, :held].copy_(state[f"layers.{i}.v"])
        self.lengths = state["lengths"].tolist()
        self._oldest, self._expected = state["oldest"].tolist(), [0] * self.slots
        parts = state["history"].split(state["recorded"].tolist())
        self.history = [part.tolist() for part in parts]
        self._marks = [{} for _ in range(self.slots)]

    def _truncate(self, slot: int, length: int) -> None:
        """Hold only the first ``length`` tokens of a slot whose windows fit that length."""
        self.lengths[slot] = length
        del self.history[slot][length:]
        marks = self._marks[slot]
        self._marks[slot] = {marked: mark for marked, mark in marks.items() if marked <= length}
        if length == 0:
            self._oldest[slot] = self._expected[slot] = 0

    def _first_kept(self, slot: int) -> int:
        """The first position whose conv row is surely still in the ring."""
        return max(self._oldest[slot], self._expected[slot] - self.ring)

    def _has_window(self, slot: int, length: int) -> bool:
        """Whether the ring holds the conv rows that token ``length`` needs."""
        return length == 0 or max(0, length - self.past) >= self._first_kept(slot)

    def _check_window(self, slot: int, length: int) -> None:
        if not self._has_window(slot, length):
            raise CacheError(
                f"slot {slot} cannot go on from token {length}: its conv rows before that were "
                f"overwritten (it can take back {self.ring - self.past} tokens; a step that broke "
                "off counts too); reset the slot and run its tokens again"
            )

    def _grow(self, tokens: int) -> None:
        """Make pages of at least ``tokens``, with all that those before hold."""
        if tokens <= self._capacity:
            return
        # Steps that the host has not counted yet may have written rows as well.
        held = max((*self.lengths, *self._expected), default=0)
        capacity = min(self.max_length, max(tokens, 2 * self._capacity))
        with torch.inference_mode(False):
            for layer in self.layers:
                if isinstance(layer, KVPages):
                    k, v = (_longer(pages, capacity, held) for pages in (layer.k, layer.v))
                    layer.k, layer.v = k, v
        self._capacity = capacity
        self.reallocations += 1


def signature(config: Config, dtype: torch.dtype, device: torch.device | str) -> tuple[Any, ...]:
    """Return the values that a cache and the model that runs on it must have in common."""
    heads = (config.num_key_value_heads, config.head_dim)
    sizes = (*heads, config.hidden_size, config.conv_L_cache)
    return (tuple(config.layer_types), *sizes, dtype, torch.empty(0, device=device).device)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    count = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        count += 1
    return count


def _longer(pages: torch.Tensor, page_size: int, held: int) -> torch.Tensor:
    slots, kv_heads, _, head_dim = pages.shape
    longer = pages.new_empty(slots, kv_heads, page_size, head_dim)
    longer[:, :, :held] = pages[:, :, :held]
    return longer
