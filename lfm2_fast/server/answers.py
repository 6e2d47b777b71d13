"""Answers: the choices of one or several prompts, while the engine writes them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lfm2_fast.engine.async_engine import Stream
from lfm2_fast.engine.request import Event
from lfm2_fast.server.errors import of_engine
from lfm2_fast.server.metrics import Metrics
from lfm2_fast.server.output import Choice, Part


class Listener(Protocol):
    """Service that counts the times of its answers."""

    metrics: Metrics

    def took(self, seconds: float) -> None:
        """Note the seconds of a request that has ended."""


class Answers:
    """Choices of ``prompts``, by the stream's id of a prompt and the index among its ``n``.

    ``next`` returns their new parts until all are ``done``. ``close`` ends those that are not.
    """

    def __init__(
        self,
        listener: Listener,
        stream: Stream,
        prompts: Sequence[Sequence[int]],
        choices: Mapping[tuple[int, int], Choice],
    ) -> None:
        self.prompts, self.choices = prompts, choices
        self.stream = stream
        self._listener, self._metrics = listener, listener.metrics
        self._cached: dict[int, int] = {}
        self._begun = time.monotonic()
        self._last: dict[Choice, float] = {}
        self._closed = False
        for prompt in prompts:
            self._metrics.prompt_tokens.inc(len(prompt))
            self._metrics.prompt.observe(len(prompt))

    @property
    def done(self) -> bool:
        """Return True if every choice has ended."""
        return all(choice.done for choice in self.choices.values())

    async def next(self) -> list[Part]:
        """Wait, and return the new parts of choices; none after ``wake``.

        Raises ApiError if a continuation or the engine failed.
        """
        try:
            events = await self.stream.next()
        except Exception as error:
            raise of_engine(error) from None
        own: dict[tuple[int, int], list[Event]] = {}
        for event in events:
            own.setdefault((event.id, event.index), []).append(event)
            self._cached.setdefault(event.id, event.cached_tokens)
        now, parts = time.monotonic(), []
        for key, its in own.items():
            choice = self.choices[key]
            if choice.done:
                continue
            self._time(choice, its, now)
            parts.append(choice.take(its))
            if choice.done and its[-1].finish_reason is None:
                self.stream.cancel(*key)
        return parts

    async def all(self) -> list[Part]:
        """Wait until every choice has ended, and return their content in order."""
        found = {choice.index: Part(choice.index) for choice in self.choices.values()}
        while not self.done:
            for part in await self.next():
                found[part.index].extend(part)
        return [found[index] for index in sorted(found)]

    def wake(self) -> None:
        """Let ``next`` return without waiting."""
        self.stream.wake()

    def close(self) -> None:
        """End the choices that have not ended. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self.stream.close()
        seconds = time.monotonic() - self._begun
        self._metrics.whole.observe(seconds)
        if self.done:
            self._listener.took(seconds)
        for choice in self.choices.values():
            self._metrics.generated.observe(choice.tokens)
            self._metrics.ended(choice.reason or "abort")

    def usage(self) -> dict[str, Any]:
        """Return OpenAI's usage object of the tokens so far."""
        choices = self.choices.values()
        prompt, written = sum(map(len, self.prompts)), sum(choice.tokens for choice in choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
            "completion_tokens_details": {
                "reasoning_tokens": sum(choice.parser.reasoning_tokens for choice in choices)
            },
        }

    def _time(self, choice: Choice, events: Sequence[Event], now: float) -> None:
        """Note the times of tokens. Tokens that come together share the time since the last one."""
        count = sum(event.token is not None for event in events)
        if not count:
            return
        metrics, before = self._metrics, self._last.get(choice)
        metrics.generated_tokens.inc(count)
        if before is None:
            metrics.first_token.observe(now - self._begun)
        else:
            for _ in range(count):
                metrics.between_tokens.observe((now - before) / count)
        self._last[choice] = now
