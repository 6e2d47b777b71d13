"""Launch: running decode steps, and their tokens as the host reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.engine.request import LogProbs, Row

# Rows that were running, their new tokens, and the log-probabilities that were asked for.
Written = tuple[list[Row], list[int], dict[Row, LogProbs]]


@dataclass
class Launch:
    """Launched steps: ``tokens [steps, B]`` on the host, one column for each row.

    The tokens are complete after the event ``copied``, or at once if it is None. ``ran`` is True if
    the steps ran the rows' previous tokens; it is False for first tokens after prompts. ``read``
    counts the steps that were read. ``logprobs`` are those that rows asked for, of a launch of one
    step.
    """

    rows: list[tuple[Row, int]]
    tokens: torch.Tensor
    copied: Any
    ran: bool
    logprobs: dict[Row, LogProbs] = field(default_factory=dict)
    read: int = 0

    def unread_tokens(self) -> list[list[int]]:
        """Wait for the tokens of the steps that were not read, and return them step by step."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tokens[self.read :].tolist()

    def steps(self, cache: Cache) -> Iterator[Written]:
        """Yield the steps that were not read, and count their tokens in the rows and the cache."""
        for tokens in self.unread_tokens():
            rows = []
            for row, column in self.rows:
                if row.ended:
                    continue
                # The step has run the token before. The first token after a prompt has run nothing.
                if self.ran:
                    cache.commit_token(row.slot, row.written[-1])
                note(row, tokens[column])
                if row.ended:
                    # The device is at most one token ahead.
                    ran = min(row.launched - 1, len(row.written))
                    cache.expect_length(row.slot, row.start + ran)
                rows.append(row)
            self.read += 1
            if rows:  # steps that were running when the last row ended have none
                yield rows, [row.written[-1] for row in rows], self.logprobs


def note(row: Row, token: int) -> None:
    """Write a new token into its row, which it may end."""
    row.written.append(token)
    row.ended = token in row.ends or token < 0 or len(row.written) == row.limit
