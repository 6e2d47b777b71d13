"""StepBuffers: the inputs of decode steps on one cache, and the graphs captured of those steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from lfm2_fast.cache.batch import Batch, DecodeInputs, HostBatch, on_device, together_on_device
from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.engine.graphs import Graphs, capture_cpu, capture_cuda
from lfm2_fast.engine.request import Row
from lfm2_fast.engine.step_rows import StepRows, first_rows, penalizes
from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.models.stream_ring import StreamRing
from lfm2_fast.ops.sampling import SamplingParams, SamplingState

EOS_TOKENS = 16
# Most decode steps in one launch.
MAX_STEPS = 4


class StepBuffers:
    """Tensors of steps of up to ``size`` rows on one cache, and the graphs that use them.

    ``inputs`` of ``size`` rows are those of the next step, and ``state`` says how its tokens are
    chosen. Unused rows are finished. ``written [MAX_STEPS, size]`` has the tokens that the last
    steps chose, the newest last, and NO_TOKEN where a row had none to choose. ``adapters
    [slots]`` has each slot's entry in the stacks of adapters, the dummy slot's too; ``entries`` is
    the same list on the host.

    With ``drafts`` the steps verify drafts: ``size`` is ``drafts``, and each token is a row.
    """

    # Not in a caller's inference mode: steps outside of it write to these tensors.
    @torch.inference_mode(False)
    def __init__(self, model: Lfm2, cache: Cache, capture: Any = None, *, drafts: int = 0) -> None:
        device, size = model.device, drafts or bucket(cache.slots, cache)
        # Number of row counts whose CPU graphs are kept.
        self._kept_counts = 4 if drafts else 1
        self._drafts: StepBuffers | None = None
        # Where the recorded steps that keep streams do so.
        self._ring: StreamRing | None = None
        self.size, self.vocab = size, model.config.vocab_size
        # If the model has others by now, these buffers cannot be used again.
        self.made_for = model.ops, model.drafter
        self.written = torch.zeros(MAX_STEPS, size, dtype=torch.int64, device=device)
        self.rows = self._blank(SamplingParams(), cache, EOS_TOKENS, device)
        self.cu_seqlens = torch.arange(size + 1, dtype=torch.int32, device=device)
        self.logits: torch.Tensor | None = None
        self.marks: torch.Tensor | None = None
        self.views: dict[int, SamplingState] = {}
        self.prompts: dict[int, Any] = {}
        if capture is None and device.type == "cuda" and model.ops.captures:
            capture = capture_cuda
        elif capture is None and model.ops.cpu_graph_rows:
            capture = capture_cpu
        self.graphs = None if capture is None else Graphs(device, capture)
        self._reallocations = cache.reallocations
        self.entries = [0] * cache.slots
        self.adapters = torch.zeros(cache.slots + 1, dtype=torch.int64, device=device)
        self._adapters_version = model.adapters.version

    @property
    def inputs(self) -> DecodeInputs:
        """Inputs of the next step."""
        return self.rows.inputs

    @property
    def state(self) -> SamplingState:
        """Sampling state of the rows."""
        return self.rows.state

    @property
    def eos(self) -> torch.Tensor:
        """End tokens ``[size, E]`` of the rows, then -1."""
        return self.rows.eos

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, without the graphs' memory pool."""
        extra = [each for each in (self.logits, self.marks) if each is not None]
        steps = sum(each.nbytes for each in (self.written, *self.inputs, *extra))
        own = 0 if self._drafts is None else self._drafts.nbytes
        return own + steps + sum(prompt.nbytes for prompt in self.prompts.values())

    def of_drafts(self, model: Lfm2, cache: Cache, size: int) -> StepBuffers:
        """Return the buffers of steps on the same cache that verify drafts, of ``size`` tokens."""
        if self._drafts is None or self._drafts.size != size:
            self._drafts = StepBuffers(model, cache, drafts=size)
            self._drafts.entries, self._drafts.adapters = self.entries, self.adapters
        return self._drafts

    def begin(self, cache: Cache, params: SamplingParams) -> None:
        """Mark all rows finished, without end tokens, and let them choose as ``params`` say."""
        self.state.seen = None
        self._mark_from(params.repetition_penalty != 1.0)
        blank = self._blank(params, cache, self.eos.shape[1], self.eos.device)
        self.put(range(self.size), slice(0, self.size), blank)

    def _blank(
        self, params: SamplingParams, cache: Cache, ends: int, device: torch.device
    ) -> StepRows:
        """Return finished rows without end tokens, which choose as ``params`` say."""
        size, dummy = self.size, cache.dummy_slot
        own: dict[str, Sequence[int]] = {
            "slots": [0 if dummy is None else dummy] * size,
            "rows": range(size),
            "finished": [True] * size,
        }
        return StepRows.from_host([params] * size, device, own, [()] * size, ends)[0]

    def first_rows(
        self, places: Sequence[int], rows: Sequence[Row]
    ) -> tuple[StepRows, torch.Tensor | slice]:
        """Return rows for ``put``, whose texts have run, and their places as ``put`` takes them."""
        most = max(len(row.request.eos) for row in rows)
        if most > self.eos.shape[1]:
            self.rows.widen(most)
            self.drop_graphs()
        front = slice(places[0], places[0] + len(places))
        together = list(places) == list(range(front.start, front.stop))
        seen = None
        if penalizes(rows):
            self._mark_from(True)
            assert self.marks is not None
            # Marked where they will stay, if the places are next to each other.
            seen = self.marks[front] if together else self.marks.new_empty(len(rows), self.vocab)
        device, ends = self.eos.device, self.eos.shape[1]
        made, moved = first_rows(rows, device, ends, (places, torch.int64), seen=seen)
        return made, front if together else moved[0]

    def put(self, places: Sequence[int], at: torch.Tensor | slice, rows: StepRows) -> None:
        """Write ``rows`` into ``places``, which are ``at`` too."""
        self.rows.put(places, at, rows)
        if self.marks is not None and rows.state.seen is not None and not isinstance(at, slice):
            self.marks[at] = rows.state.seen
        self.views = {}

    def shrink(self, kept: Sequence[int], count: int, cache: Cache) -> None:
        """Move the rows in places ``kept`` to the front, and clear the others of ``count``."""
        if kept:
            picked, front = self.rows.pick(kept), slice(0, len(kept))
            self.put(range(len(kept)), front, picked)
            if self.marks is not None and picked.state.seen is not None:
                self.marks[front] = picked.state.seen
        self.clear_rows(len(kept), count, cache)

    def set_adapter(self, slot: int, entry: int) -> None:
        """Let the text in ``slot`` have the adapter of ``entry``, 0 for none."""
        if self.entries[slot] != entry:
            self.entries[slot] = entry
            self.adapters[slot] = entry

    def with_adapters(self, model: Lfm2, batch: Batch) -> Batch:
        """Return ``batch`` with the adapters of its slots, if it has any."""
        entries = [self.entries[slot] for slot in batch.required_host.slots]
        if not any(entries) and model.adapters.active is None:
            return batch
        adapters = on_device(entries, torch.int64, batch.slots.device)
        return replace(batch, adapters=adapters, whole=model.adapters.whole & set(entries))

    def adapted(self, model: Lfm2, slots: Iterable[int]) -> frozenset[int] | None:
        """Return ``whole`` of a step's batch; None if the step needs no adapters.

        Of several entries it is all that there are: so N adapters need no more than N + 2 captured
        steps of a size.
        """
        entries = {self.entries[slot] for slot in slots}
        if not any(entries) and model.adapters.active is None:
            return None
        whole = model.adapters.whole
        return whole if len(whole & entries) > 1 else whole & entries

    def _mark_from(self, wanted: bool) -> None:
        """Mark the tokens that rows have seen, from now on, if that is wanted."""
        if wanted and self.state.seen is None:
            if self.marks is None:
                shape = (self.size, self.vocab)
                self.marks = torch.zeros(shape, dtype=torch.bool, device=self.eos.device)
            self.state.seen = self.marks

    def drop_graphs(self) -> None:
        """Free the graphs, which point at tensors that are no longer used."""
        if self.graphs is not None:
            self.graphs.clear()
        if self._drafts is not None:
            self._drafts.drop_graphs()

    def set_sampling(self, places: Sequence[int], state: SamplingState) -> None:
        """Make rows ``places`` choose tokens as the rows of ``state`` do."""
        self._mark_from(state.seen is not None)
        self.state.copy_rows(places, state)
        self.views = {}

    def clear_rows(self, first: int, last: int, cache: Cache) -> None:
        """Mark the rows from ``first`` to ``last`` finished."""
        self.inputs.slots[first:last] = 0 if cache.dummy_slot is None else cache.dummy_slot
        self.inputs.positions[first:last] = 0
        self.inputs.lengths[first:last] = 1
        self.inputs.finished[first:last] = True

    def load_rows(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        cache: Cache,
    ) -> None:
        """Take one step's tokens from the host, with the slot and position of each."""
        count, lengths = len(tokens), [position + 1 for position in positions]
        fields = ([*tokens, *slots, *positions], torch.int64), (lengths, torch.int32)
        ints, made = together_on_device(self.eos.device, *fields)
        self.rows.tensors[0][:3, :count] = ints.view(3, count)
        self.inputs.lengths[:count] = made
        self.inputs.finished[:count] = False
        self.clear_rows(count, bucket(count, cache), cache)

    def batch(self, count: int, *, on_host: bool, adapted: frozenset[int] | None = None) -> Batch:
        """Return the next step of the first rows; ``on_host`` waits for their numbers.

        It has their adapters unless ``adapted``, which is its ``whole``, is None.
        """
        inputs = self.inputs.first(count)
        host = None
        if on_host:
            starts, slots = inputs.positions.tolist(), inputs.slots.tolist()
            host = HostBatch(tuple(slots), tuple(starts), (1,) * count)
        return Batch(
            positions=inputs.positions,
            cu_seqlens=self.cu_seqlens[: count + 1],
            slots=inputs.slots,
            lengths=inputs.lengths,
            max_query=1,
            host=host,
            adapters=None if adapted is None else self.adapters.index_select(0, inputs.slots),
            whole=adapted,
        )

    def view(self, count: int) -> SamplingState:
        """Return the state of the first rows. Few counts are kept, as each has tensors."""
        if count not in self.views:
            if len(self.views) >= self._kept_counts:
                self.views = {}
            self.views[count] = self.state.first(count)
        return self.views[count]

    def run_steps(
        self,
        model: Lfm2,
        cache: Cache,
        count: int,
        *,
        choose: bool,
        steps: int = 1,
        hooked: bool = False,
        verified: bool = False,
        adapted: frozenset[int] | None = None,
        late: StreamRing | None = None,
    ) -> None:
        """Run steps of the first ``count`` rows; without ``choose`` one step up to ``logits``.

        ``hooked`` says that layers have hooks: then nothing is captured or replayed. ``verified``
        says that several rows may be tokens of one slot, in their order. ``adapted`` is the
        result of that method for the rows. ``late`` keeps the streams that the model's drafter
        reads later.
        """
        if not choose and self.logits is None:
            shape = (self.size, model.config.vocab_size)
            self.logits = torch.empty(shape, dtype=model.dtype, device=model.device)
        ops = model.ops if self.graphs is None or hooked else model.ops.for_capture
        if verified:
            ops = ops.for_verification
        crowded = not self.views or len(self.views) >= self._kept_counts
        if not ops.captures and count not in self.views and crowded:
            # A CPU graph keeps all its tensors. Graphs of many counts would fill the memory.
            self.drop_graphs()
        if late is not None and late is not self._ring:
            self._ring = late
            self.drop_graphs()
        state = self.view(count)
        # Without draws and penalties, the state's positions need not advance.
        argmax = choose and state.greedy

        def body() -> None:
            inputs = self.inputs.first(count)
            for written in self.written[-steps:, :count]:
                batch = self.batch(count, on_host=not ops.device_only, adapted=adapted)
                eos = self.eos[:count]
                if argmax:
                    model.advance(inputs, batch, cache, eos, written, ops=ops, late=late)
                    continue
                made = model(inputs.tokens, batch, cache, ops=ops, late=late)
                if not choose:
                    assert self.logits is not None
                    self.logits[:count] = made
                    return
                chosen = ops.sample(made, state)
                ops.advance(chosen, eos, cache.dummy_slot, inputs, written)

        captured = not hooked and (ops.captures or count <= ops.cpu_graph_rows)
        seen = self.state.seen is not None
        kept = late is not None
        key = (choose, count, steps, state.active, state.all_drawn, seen, adapted, kept)
        self.run_captured(model, cache, key if captured else None, body)

    def run_captured(
        self, model: Lfm2, cache: Cache, key: Hashable | None, body: Callable[[], None]
    ) -> None:
        """Run ``body``, captured under ``key`` where there are graphs and it has one."""
        made_for = cache.reallocations, model.adapters.version
        if (self._reallocations, self._adapters_version) != made_for:
            self._reallocations, self._adapters_version = made_for
            self.drop_graphs()
        if self.graphs is None or key is None:
            body()
        elif key not in self.graphs and model.has_hooked_layers:
            # A hook was added in the middle of a call: no graph may contain its work.
            body()
        else:
            self.graphs.run(key, body)


def bucket(rows: int, cache: Cache) -> int:
    """Return the rows of a step of ``rows``: a power of two, where a dummy slot can fill it."""
    return rows if cache.dummy_slot is None or rows == 0 else 1 << (rows - 1).bit_length()
