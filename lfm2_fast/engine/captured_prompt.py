"""Short prompts whose forward pass is captured: launching it takes longer than running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lfm2_fast.cache.batch import Batch, HostBatch
from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.engine.step_buffers import StepBuffers
from lfm2_fast.models.lfm2 import Lfm2

# Tokens that a captured prompt is padded to. Launched one by one, the kernels of some hundreds of
# tokens take the host longer than the device. Of more, padding would cost more than launches do, so
# only a full chunk is captured. Which prompts gain is for a GPU to say.
SIZES = (32, 64, 128, 256, 512, 2048)
MOST_PADDED = 512


class CapturedPrompt:
    """Tensors of a prompt of up to ``size`` tokens in one slot, the rest padding.

    ``inputs`` int64 has ``size`` tokens, ``size`` positions, and five numbers. These are 0, the
    number of tokens without padding, the slot, the length of its text afterwards, and the first
    position that is written. All that differs between prompts is in this tensor, so one copy moves
    it. ``logits [1, V]`` are those of the last token.
    """

    def __init__(self, model: Lfm2, size: int) -> None:
        self.size = size
        self.inputs = torch.zeros(2 * size + 5, dtype=torch.int64, device=model.device)
        shape = (1, model.config.vocab_size)
        self.logits = torch.empty(shape, dtype=model.dtype, device=model.device)

    @classmethod
    def of(cls, model: Lfm2, buffers: StepBuffers, tokens: int) -> CapturedPrompt | None:
        """Return the tensors for a prompt of ``tokens``, or None if it is not captured."""
        size = min((size for size in SIZES if size >= tokens), default=0)
        # A single token is a decode step.
        if not model.ops.captures or tokens < 2 or not size:
            return None
        if tokens < size and size > MOST_PADDED:
            return None
        kept = buffers.prompts
        if size not in kept:
            kept[size] = cls(model, size)
        return kept[size]

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take."""
        return self.inputs.nbytes + self.logits.nbytes

    def prefill(
        self,
        model: Lfm2,
        cache: Cache,
        buffers: StepBuffers,
        tokens: Sequence[int],
        slot: int,
        start: int,
        write_from: int,
    ) -> None:
        """Run the prompt from position ``start`` of ``slot``, and fill ``logits``.

        Keys and values are written from position ``write_from`` on.
        """
        count = len(tokens)
        rest = [0] * (self.size - count)
        ends = (0, count, slot, start + count, write_from)
        values = [*tokens, *rest, *range(start, start + count), *rest, *ends]
        pinned = self.inputs.device.type == "cuda"
        host = torch.tensor(values, dtype=torch.int64, pin_memory=pinned)
        self.inputs.copy_(host, non_blocking=True)

        whole = buffers.adapted(model, [slot])
        adapters = None if whole is None else buffers.adapters

        def body() -> None:
            made = self.batch(on_host=not model.ops.device_only, adapters=adapters)
            batch = replace(made, whole=whole)
            padded = self.inputs[: self.size]
            self.logits.copy_(model(padded, batch, cache, batch.last_rows))

        buffers.run_captured(model, cache, ("prompt", self.size, whole), body)

    def batch(self, *, on_host: bool, adapters: torch.Tensor | None = None) -> Batch:
        """Return the prompt as a batch; ``on_host`` waits for its numbers.

        ``adapters`` are those of every slot.

        Captured operations read only device tensors, so only tests use ``on_host``.
        """
        positions, ends = self.inputs[self.size :].split((self.size, 5))
        host = None
        if on_host:
            _, count, slot, length, write_from = ends.tolist()
            host = HostBatch((slot,), (length - count,), (count,), (write_from,))
        return Batch(
            positions=positions,
            cu_seqlens=ends[:2].int(),
            slots=ends[2:3],
            lengths=ends[3:4].int(),
            max_query=self.size,
            host=host,
            write_from=ends[4:].int(),
            adapters=None if adapters is None else adapters.index_select(0, ends[2:3]),
        )
