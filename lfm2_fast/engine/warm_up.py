"""Requests that have a GPU compile and capture all that later ones will need."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from lfm2_fast.engine.captured_prompt import SIZES
from lfm2_fast.engine.request import Request
from lfm2_fast.engine.step_buffers import MAX_STEPS
from lfm2_fast.ops.sampling import SamplingParams

# Graphs are captured again when a context outgrows the pages' table, which then doubles. At the
# start it is made wide enough for this many tokens.
CONTEXT = 4096


def warm_up_requests(
    max_rows: int,
    max_length: int,
    vocab_size: int,
    sampling: Collection[SamplingParams],
    adapter: str | None = None,
) -> Iterator[list[Request]]:
    """Yield requests with ``adapter`` that run together, for an engine of these limits.

    Steps of 1, 2, 4 ... rows by each of ``sampling``, stopping at their logits too, and prompts of
    every captured size: of each kind of work two, the second of which captures it.
    """

    def request(
        start: int, length: int, new: int, params: SamplingParams, logprobs: int | None = None
    ) -> Request:
        prompt = [(start + place) % vocab_size for place in range(length)]
        return Request(prompt, params, max_tokens=new, logprobs=logprobs, adapter=adapter)

    longest = min(CONTEXT, max_length - 1)
    yield [request(0, longest, 1, SamplingParams())]
    # From the first row with a penalty on, all steps count what rows have seen.
    yield from ([request(0, 2, 1, params)] for params in sampling)
    buckets = [1 << power for power in range((max_rows - 1).bit_length() + 1)]
    for rows in (min(bucket, max_rows) for bucket in buckets):
        for params in sampling:
            # The prompt's token, two launches of several steps, and two of one.
            new = 1 + 2 * MAX_STEPS + 2
            yield [request(row, 2, new, params) for row in range(rows)]
        yield [request(row, 2, 4, SamplingParams(), logprobs=1) for row in range(rows)]
    for size in (*SIZES, longest):
        if size <= longest:
            yield from ([request(size + turn, size, 1, SamplingParams())] for turn in range(2))
