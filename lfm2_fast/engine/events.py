"""Events: new tokens and ends of rows, as callers get them."""

from __future__ import annotations

import torch

from lfm2_fast.engine.decode import Chooser, LogitsError, no_token
from lfm2_fast.engine.request import Event, LogProbs, Row
from lfm2_fast.engine.statistics import Statistics


class Events:
    """Collects the events of a step, and decides with which token a row ends.

    ``dtype`` is the model's. ``chooser`` is the engine's, if it has one.
    """

    def __init__(self, statistics: Statistics, dtype: torch.dtype, chooser: Chooser | None) -> None:
        self.statistics, self.dtype, self.chooser = statistics, dtype, chooser
        self._pending: list[Event] = []

    def __len__(self) -> int:
        return len(self._pending)

    def take(self) -> list[Event]:
        """Return the collected events, and clear the list."""
        events, self._pending = self._pending, []
        return events

    def token(self, row: Row, token: int, logprobs: LogProbs | None, now: float) -> None:
        """Note a new token of a row at the time ``now``, and its end if it is the last.

        A row without a token to choose ends with an error, and so does one whose ``stop`` raises.
        """
        count = len(row.written)
        if token < 0:
            row.written.pop()
            self.fail(row, row.error or self._no_token(row, count))
            return
        times = self.statistics.between_tokens if count > 1 else self.statistics.first_token
        times.append(now - (row.last_token if count > 1 else row.arrived))
        row.last_token = now
        self.statistics.new_tokens += 1
        try:
            reason = self._finish_reason(row, token)
        except Exception as error:
            self._add(row, token, logprobs)
            self.fail(row, error)
            return
        row.finish_reason = reason
        self._add(row, token, logprobs)

    def end(self, row: Row, reason: str) -> None:
        """Note the end of a row without another token."""
        row.finish_reason = reason
        self._add(row, None)

    def fail(self, row: Row, error: Exception) -> None:
        """Note the end of a row by an error of its own."""
        row.error = error
        self.end(row, "error")

    def _finish_reason(self, row: Row, token: int) -> str | None:
        """Return why a row ends with its newest token, None if it goes on."""
        stop = row.request.stop
        stopped = stop is not None and stop(row.written)
        if self.chooser is not None:
            stopped |= self.chooser.ends(row)
        if stopped or token in row.ends:
            return "stop"
        return "length" if len(row.written) == row.limit else None

    def _no_token(self, row: Row, number: int) -> LogitsError:
        chooser = self.chooser
        changed = row.request.changes_every_step or number <= row.request.min_tokens
        changed |= chooser is not None and chooser.changes_logits
        return no_token(row, number, self.dtype, processed=changed)

    def _add(self, row: Row, token: int | None, logprobs: LogProbs | None = None) -> None:
        prompt_logprobs, row.prompt_logprobs = row.prompt_logprobs, None
        self._pending.append(
            Event(
                id=row.id,
                index=row.index,
                token=token,
                finish_reason=row.finish_reason,
                logprobs=logprobs,
                prompt_logprobs=None if prompt_logprobs is None else tuple(prompt_logprobs),
                cached_tokens=row.cached_tokens,
                error=row.error,
            )
        )
