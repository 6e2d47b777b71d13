"""warm_up: the work that a GPU compiles and captures once, done before requests wait for it."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from lfm2_fast.engine.captured_prompt import SIZES
from lfm2_fast.engine.request import Request
from lfm2_fast.engine.step_buffers import MAX_STEPS
from lfm2_fast.ops.sampling import SamplingParams

if TYPE_CHECKING:
    from lfm2_fast.engine.engine import Engine

logger = logging.getLogger(__name__)

# Graphs are captured anew when a context outgrows the pages' table, which widens to twice as much.
# At the start it is made wide enough for this many tokens.
CONTEXT = 4096


def warm_up(engine: Engine, sampling: Iterable[SamplingParams]) -> None:
    """Run requests like those to come, until what they need is compiled and captured.

    Steps of 1, 2, 4 ... rows, greedy and by each of ``sampling``, stopping at their logits too, and
    prompts of every captured size. What a request leaves is forgotten: its pages and its counts.
    The engine must have no requests. Where nothing is captured, this does nothing.
    """
    if not engine.model.ops.captures:
        return
    if engine.busy:
        raise RuntimeError("warm_up() needs an engine without requests; call it before the first")
    begin, statistics = time.perf_counter(), copy.deepcopy(vars(engine.statistics))
    for requests in _batches(engine, dict.fromkeys([SamplingParams(), *sampling])):
        for request in requests:
            engine.add(request)
        while engine.busy:
            engine.step()
        engine.clear_prefix_cache()
    vars(engine.statistics).update(statistics)
    logger.info("warm after %.1f s", time.perf_counter() - begin)


def _batches(engine: Engine, sampling: Collection[SamplingParams]) -> Iterator[list[Request]]:
    """Yield requests that run together; of each kind of work two, the second captures it."""
    vocabulary = engine.model.config.vocab_size

    def request(
        start: int, length: int, new: int, params: SamplingParams, logprobs: int | None = None
    ) -> Request:
        prompt = [(start + place) % vocabulary for place in range(length)]
        return Request(prompt, params, max_tokens=new, logprobs=logprobs)

    longest = min(CONTEXT, engine.max_length - 1)
    yield [request(0, longest, 1, SamplingParams())]
    # From the first row with a penalty on, all steps count what rows have seen.
    yield from ([request(0, 2, 1, params)] for params in sampling)
    buckets = [1 << power for power in range((engine.max_rows - 1).bit_length() + 1)]
    for rows in (min(bucket, engine.max_rows) for bucket in buckets):
        for params in sampling:
            # The prompt's token, two launches of several steps, and two of one.
            new = 1 + 2 * MAX_STEPS + 2
            yield [request(row, 2, new, params) for row in range(rows)]
        yield [request(row, 2, 4, SamplingParams(), logprobs=1) for row in range(rows)]
    for size in (*SIZES, longest):
        if size <= longest:
            yield from ([request(size + turn, size, 1, SamplingParams())] for turn in range(2))
