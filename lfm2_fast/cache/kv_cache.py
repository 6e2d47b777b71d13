"""Cache: the pages of keys and values, and the conv windows, of every sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from lfm2_fast.cache.batch import Batch, on_device
from lfm2_fast.cache.page_memory import PAGE_SIZE, PageMemory, pages_of
from lfm2_fast.cache.page_pool import CacheError, PagePool
from lfm2_fast.cache.prefix_index import Match
from lfm2_fast.config import Config


@dataclass
class KVPages:
    """One attention layer's ``k, v [pages, kv_heads, page_size, head_dim]``.

    ``table [slots, pages per slot]`` int32, shared by all layers, says which pages hold a slot's
    sequence, in order. Entries beyond a sequence mean nothing.
    """

    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor


@dataclass
class ConvWindow:
    """One conv layer's past ``B * x``: ``rows [slots, ring, hidden]``, by position modulo ring."""

    rows: torch.Tensor


class Cache:
    """Memory of a model for ``slots`` sequences, each with its own length.

    Keys and values lie in pages of ``PAGE_SIZE`` tokens, up to ``max_length`` tokens a sequence. A
    sequence takes a page when it needs one, and gives its pages back when it is reset. Sequences
    that begin alike may share full pages; a page with two owners is never written. ``pages``
    bounds the pages of all sequences together (default: enough for all at full length).

    A conv layer keeps a ring of the last ``width - 1 + spare`` rows of ``B * x``, addressed by
    position, so a step writes one row and shifts nothing. A window that the ring has passed over
    is made again: the last ``replay_length`` tokens run once more, reading keys and values and
    writing none. ``replay`` says how many tokens a slot must run again before it goes on.

    ``lengths[slot]``, on the host, is the truth of how much context every slot holds; whatever lies
    beyond it in the tensors is never read. ``history[slot]`` lists the token ids that a slot holds,
    as far as ``record_tokens`` was told.

    ``dummy_slot`` is the index of an extra slot, which finished sequences write to while others
    still run, or None. With ``in_place`` pages never move, as captured graphs need, and tables are
    narrow views that widen; ``reallocations`` counts how often they did.
    """

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
        in_place: bool = False,
        pages: int | None = None,
    ) -> None:
        if slots < 0 or max_length < 1 or spare < 1:
            raise ValueError(
                "a cache needs slots >= 0, max_length >= 1 and spare >= 1, got "
                f"slots={slots}, max_length={max_length}, spare={spare}"
            )
        config = config.to_internal() if hasattr(config, "to_internal") else config
        self._made_with = {
            "config": config,
            "slots": slots,
            "max_length": max_length,
            "device": device,
            "dtype": dtype,
            "spare": spare,
            "dummy_slot": dummy_slot,
            "in_place": in_place,
            "pages": pages,
        }
        self.signature = signature(config, dtype, device)
        self.slots = slots
        self.dummy_slot = slots if dummy_slot else None
        self.reallocations = 0
        self.max_length = max_length
        self._follows_length = config.rope_follows_length
        self.past = config.conv_L_cache - 1
        self.ring = self.past + spare
        self.replay_length = self.past * config.layer_types.count("conv")
        self.lengths = [0] * slots
        # The first position whose conv row is still in the ring, counting steps that broke off,
        # and the context to which steps that were launched may have gone.
        self._oldest = [0] * slots
        self._expected = [0] * slots
        self.history: list[list[int]] = [[] for _ in range(slots)]
        places, most = slots + dummy_slot, pages_of(max_length)
        memory = PageMemory(
            config.layer_types.count("full_attention"),
            config.num_key_value_heads,
            config.head_dim,
            limit=(slots * most if pages is None else pages) + dummy_slot,
            device=device,
            dtype=dtype,
            in_place=in_place,
        )
        self.pool = PagePool(memory)
        self._pages: list[list[int]] = [[] for _ in range(slots)]
        self.layers: list[KVPages | ConvWindow] = []
        window = (places, self.ring, config.hidden_size)
        # A cache made inside torch.inference_mode must stay writable outside of it.
        with torch.inference_mode(False):
            self._table = torch.zeros(places, most, dtype=torch.int32, device=device)
            for kind in config.layer_types:
                if kind == "conv":
                    rows = torch.zeros(window, device=device, dtype=dtype)
                    self.layers.append(ConvWindow(rows))
                else:
                    self.layers.append(KVPages(self._table, self._table, self._table))
        # Kernels of a GPU launch as many programs as the table has columns for.
        self._columns = 1 if in_place and memory.device.type != "cpu" else most
        if dummy_slot:
            self._table[slots, 0] = self.pool.take(1)[0]
        self._view = self._table[:, : self._columns]
        self._lay_out()

    def __getstate__(self) -> dict[str, Any]:
        """A copy holds the same sequences in memory of its own."""
        return {"made_with": self._made_with, "state": self.state_dict()}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__init__(**saved["made_with"])  # type: ignore[misc]
        self.load_state_dict(saved["state"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        made = object.__new__(Cache)
        made.__setstate__(self.__getstate__())
        return made

    def get_seq_length(self) -> int:
        """Tokens held by the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def nbytes(self) -> int:
        """Bytes that the pages and windows take on their device."""
        windows = (layer.rows.nbytes for layer in self.layers if isinstance(layer, ConvWindow))
        return self.pool.memory.nbytes + sum(windows)

    def pages(self, slot: int) -> list[int]:
        """Return the numbers of the pages that hold a slot's sequence, in order."""
        return list(self._pages[slot])

    def take_memory(self) -> None:
        """Take the memory of all pages now. Raises torch.OutOfMemoryError as torch does."""
        self.pool.take_memory()
        self._lay_out()

    def next_batch(
        self,
        query_lengths: Sequence[int],
        slots: Sequence[int],
        device: torch.device | str,
        final_lengths: Sequence[int] | None = None,
        *,
        replays: Sequence[int] | None = None,
    ) -> Batch:
        """Return the batch that continues each ``slots[i]`` by ``query_lengths[i]`` tokens.

        The first ``replays[i]`` of them are run again: their keys and values are there.
        ``final_lengths`` are those of ``Batch.prepare``. Raises ValueError for a slot that the
        cache does not have, and as ``Batch.prepare`` does.
        """
        for slot in slots:
            if not 0 <= slot < self.slots:
                raise ValueError(f"slot {slot} is not one of the cache's {self.slots} slots")
        held = [self.lengths[slot] for slot in slots]
        if replays is None or not any(replays):
            return Batch.prepare(query_lengths, held, slots, device, final_lengths)
        starts = [length - again for length, again in zip(held, replays, strict=True)]
        return Batch.prepare(query_lengths, starts, slots, device, final_lengths, write_from=held)

    def reserve(self, batch: Batch) -> None:
        """Make room for ``batch`` and note which conv rows it will overwrite.

        Called before a step runs. Raises CacheError when a sequence would pass ``max_length``, the
        pages do not suffice, or the conv rows that it continues from are gone; then nothing has
        changed.
        """
        host = batch.required_host
        held = host.starts if host.write_from is None else host.write_from
        for (slot, start, n), known in zip(host, held, strict=True):
            if known != self.lengths[slot]:
                raise CacheError(
                    f"the batch continues slot {slot} at token {known}, but the cache holds "
                    f"{self.lengths[slot]}; prepare a new batch for every step"
                )
            if start + n > self.max_length:
                raise CacheError(
                    f"slot {slot} holds {known} tokens and {start + n - known} more do not fit "
                    f"into the cache's max_length of {self.max_length}; start a cache with a "
                    "larger max_length"
                )
            if known - start < min(known, self.replay_length):
                self._check_window(slot, start)
        self.make_room({slot: start + n for slot, start, n in host})
        for (slot, start, n), known in zip(host, held, strict=True):
            # What was replayed is only a window's from the token on from which it was whole.
            kept = self._first_kept(slot) if known and start == known else 0
            if start < known:
                kept = max(known - self.past, 0)
            self._oldest[slot], self._expected[slot] = max(kept, start + n - self.ring), 0

    def commit_batch(self, batch: Batch) -> None:
        """Count the tokens of ``batch`` as held. Called after a step has run."""
        for slot, start, n in batch.required_host:
            self.lengths[slot] = start + n

    def make_room(self, contexts: dict[int, int]) -> None:
        """See that each slot has pages of its own for its context, in tokens.

        Raises CacheError when one is more than ``max_length``, or there are not enough pages; then
        nothing has changed.
        """
        wanted: list[tuple[int, int]] = []
        for slot, tokens in contexts.items():
            if tokens > self.max_length:
                raise CacheError(
                    f"{tokens} tokens do not fit into the cache's max_length of "
                    f"{self.max_length}; start a cache with a larger max_length"
                )
            pages = self._pages[slot]
            first = self.lengths[slot] // PAGE_SIZE
            # The page that is written next, if it has another owner, and those to come.
            if first < len(pages) and tokens > self.lengths[slot]:
                if self.pool.is_shared(pages[first]):
                    wanted.append((slot, first))
            wanted.extend((slot, column) for column in range(len(pages), pages_of(tokens)))
        if not wanted:
            return
        taken = self._take(len(wanted))
        self._widen(max(column for _, column in wanted) + 1)
        for (slot, column), page in zip(wanted, taken, strict=True):
            pages = self._pages[slot]
            if column < len(pages):
                self.pool.memory.copy(pages[column], page, self.lengths[slot] % PAGE_SIZE)
                self.pool.release([pages[column]])
                pages[column] = page
            else:
                pages.append(page)
        rows, columns = zip(*wanted, strict=True)
        device = self._table.device
        at = on_device(rows, torch.int64, device), on_device(columns, torch.int64, device)
        self._table[at] = on_device(taken, torch.int32, device)

    def expect_length(self, slot: int, length: int) -> None:
        """Note that launched steps may extend the slot to ``length`` tokens.

        They overwrite its conv rows. A later call replaces this value.
        """
        self._expected[slot] = length

    def overwrite(self, slot: int, length: int) -> None:
        """Note that a step writes the slot's conv rows up to ``length`` tokens, accepted or not."""
        self._oldest[slot] = max(self._oldest[slot], length - self.ring)

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
            if len(self.history[slot]) >= start:
                self.history[slot][start:] = chunk

    def replay(self, slot: int) -> list[int]:
        """Return the last tokens of a slot that must run again before it goes on.

        They are none where its conv windows are there. Raises CacheError where they are not, and
        the tokens are not known either.
        """
        length = self.lengths[slot]
        if self._has_window(slot, length):
            return []
        first = max(0, length - self.replay_length)
        if len(self.history[slot]) < length:
            self._check_window(slot, length)
        return self.history[slot][first:length]

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
            self.truncate(slot, self.lengths[slot] - tokens)

    def reset(self, slots: Iterable[int] | None = None) -> None:
        """Forget every token of the given slots (default: all), and give their pages back."""
        for slot in range(self.slots) if slots is None else slots:
            self.truncate(slot, 0)

    def truncate(self, slot: int, length: int) -> None:
        """Hold only the first ``length`` tokens of a slot, and give the other pages back.

        Where that goes back too far for the conv windows, ``replay`` says what to run again.
        """
        self.lengths[slot] = length
        del self.history[slot][length:]
        kept = pages_of(length)
        self.pool.release(self._pages[slot][kept:])
        del self._pages[slot][kept:]
        if length == 0:
            self._oldest[slot] = self._expected[slot] = 0

    def go_back(self, slot: int, length: int) -> int:
        """Hold at most the first ``length`` tokens of a slot, and return how many it holds.

        They are none where the conv windows are gone and running tokens again would not bring them
        back: with RoPE scaling that goes by the length of the context.
        """
        if self._follows_length and not self._has_window(slot, length):
            length = 0
        self.truncate(slot, length)
        return length

    def attach(self, slot: int, match: Match, tokens: Sequence[int]) -> None:
        """Make an empty slot hold the matched ``tokens``: whole pages shared, of one page a copy.

        Without a page for the copy the slot holds the whole pages alone.
        """
        assert not self.lengths[slot] and len(tokens) == match.tokens
        pages, held = list(match.pages), len(match.pages) * PAGE_SIZE
        self.pool.share(pages)
        if match.partial is not None:
            # Owned while it is read, so that it is not the page that is taken.
            self.pool.share([match.partial])
            with suppress(CacheError):
                pages += self._take(1)
                self.pool.memory.copy(match.partial, pages[-1], match.rows)
                held += match.rows
            self.pool.release([match.partial])
        self._hold(slot, pages, held)
        self.history[slot] = list(tokens[:held])
        # No window is there: all that the slot goes on from is replayed.
        self._oldest[slot] = held + 1 if held else 0

    def copy(self, source: int, target: int) -> None:
        """Make slot ``target`` hold what slot ``source`` holds, sharing its full pages."""
        self.reorder({target: source})

    def reorder(self, sources: Mapping[int, int]) -> None:
        """Make each slot hold what another one holds, ``{slot: source}``, all at the same time.

        Full pages are shared. An unfinished page is copied, but for one slot that takes it over
        where its source gives it up. Raises CacheError where the pages do not suffice; the slots
        that were to change are empty then.
        """
        moved = {slot: source for slot, source in sources.items() if slot != source}
        pages: dict[int, list[int]] = {}
        copies: list[tuple[int, int, int]] = []
        given: set[int] = set()
        for slot, source in moved.items():
            full, rest = divmod(self.lengths[source], PAGE_SIZE)
            taken_over = bool(rest) and source in moved and source not in given
            if taken_over:
                given.add(source)
            elif rest:
                copies.append((slot, self._pages[source][full], rest))
            pages[slot] = self._pages[source][: full + taken_over]
            self.pool.share(pages[slot])
        held = {
            slot: (self.lengths[source], self._first_kept(source), list(self.history[source]))
            for slot, source in moved.items()
        }
        for slot in moved:
            self.truncate(slot, 0)
        try:
            made = self._take(len(copies))
        except CacheError:
            for own in pages.values():
                self.pool.release(own)
            raise
        for (slot, page, rest), copy in zip(copies, made, strict=True):
            self.pool.memory.copy(page, copy, rest)
            pages[slot].append(copy)
        device = self._table.device
        to, out_of = (
            on_device(list(each), torch.int64, device) for each in (moved, moved.values())
        )
        for layer in self.layers:
            if isinstance(layer, ConvWindow):
                layer.rows[to] = layer.rows[out_of]
        for slot, (length, first_kept, history) in held.items():
            self._hold(slot, pages[slot], length)
            self._oldest[slot], self._expected[slot] = first_kept, 0
            self.history[slot] = history

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A copy of everything held, as named tensors that ``load_state_dict`` takes back."""
        state = {
            "lengths": torch.tensor(self.lengths, dtype=torch.int64),
            "oldest": torch.tensor(list(map(self._first_kept, range(self.slots)))).long(),
            "recorded": torch.tensor([len(h) for h in self.history], dtype=torch.int64),
            "history": torch.tensor([t for h in self.history for t in h], dtype=torch.int64),
        }
        pages = [
            self.pool.memory.page(page)
            for slot in range(self.slots)
            for page in self._pages[slot][: pages_of(self.lengths[slot])]
        ]
        none = torch.empty(0, *self.pool.memory.shape, dtype=self.pool.memory.dtype)
        state["pages"] = torch.stack(pages) if pages else none
        for i, layer in enumerate(self.layers):
            if isinstance(layer, ConvWindow):
                state[f"layers.{i}.rows"] = layer.rows[: self.slots].clone()
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Hold what ``state`` says. Raises CacheError if it is from a cache of another shape."""
        lengths = state["lengths"].tolist()
        recorded = int(state["recorded"].sum()) if self.slots else 0
        wanted: dict[str, tuple[int, ...]]
        wanted = {name: (self.slots,) for name in ("lengths", "oldest", "recorded")}
        wanted["history"] = (recorded,)
        wanted["pages"] = (sum(map(pages_of, lengths)), *self.pool.memory.shape)
        for i, layer in enumerate(self.layers):
            if isinstance(layer, ConvWindow):
                wanted[f"layers.{i}.rows"] = (self.slots, *layer.rows.shape[1:])
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if found != wanted or max(lengths, default=0) > self.max_length:
            wrong = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
            raise CacheError(
                f"this state is not of a cache with {self.slots} slots, ring {self.ring} and "
                f"max_length {self.max_length}; it differs in {wrong or ['lengths']}"
            )
        self.reset()
        self.make_room(dict(enumerate(lengths)))
        saved = iter(state["pages"])
        for pages in self._pages:
            for page in pages:
                self.pool.memory.page(page).copy_(next(saved))
        for i, layer in enumerate(self.layers):
            if isinstance(layer, ConvWindow):
                layer.rows[: self.slots].copy_(state[f"layers.{i}.rows"])
        self.lengths = lengths
        self._oldest, self._expected = state["oldest"].tolist(), [0] * self.slots
        parts = state["history"].split(state["recorded"].tolist())
        self.history = [part.tolist() for part in parts]

    def _hold(self, slot: int, pages: list[int], length: int) -> None:
        """Make an empty slot hold ``length`` tokens in ``pages``."""
        self._widen(len(pages))
        self._pages[slot], self.lengths[slot] = pages, length
        row = on_device(pages, torch.int32, self._table.device)
        self._table[slot, : len(pages)] = row

    def _take(self, count: int) -> list[int]:
        """Own ``count`` pages; layers see memory that grew. Raises CacheError as the pool does."""
        known = self.pool.memory.count
        taken = self.pool.take(count)
        if self.pool.memory.count != known:
            self._lay_out()
        return taken

    def _first_kept(self, slot: int) -> int:
        """The first position whose conv row is surely still in the ring."""
        return max(self._oldest[slot], self._expected[slot] - self.ring)

    def _has_window(self, slot: int, length: int) -> bool:
        """Return True if the ring holds the conv rows that token ``length`` needs."""
        return length == 0 or max(0, length - self.past) >= self._first_kept(slot)

    def _check_window(self, slot: int, length: int) -> None:
        if not self._has_window(slot, length):
            raise CacheError(
                f"slot {slot} cannot go on from token {length}: its conv rows before that were "
                f"overwritten (it can take back {self.ring - self.past} tokens; a step that broke "
                "off counts too); reset the slot and run its tokens again"
            )

    def _widen(self, columns: int) -> None:
        """Have tables of at least ``columns``."""
        if columns > self._columns:
            self._columns = min(max(columns, 2 * self._columns), self._table.shape[1])
            self.reallocations += 1
            self._view = self._table[:, : self._columns]
            self._lay_out()

    def _lay_out(self) -> None:
        """Hand every layer the pages and the table as they are now."""
        attention = (layer for layer in self.layers if isinstance(layer, KVPages))
        for number, layer in enumerate(attention):
            layer.k, layer.v = self.pool.memory.layer(number)
            # One object until it widens: bodies keep by it what their graphs point at.
            layer.table = self._view


def signature(config: Config, dtype: torch.dtype, device: torch.device | str) -> tuple[Any, ...]:
    """Return the values that a cache and the model that runs on it must have in common."""
    heads = (config.num_key_value_heads, config.head_dim)
    sizes = (*heads, config.hidden_size, config.conv_L_cache)
    return (tuple(config.layer_types), *sizes, dtype, torch.empty(0, device=device).device)
