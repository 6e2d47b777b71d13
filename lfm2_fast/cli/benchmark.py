"""Measurements of ``lfm2-fast bench``: times of a model by prompt, output and batch.

Every case is a request of the engine, as in normal use. The floor of a step is the shortest time in
which the memory can deliver its bytes: every weight once, and the keys and values of the context.
The speed of the memory is that of a copy or of a sum; the faster one counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from rich.progress import track

from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.cli.environment import hardware, versions
from lfm2_fast.cli.machine_load import Neighbours, doubts, memory, memory_speed, spread
from lfm2_fast.cli.session import summary
from lfm2_fast.cli.terminal import Terminal
from lfm2_fast.engine.request import Request
from lfm2_fast.hf.causal_lm import Lfm2ForCausalLM
from lfm2_fast.hf.load import load


@dataclass(frozen=True)
class Case:
    """``batch`` prompts of ``prompt`` tokens, each continued by ``output``."""

    prompt: int
    output: int
    batch: int


class Sequences:
    """Sequences that grow step by step, as requests on one cache."""

    def __init__(self, model: Lfm2ForCausalLM) -> None:
        self.model = model
        self.cache: Cache | None = None

    def start(self, prompts: Sequence[Sequence[int]], room: int) -> float:
        """Start over with new prompts, and return the seconds until each has its first new token.

        ``room`` is the number of further tokens that each may write.
        """
        self.texts = [list(ids) for ids in prompts]
        slots, length = len(prompts), len(prompts[0]) + 1 + room
        cache = self.cache
        if cache is None or (cache.slots, cache.max_length) != (slots, length):
            self.cache = self.model.new_cache(slots, length)
        else:
            cache.reset()  # with what was captured on it
        begin = time.perf_counter()
        self._write(1)
        return time.perf_counter() - begin

    def decode(self, steps: int) -> list[float]:
        """Write ``steps + 1`` tokens to each sequence; return the seconds of the last ``steps``.

        The first step runs the last token of the call before.
        """
        times = self._write(steps + 1)
        return [b - a for a, b in zip(times, times[1:], strict=False)]

    def _write(self, count: int) -> list[float]:
        """Write ``count`` tokens to each sequence, and return the times of the tokens."""
        assert self.cache is not None
        engine = self.model.workspace.engine(self.model.network, self.cache)
        slots = {
            engine.add(Request(text, max_tokens=count, stream=True), [slot]): slot
            for slot, text in enumerate(self.texts)
        }
        times: list[float] = []
        before = min(map(len, self.texts))
        while engine.busy:
            for event in engine.step():
                if event.error is not None:
                    raise event.error
                assert event.token is not None
                self.texts[slots[event.id]].append(event.token)
            if min(map(len, self.texts)) > before + len(times):
                times.append(time.perf_counter())
        return times


def prompt(row: int, length: int, vocab_size: int) -> list[int]:
    """Token ids of a prompt, different for each row."""
    return [(7 * row + 31 * i) % (vocab_size - 2) + 2 for i in range(length)]


def bytes_read_per_step(model: Lfm2ForCausalLM) -> int:
    """Bytes of weights that a step reads: all but an untied embedding, of which it reads a row."""
    sizes = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    embedding = model.network.embed_tokens.weight
    tied = model.network.config.tie_word_embeddings
    return sum(sizes.values()) - (0 if tied else embedding.nbytes)


def cases(prompts: str, outputs: str, batches: str) -> list[Case]:
    """Every combination of the counts in texts like "1,4,16", short prompts first.

    Raises ValueError, which names the command's option, for another text.
    """
    given = {"--prompt": prompts, "--output": outputs, "--batch": batches}
    prompt, output, batch = (counts(name, text) for name, text in given.items())
    return [Case(p, o, b) for b, p, o in product(batch, prompt, output)]


def counts(name: str, text: str) -> list[int]:
    """Counts in a text like "1,4,16", in order. Raises ValueError, which says ``name``."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise ValueError(f"{name} must be counts like 1,4,16, got {text!r}")
    return found


def load_and_measure(
    terminal: Terminal,
    name: str,
    wanted: Sequence[Case],
    *,
    rounds: int,
    threads: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Load and ``measure`` a checkpoint, with a progress bar. The result has the load time too.

    ``options`` go to ``load``. ``threads`` is torch's number of threads. Raises the exceptions of
    ``load`` and ``measure``.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    terminal.note(f"loading {name}")
    begin = time.perf_counter()
    model = load(name, **options)
    seconds = time.perf_counter() - begin
    terminal.note(f"{summary(model)}; {len(wanted)} cases, {rounds} rounds")

    def shown(runs: Iterable[Any]) -> Iterable[Any]:
        return track(runs, "measuring", console=terminal.err, transient=True)

    return {"load_seconds": seconds, **measure(model, wanted, rounds=rounds, progress=shown)}


def _check_fit(wanted: Sequence[Case], context: int) -> None:
    for case in wanted:
        if case.prompt + case.output + 2 > context:
            raise ValueError(
                f"a prompt of {case.prompt} tokens and {case.output} new ones do not fit into the "
                f"context of {context}: lower --prompt or --output"
            )


def measure(
    model: Lfm2ForCausalLM,
    wanted: Sequence[Case],
    *,
    rounds: int,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """Run every case ``rounds`` times, in turns, after a warm-up. Return figures, ready for JSON.

    ``progress`` wraps the list of runs, for a progress bar. Raises ValueError for a case that does
    not fit into the model's context.
    """
    _check_fit(wanted, model.max_length)
    device, vocab_size = model.device, model.network.config.vocab_size
    first: dict[Case, list[float]] = {case: [] for case in wanted}
    steps: dict[Case, list[float]] = {case: [] for case in wanted}
    warm_up = 0.0
    others = Neighbours()
    # One cache with its graphs for each batch size, as long as the longest case.
    by_batch = {case.batch: Sequences(model) for case in wanted}
    longest = max((case.prompt + case.output for case in wanted), default=0)
    for turn, case in progress([(turn, case) for turn in range(rounds + 1) for case in wanted]):
        sequences = by_batch[case.batch]
        prompts = [prompt(i, case.prompt, vocab_size) for i in range(case.batch)]
        begin = time.perf_counter()
        to_first = sequences.start(prompts, longest - case.prompt + 1)
        each = sequences.decode(case.output)
        if turn:
            first[case].append(to_first)
            steps[case].extend(each)
        else:
            warm_up += time.perf_counter() - begin
    seen = others.seen()
    used = memory(device)  # before memory_speed allocates its buffers
    speed = memory_speed(device)
    bandwidth = max(speed.values())
    return {
        "model": {
            "name": model.name_or_path,
            "parameters": model.num_parameters(),
            "weight_bytes": bytes_read_per_step(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": model.network.config.quantization,
            "backend": model.ops.name,
        },
        "device": hardware(device),
        "versions": versions(),
        "protocol": {
            "rounds": rounds,
            "order": "all cases once a round; the first round warms up and does not count",
            "sampling": "greedy, no end token",
            "step": "from the event of one token to that of the next",
        },
        "memory_bytes_per_second": speed,
        "warm_up_seconds": warm_up,
        "memory": used,
        "others": seen,
        "rows": [_row(model, case, first[case], steps[case], bandwidth, seen) for case in wanted],
    }


def _row(
    model: Lfm2ForCausalLM,
    case: Case,
    first: list[float],
    steps: list[float],
    bandwidth: float,
    others: dict[str, Any],
) -> dict[str, Any]:
    """Figures of one case, from the seconds to its first tokens and of its steps."""
    least = bytes_read_per_step(model)
    item = model.dtype.itemsize
    least += case.batch * model.network.config.cache_bytes(item, case.prompt + case.output // 2)
    rate = len(steps) / sum(steps)
    to_first = spread(first)
    return {
        **asdict(case),
        "first_token_seconds": to_first,
        "step_seconds": spread(steps),
        "tokens_per_second": case.batch * rate,
        "prompt_tokens_per_second": case.batch * case.prompt / to_first["p50"],
        "step_bytes": least,
        "bandwidth_share": least * rate / bandwidth,
        "floor_tokens_per_second": case.batch * bandwidth / least,
        "doubts": doubts(steps, others),
    }
