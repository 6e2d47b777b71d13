"""Text that an export writes: its runtime gives logits, and this package chooses the tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lfm2_fast.config import Config
from lfm2_fast.config_values import read_json
from lfm2_fast.export.environment import Note, vendor_python
from lfm2_fast.export.errors import ExportError
from lfm2_fast.export.exporting import RECORD
from lfm2_fast.export.runtime import Runtime
from lfm2_fast.export.vendors import VENDORS
from lfm2_fast.ops.sampling import NO_TOKEN, SamplingState, sample_ref
from lfm2_fast.text.conversation import Answer, streamed_request
from lfm2_fast.text.token_stream import TokenStream
from lfm2_fast.text.tokenizer import load_tokenizer
from lfm2_fast.weights.checkpoint import GENERATION_CONFIG

DEVICES = ("auto", "cpu", "gpu", "npu")
# Tokens of a text where nothing else is asked for; a static shape takes this memory at the start.
CONTEXT = 2048


def read_record(name: str) -> dict[str, Any] | None:
    """Return the record of the export in folder ``name``, or None if it is not an export."""
    path = Path(name) / RECORD
    return read_json(path) if path.is_file() else None


@dataclass
class Exported:
    """Opened export: its runtime, tokenizer, vocabulary, generation config and context."""

    runtime: Runtime
    tokenizer: Any
    vocab_size: int
    defaults: dict[str, Any]
    context: int

    def stream_answer(
        self,
        ids: list[int],
        sink: Callable[[str], None],
        *,
        max_new_tokens: int,
        arguments: Mapping[str, Any],
        stopped: Callable[[], bool] = lambda: False,
        take: Callable[[int], None] = lambda token: None,
    ) -> Answer:
        """Continue ``ids``, as ``stream_answer`` of a conversation does.

        A seed draws the tokens that a loaded model would draw from these logits. Raises ValueError
        if the context is full or the arguments are wrong, ExportError if the runtime fails.
        """
        room = self._room_after(ids)
        budget = min(max_new_tokens, room)
        request = streamed_request(
            self.defaults, self.vocab_size, self.tokenizer, ids, budget, arguments
        )
        seen = None
        if request.sampling.repetition_penalty != 1.0:
            seen = torch.zeros(1, self.vocab_size, dtype=torch.bool)
            seen[0, ids] = True
        at = torch.tensor([len(ids)])
        state = SamplingState([request.sampling], seed=request.seed, positions=at, seen=seen)
        stream, end = TokenStream(self.tokenizer, sink), ""
        written: list[int] = []
        logits = self.runtime.feed(ids, restart=True)
        while True:
            if len(written) < request.min_tokens:
                logits[:, list(request.eos)] = -math.inf
            token = int(sample_ref(logits, state))
            if token == NO_TOKEN:
                raise ValueError(f"new token {len(written)} has logits without a finite maximum")
            written.append(token)
            stream.put(token)
            take(token)
            if stopped():
                end = "stopped"
                break
            late = len(written) >= request.min_tokens
            if token in request.eos or late and request.stop is not None and request.stop(written):
                break
            if len(written) == budget:
                end = "the context is full" if budget == room else f"cut at {budget} tokens"
                break
            logits = self.runtime.feed([token])
        stream.end()
        return Answer(stream.text, stream.timing, len(ids), 0, end == "stopped", end)

    def _room_after(self, ids: list[int]) -> int:
        """Return how many tokens fit behind the prompt. Raises ValueError if it is too long."""
        room = self.context - len(ids)
        if room < 1:
            raise ValueError(
                f"{len(ids)} tokens fill the context of {self.context}: raise --max-length, or "
                "shorten the prompt"
            )
        longest = self.runtime.facts.get("longest_prompt", self.context)
        if len(ids) > longest:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, and an NPU's static shape has room for "
                f"{longest} of them, half of max_length={self.context}: use --max-length "
                f"{2 * len(ids)}, or a shorter prompt"
            )
        return room


def open_export(
    name: str,
    record: Mapping[str, Any],
    *,
    device: str = "auto",
    max_length: int | None = None,
    environment: Path | None = None,
    note: Note,
) -> Exported:
    """Open the export in folder ``name`` on ``device`` of DEVICES; "auto" is the CPU.

    ``max_length`` bounds the context in tokens, 2,048 by default. ``environment`` replaces the
    runtime's own. Raises ValueError for a wrong argument, ExportError if the runtime cannot run it
    there, or if it is for a runtime that this package does not call.
    """
    if device not in DEVICES:
        raise ValueError(f"device={device!r} does not run an export; use {', '.join(DEVICES)}")
    config = Config.from_file(Path(name) / "config.json")
    if max_length is not None and not 1 <= max_length <= config.context_length:
        raise ValueError(f"max_length={max_length} is not from 1 to {config.context_length}")
    context = min(CONTEXT, config.context_length) if max_length is None else max_length
    vendor = VENDORS[record["runtime"]]
    if vendor.unproven is not None:
        raise ExportError(
            f"{name} is an export for {vendor.title}, which an application runs: {vendor.unproven}"
        )
    # Importing an exporter takes seconds: of a given environment, only the runtime is asked for.
    needed = vendor.modules if environment is None else vendor.modules[-1:]
    python = vendor_python(vendor.name, needed, environment, note)
    stored = Path(name) / GENERATION_CONFIG
    where = "CPU" if device == "auto" else device.upper()
    tokenizer = load_tokenizer(name)
    defaults = read_json(stored) if stored.is_file() else {}
    # Last, because its process must be closed.
    runtime = Runtime(python, vendor.name, Path(name), device=where, context=context)
    return Exported(runtime, tokenizer, config.vocab_size, defaults, context)
