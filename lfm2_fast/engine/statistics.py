"""Statistics: what an engine holds and has done, for people and for metrics."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

# Number of times that are kept for quantiles.
KEPT = 4096


@dataclass
class Statistics:
    """Counts since the engine began, and its present numbers.

    ``prefix_hits`` are prompt tokens that did not need to run, ``prompt_tokens`` all prompt tokens,
    both of admitted requests. ``first_token`` and ``between_tokens`` hold the latest times in
    seconds; a first token's counts from the request's arrival. ``drafted`` are tokens that were
    guessed and checked, ``accepted`` those of them that were written.
    """

    running: int = 0
    waiting: int = 0
    pages_free: int = 0
    pages_cached: int = 0
    pages_used: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    requests: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    first_token: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    between_tokens: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
