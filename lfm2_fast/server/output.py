"""Choices: the tokens of one continuation -> text, thinking, tool calls, until a stop string."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from lfm2_fast.engine.decode import LogitsError
from lfm2_fast.engine.request import Event, LogProbs
from lfm2_fast.server.errors import ApiError, of_engine
from lfm2_fast.text.markers import overlap
from lfm2_fast.text.reply_parser import Delta
from lfm2_fast.text.token_stream import TokenDecoder


class Parser(Protocol):
    """Splits a reply: ``text.reply_parser.ReplyParser``, or a plain one."""

    reasoning_tokens: int

    def feed(self, token_ids: Sequence[int]) -> list[Delta]:
        """Return the deltas of the next tokens."""

    def finish(self) -> list[Delta]:
        """Return the deltas that were held back."""


class PlainParser:
    """Treats everything as text. Tokens in ``dropped`` have none."""

    def __init__(self, tokenizer: Any, dropped: Collection[int] = ()) -> None:
        self.reasoning_tokens = 0
        self._decoder, self._dropped = TokenDecoder(tokenizer), dropped

    def feed(self, token_ids: Sequence[int]) -> list[Delta]:
        """Return the text of the next tokens, up to the last complete character."""
        made = "".join(self._decoder.put(t) for t in token_ids if t not in self._dropped)
        return [Delta("text", made)] if made else []

    def finish(self) -> list[Delta]:
        """Return an incomplete character."""
        made = self._decoder.end()
        return [Delta("text", made)] if made else []


class StopText:
    """Passes text on up to the first of the strings ``stops``, which ends it.

    A possible beginning of a stop string is held back. With ``keep`` the string itself is passed on
    too.
    """

    def __init__(self, stops: Sequence[str], keep: bool = False) -> None:
        self.found = False
        self._stops, self._keep, self._held = stops, keep, ""

    def feed(self, text: str) -> str:
        """Return the text that can be passed on; nothing after a stop string."""
        if not self._stops or self.found:
            return "" if self.found else text
        self._held += text
        # The first complete one counts, independent of the pieces of the text.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            end, begin = min(found)
            self.found = True
            passed, self._held = self._held[: end if self._keep else begin], ""
            return passed
        held = max(overlap(self._held, stop) for stop in self._stops)
        whole = len(self._held) - held
        passed, self._held = self._held[:whole], self._held[whole:]
        return passed

    def finish(self) -> str:
        """Return the text that was held back: it was not a stop string."""
        held, self._held = self._held, ""
        return held


@dataclass
class Part:
    """New part of a choice: its deltas, their tokens, and the end if there is one."""

    index: int
    deltas: list[Delta] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, LogProbs]] = field(default_factory=list)
    prompt_logprobs: tuple[LogProbs | None, ...] | None = None
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        """Text of the answer."""
        return self._of("text")

    @property
    def reasoning(self) -> str:
        """Text of the thinking."""
        return self._of("reasoning")

    @property
    def calls(self) -> list[Delta]:
        """Tool calls."""
        return [delta for delta in self.deltas if delta.kind == "tool_call"]

    def _of(self, kind: str) -> str:
        return "".join(delta.text for delta in self.deltas if delta.kind == kind)

    def extend(self, other: Part) -> None:
        """Add a later part."""
        self.deltas += other.deltas
        self.tokens += other.tokens
        self.logprobs += other.logprobs
        self.prompt_logprobs = self.prompt_logprobs or other.prompt_logprobs
        self.finish_reason = other.finish_reason


class Choice:
    """One continuation: ``take`` turns its events into parts.

    ``ends`` are the tokens that end the text; they belong to it only with ``keep_stop``.
    ``one_call`` ends the choice after its first tool call. ``most`` limits the tokens that count.
    ``narrowed`` says that the client allowed few tokens alone.
    """

    def __init__(
        self,
        index: int,
        parser: Parser,
        *,
        stops: Sequence[str] = (),
        ends: Collection[int] = (),
        keep_stop: bool = False,
        one_call: bool = False,
        most: int | None = None,
        narrowed: bool = False,
    ) -> None:
        self.index, self.parser = index, parser
        self.tokens = 0
        self.reason: str | None = None
        self.called = False
        self._stop, self._narrowed = StopText(stops, keep_stop), narrowed
        self._ends, self._keep, self._one_call, self._most = ends, keep_stop, one_call, most

    @property
    def done(self) -> bool:
        """Return True if it has ended."""
        return self.reason is not None

    def take(self, events: Iterable[Event]) -> Part:
        """Return the new part from events. Raises ApiError if the continuation failed."""
        part = Part(self.index)
        for event in events:
            if self.done:
                break
            if event.prompt_logprobs is not None:
                part.prompt_logprobs = event.prompt_logprobs
            self._take(event, part)
        return part

    def _take(self, event: Event, part: Part) -> None:
        reason = event.finish_reason
        if self._narrowed and isinstance(event.error, LogitsError):
            raise ApiError(
                "none of allowed_token_ids can come next: a grammar or min_tokens forbids them; "
                "allow more tokens",
                param="allowed_token_ids",
                code="invalid_value",
            )
        if event.error is not None:
            raise of_engine(event.error)
        if reason == "deadline":
            raise ApiError(
                "the request took longer than the server allows; ask for fewer tokens",
                status=504,
                code="deadline_exceeded",
                headers={"X-Should-Retry": "false"},
            )
        if reason == "cancelled":
            raise ApiError("the request was cancelled", status=503, code="cancelled")
        token = event.token
        if token is not None and self._most != 0:
            self.tokens += 1
            part.tokens.append(token)
            if self._keep or not (reason == "stop" and token in self._ends):
                if event.logprobs is not None:
                    part.logprobs.append((token, event.logprobs))
                self._say(self.parser.feed([token]), part)
        if reason is not None and not self.done:
            self._say(self.parser.finish(), part)
            if rest := self._stop.finish():
                part.deltas.append(Delta("text", rest))
            self._end(part, reason)

    def _say(self, deltas: Iterable[Delta], part: Part) -> None:
        for delta in deltas:
            if self.done:
                return
            if delta.kind == "text":
                if text := self._stop.feed(delta.text):
                    whole = text == delta.text
                    part.deltas.append(delta if whole else replace(delta, text=text))
                if self._stop.found:
                    self._end(part, "stop")
                continue
            part.deltas.append(delta)
            if delta.kind == "tool_call":
                self.called = True
                if self._one_call:
                    self._end(part, "stop")

    def _end(self, part: Part, reason: str) -> None:
        self.reason = "tool_calls" if self.called and reason == "stop" else reason
        part.finish_reason = self.reason
