"""Buffers: where decode steps on one cache find their inputs, and the graphs captured of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from lfm2_fast.cache.batch import Batch
from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.engine.graphs import Graphs, capture_cuda, capture_tape
from lfm2_fast.hf.causal_lm import Lfm2ForCausalLM
from lfm2_fast.ops.sampling import SamplingParams, SamplingState

ENDS = 16
# Steps that are launched together, at most.
TOGETHER = 4


class Buffers:
    """The tensors of steps of up to ``size`` rows on one cache, and the graphs that use them.

    ``tokens, slots, positions`` int64, ``lengths`` int32 and ``finished`` bool are ``[size]``, the
    inputs of the next step; ``state`` is how its tokens are chosen. Rows that nobody uses are
    finished. ``written [TOGETHER, size]`` has the tokens that the last steps chose, the newest
    last: that row is ``tokens``.
    """

    def __init__(
        self, model: Lfm2ForCausalLM, cache: Cache, size: int, capture: Any = None
    ) -> None:
        device = model.device
        self.size = size
        self.made_for = model.ops
        self.written = torch.zeros(TOGETHER, size, dtype=torch.int64, device=device)
        self.tokens = self.written[-1]
        self.slots = torch.zeros_like(self.tokens)
        self.positions = torch.zeros_like(self.tokens)
        self.lengths = torch.ones(size, dtype=torch.int32, device=device)
        self.finished = torch.ones(size, dtype=torch.bool, device=device)
        self.cu_seqlens = torch.arange(size + 1, dtype=torch.int32, device=device)
        self.eos = torch.full((ENDS,), -1, device=device)
        self.logits: torch.Tensor | None = None
        self.marks: torch.Tensor | None = None
        self.state = SamplingState([SamplingParams()] * size, device=device)
        self.views: dict[int, SamplingState] = {}
        self.prompts: dict[int, Any] = {}
        if capture is None and device.type == "cuda" and model.ops.captures:
            capture = capture_cuda
        elif capture is None and model.ops.tapes:
            capture = capture_tape
        self.graphs = None if capture is None else Graphs(device, capture)
        self._grown = cache.grown

    @classmethod
    def of(cls, model: Lfm2ForCausalLM, cache: Cache) -> Buffers:
        """The cache's buffers, made anew if there are none, or another model's."""
        if cache.kept is None or cache.kept.made_for is not model.ops:
            cache.kept = cls(model, cache, bucket(cache.slots, cache))
        return cache.kept

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """The tensors ``[size]`` that ``ops.advance`` makes anew, in its order."""
        return self.tokens, self.slots, self.positions, self.lengths, self.finished

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take, without what the graphs' pool holds."""
        extra = [each for each in (self.logits, self.marks) if each is not None]
        steps = sum(each.nbytes for each in (self.written, *self.inputs[1:], *extra))
        return steps + sum(prompt.nbytes for prompt in self.prompts.values())

    def begin(self, cache: Cache, params: SamplingParams, eos: Sequence[int], vocab: int) -> None:
        """Make every row finished, for rows that end with one of ``eos``."""
        if len(eos) > len(self.eos):
            self.eos = torch.full((len(eos),), -1, device=self.eos.device)
            self.forget()
        self.eos.fill_(-1)
        self.eos[: len(eos)] = torch.tensor(eos, dtype=torch.int64)
        if params.repetition_penalty != 1.0 and self.marks is None:
            self.marks = torch.zeros(self.size, vocab, dtype=torch.bool, device=self.eos.device)
        self.state.seen = None if params.repetition_penalty == 1.0 else self.marks
        blank = SamplingState([params] * self.size, device=self.eos.device)
        self.put(range(self.size), blank)
        self.vacate(0, self.size, cache)

    def forget(self) -> None:
        """Free the graphs, which point at tensors that are no longer used."""
        if self.graphs is not None:
            self.graphs.clear()

    def put(self, places: Sequence[int], state: SamplingState) -> None:
        """Let these rows choose tokens as those of ``state`` do."""
        self.state.put(places, state)
        self.views = {}

    def vacate(self, first: int, last: int, cache: Cache) -> None:
        """Make rows finished."""
        self.slots[first:last] = 0 if cache.scrap is None else cache.scrap
        self.positions[first:last] = 0
        self.lengths[first:last] = 1
        self.finished[first:last] = True

    def load(self, tokens: Sequence[int], batch: Batch, cache: Cache) -> None:
        """Take the inputs of one step from the host; rows beyond are finished."""
        count = len(tokens)
        self.tokens[:count] = torch.tensor(tokens)
        self.slots[:count] = batch.slots
        self.positions[:count] = batch.positions
        self.lengths[:count] = batch.lengths
        self.vacate(count, bucket(count, cache), cache)

    def batch(self, count: int, *, on_host: bool) -> Batch:
        """The next step of the first rows; bodies that need numbers on the host wait for them."""
        slots, positions = self.slots[:count], self.positions[:count]
        return Batch(
            positions=positions,
            cu_seqlens=self.cu_seqlens[: count + 1],
            slots=slots,
            lengths=self.lengths[:count],
            query_lengths=(1,) * count,
            starts=tuple(positions.tolist()) if on_host else (0,) * count,
            host_slots=tuple(slots.tolist()) if on_host else (0,) * count,
        )

    def view(self, count: int) -> SamplingState:
        """The state of the first rows; of one count at a time, since each makes numbers ahead."""
        if count not in self.views:
            self.views = {count: self.state.first(count)}
        return self.views[count]

    def run(
        self, model: Lfm2ForCausalLM, cache: Cache, count: int, *, choose: bool, steps: int = 1
    ) -> None:
        """Steps of the first ``count`` rows: their next inputs, or of one step the ``logits``."""
        if not choose and self.logits is None:
            shape = (self.size, model.config.vocab_size)
            self.logits = torch.empty(shape, dtype=model.dtype, device=model.device)
        ops = model.ops if self.graphs is None else model.ops.captured
        if not ops.captures and count not in self.views:
            # Tapes keep all that they make: those of other counts would pile up.
            self.forget()
        state = self.view(count)
        # Nothing draws and nothing is penalised: where a row's draws stand does not matter.
        best = choose and state.greedy

        def body() -> None:
            tokens, *inputs = (each[:count] for each in self.inputs)
            for written in self.written[-steps:, :count]:
                batch = self.batch(count, on_host=not ops.by_tensors)
                made = model.compute(tokens, batch, cache, best=best, ops=ops)
                if not choose:
                    assert self.logits is not None
                    self.logits[:count] = made
                    return
                chosen = made if best else ops.sample(made, state)
                tokens = written
                ops.advance(chosen, self.eos, cache.scrap, tokens, *inputs)

        captured = ops.captures or count <= ops.tapes
        seen = self.state.seen is not None
        key = (choose, count, steps, state.wanted, state.all_drawn, seen)
        self.do(cache, key if captured else None, body)

    def do(self, cache: Cache, key: Hashable | None, body: Callable[[], None]) -> None:
        """Run ``body``, captured under ``key`` where there are graphs and it has one."""
        if self._grown != cache.grown:
            self._grown = cache.grown
            self.forget()
        if self.graphs is None or key is None:
            body()
        else:
            self.graphs.run(key, body)


def bucket(rows: int, cache: Cache) -> int:
    """How many rows a step of ``rows`` has: a power of two, where there is a slot to fill it."""
    return rows if cache.scrap is None or rows == 0 else 1 << (rows - 1).bit_length()
