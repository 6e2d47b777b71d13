"""Cache: the pages of keys and values, and the conv windows, of every sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from lfm2_fast.cache.batch import Batch
from lfm2_fast.cache.conv_windows import ConvWindow, ConvWindows
from lfm2_fast.cache.page_memory import PageMemory, pages_of
from lfm2_fast.cache.page_pool import CacheError
from lfm2_fast.cache.prefix_index import Match
from lfm2_fast.cache.slot_pages import KVPages, SlotPages
from lfm2_fast.config import Config


class Cache:
    """Memory of a model for ``slots`` sequences, each with its own length.

    Keys and values are in pages of ``PAGE_SIZE`` tokens, up to ``max_length`` tokens a sequence. A
    sequence takes a page when it needs one, and gives its pages back when it is reset. Sequences
    with the same beginning may share full pages. A page with two owners is never written. ``pages``
    limits the pages of all sequences together (default: enough for all at full length).

    A conv layer keeps a ring of the last ``width - 1 + spare`` rows of ``B * x`` (``ConvWindows``).
    A window that is no longer in the ring is restored: the last ``replay_length`` tokens run again,
    reading keys and values and writing none. ``replay`` gives the tokens that a slot must run again
    before it continues.

    ``lengths[slot]``, on the host, is the number of tokens in a slot. Nothing beyond it in the
    tensors is read. ``history[slot]`` lists the token ids that ``record_tokens`` was given.

    ``dummy_slot`` is None, or the index of an extra slot. Finished sequences write to it while
    others still run. With ``in_place`` pages never move, as captured graphs need, and tables are
    narrow views that widen. ``reallocations`` counts how often they did.

    ``draft_layers`` more attention layers are those of a drafter. A page holds theirs too.
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
        draft_layers: int = 0,
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
            "draft_layers": draft_layers,
        }
        self.signature = signature(config, dtype, device)
        self.slots = slots
        self.dummy_slot = slots if dummy_slot else None
        self.max_length = max_length
        self._follows_length = config.rope_follows_length
        self.lengths = [0] * slots
        self.history: list[list[int]] = [[] for _ in range(slots)]
        most = pages_of(max_length)
        memory = PageMemory(
            config.layer_types.count("full_attention") + draft_layers,
            config.num_key_value_heads,
            config.head_dim,
            limit=(slots * most if pages is None else pages) + dummy_slot,
            device=device,
            dtype=dtype,
            in_place=in_place,
        )
        self._pages = SlotPages(memory, slots, most, dummy=dummy_slot, in_place=in_place)
        self.pool = self._pages.pool
        self.windows = ConvWindows(
            config, slots, spare=spare, dummy_slot=dummy_slot, device=device, dtype=dtype
        )
        self.past, self.ring = self.windows.past, self.windows.ring
        self.replay_length = self.windows.replay_length
        attention, conv = iter(self._pages.layers), iter(self.windows.layers)
        self.layers: list[KVPages | ConvWindow] = [
            next(conv) if kind == "conv" else next(attention) for kind in config.layer_types
        ]
        self.draft_layers = list(attention)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which holds the same sequences in memory of its own."""
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
    def reallocations(self) -> int:
        """Number of times that the tables of pages have widened."""
        return self._pages.reallocations

    @property
    def nbytes(self) -> int:
        """Bytes that the pages and windows take on their device."""
        return self.pool.memory.nbytes + self.windows.nbytes

    def pages(self, slot: int) -> list[int]:
        """Return the numbers of the pages that hold a slot's sequence, in order."""
        return list(self._pages[slot])

    def take_memory(self) -> None:
        """Take the memory of all pages now. Raises torch.OutOfMemoryError as torch does."""
        self._pages.take_memory()

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

        The first ``replays[i]`` of them run again: their keys and values exist already.
        ``final_lengths`` are those of ``Batch.prepare``. Raises ValueError for a slot that the
        cache does not have, and for the reasons of ``Batch.prepare``.
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

        Called before a step runs. Raises CacheError if a sequence would pass ``max_length``, if
        there are too few pages, or if the conv rows before it are gone. Then nothing has changed.
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
                self.windows.check(slot, start)
        self.make_room({slot: start + n for slot, start, n in host})
        for (slot, start, n), known in zip(host, held, strict=True):
            self.windows.note_step(slot, start, known, start + n)

    def commit_batch(self, batch: Batch) -> None:
        """Count the tokens of ``batch`` as held. Called after a step has run."""
        for slot, start, n in batch.required_host:
            self.lengths[slot] = start + n

    def make_room(self, contexts: dict[int, int]) -> None:
        """Give each slot pages of its own for its context, in tokens.

        Raises CacheError if a context is longer than ``max_length``, or if there are too few pages.
        Then nothing has changed.
        """
        for tokens in contexts.values():
            if tokens > self.max_length:
                raise CacheError(
                    f"{tokens} tokens do not fit into the cache's max_length of "
                    f"{self.max_length}; start a cache with a larger max_length"
                )
        self._pages.make_room(contexts, self.lengths)

    def expect_length(self, slot: int, length: int) -> None:
        """Note that launched steps may extend the slot to ``length`` tokens.

        They overwrite its conv rows. A later call replaces this value.
        """
        self.windows.expect(slot, length)

    def overwrite(self, slot: int, length: int) -> None:
        """Note that a step writes the slot's conv rows up to ``length`` tokens, accepted or not."""
        self.windows.overwrite(slot, length)

    def commit_token(self, slot: int, token: int) -> None:
        """Count one more token that an expected step has run in ``slot``."""
        if len(self.history[slot]) == self.lengths[slot]:
            self.history[slot].append(token)
        self.lengths[slot] += 1

    def record_tokens(self, batch: Batch, chunks: Iterable[Sequence[int]]) -> None:
        """Append the tokens that ``batch`` ran to the histories of its slots, one chunk per
        sequence.

        If the history of a slot lacks earlier tokens, it does not change: it is always a prefix.
        """
        for (slot, start, _), chunk in zip(batch.required_host, chunks, strict=True):
            if len(self.history[slot]) >= start:
                self.history[slot][start:] = chunk

    def replay(self, slot: int) -> list[int]:
        """Return the last tokens of a slot that must run again before it goes on.

        There are none if its conv windows are complete. Raises CacheError if they are not, and the
        tokens are unknown.
        """
        length = self.lengths[slot]
        if self.windows.holds(slot, length):
            return []
        first = max(0, length - self.replay_length)
        if len(self.history[slot]) < length:
            self.windows.check(slot, length)
        return self.history[slot][first:length]

    def rollback(self, tokens: int, slots: Iterable[int] | None = None) -> None:
        """Remove the last ``tokens`` of every given slot (default: all), as if they never ran.

        Raises CacheError if a slot holds fewer, or if the conv rows before them are overwritten (a
        larger ``spare`` keeps more of them). On an error nothing has changed.
        """
        chosen = range(self.slots) if slots is None else list(slots)
        if tokens < 0:
            raise ValueError(f"cannot remove {tokens} tokens")
        for slot in chosen:
            length = self.lengths[slot] - tokens
            if length < 0:
                raise CacheError(
                    f"cannot remove {tokens} tokens of slot {slot}, it holds {self.lengths[slot]}"
                )
            self.windows.check(slot, length)
        for slot in chosen:
            self.truncate(slot, self.lengths[slot] - tokens)

    def reset(self, slots: Iterable[int] | None = None) -> None:
        """Forget every token of the given slots (default: all), and give their pages back."""
        for slot in range(self.slots) if slots is None else slots:
            self.truncate(slot, 0)

    def truncate(self, slot: int, length: int) -> None:
        """Hold only the first ``length`` tokens of a slot, and give the other pages back.

        If the conv windows are gone then, ``replay`` gives the tokens to run again.
        """
        self.lengths[slot] = length
        del self.history[slot][length:]
        self._pages.truncate(slot, length)
        if length == 0:
            self.windows.restart(slot)

    def go_back(self, slot: int, length: int) -> int:
        """Keep at most the first ``length`` tokens of a slot, and return how many it holds.

        The result is 0 if the conv windows are gone and a replay cannot restore them. This is so
        with RoPE scaling that depends on the length of the context.
        """
        if self._follows_length and not self.windows.holds(slot, length):
            length = 0
        self.truncate(slot, length)
        return length

    def attach(self, slot: int, match: Match, tokens: Sequence[int]) -> None:
        """Make an empty slot hold the matched ``tokens``: share whole pages, copy part of one.

        If there is no page for the copy, the slot holds only the whole pages.
        """
        assert not self.lengths[slot] and len(tokens) == match.tokens
        held = self._pages.attach(slot, match)
        self.lengths[slot] = held
        self.history[slot] = list(tokens[:held])
        # The slot has no window yet, so its last tokens must be replayed.
        self.windows.restart(slot, held)

    def copy(self, source: int, target: int) -> None:
        """Make slot ``target`` hold what slot ``source`` holds, sharing its full pages."""
        self.reorder({target: source})

    def reorder(self, sources: Mapping[int, int]) -> None:
        """Make each slot hold what another one holds, ``{slot: source}``, all at the same time.

        Full pages are shared. An unfinished page is copied, except for one slot: it takes the page
        over if the source gives it up. Raises CacheError if there are too few pages. The slots that
        should change are empty then.
        """
        moved = {slot: source for slot, source in sources.items() if slot != source}
        held = {
            slot: (self.lengths[source], list(self.history[source]))
            for slot, source in moved.items()
        }
        try:
            self._pages.reorder(moved, self.lengths)
        except CacheError:
            self.reset(moved)
            raise
        self.windows.reorder(moved)
        for slot, (length, history) in held.items():
            self.lengths[slot], self.history[slot] = length, history

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copy all sequences into named tensors, for ``load_state_dict``."""
        state = {
            "lengths": torch.tensor(self.lengths, dtype=torch.int64),
            "oldest": self.windows.oldest(),
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
        """Hold the sequences of ``state``. Raises CacheError if it is from a cache of another
        shape.
        """
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
        for slot in range(self.slots):
            for page in self._pages[slot]:
                self.pool.memory.page(page).copy_(next(saved))
        rows = [state[name] for name in wanted if name.startswith("layers.")]
        self.windows.load(state["oldest"], rows)
        self.lengths = lengths
        parts = state["history"].split(state["recorded"].tolist())
        self.history = [part.tolist() for part in parts]


def signature(config: Config, dtype: torch.dtype, device: torch.device | str) -> tuple[Any, ...]:
    """Return the values that a cache and the model that runs on it must have in common."""
    heads = (config.num_key_value_heads, config.head_dim)
    sizes = (*heads, config.hidden_size, config.conv_L_cache)
    return (tuple(config.layer_types), *sizes, dtype, torch.empty(0, device=device).device)
