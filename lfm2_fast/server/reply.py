"""Reply: an endpoint's answer, whole or as a stream of JSON objects."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from lfm2_fast.server.answers import Answers
from lfm2_fast.server.errors import ApiError
from lfm2_fast.server.output import Part
from lfm2_fast.server.protocol import StreamOptions


class Reply(ABC):
    """Answers in the form of one endpoint; ``close`` it at the end.

    A stream is ``first``, then the ``news`` of parts, then ``last``. ``id`` and ``created`` are in
    all its objects. With ``done_mark`` a stream ends with the line ``[DONE]``.
    """

    done_mark = True

    def __init__(self, answers: Answers, prefix: str, model: str, stream: bool) -> None:
        self.answers, self.model, self.stream = answers, model, stream
        self.id = f"{prefix}{secrets.token_hex(12)}"
        self.created = int(time.time())

    @abstractmethod
    def first(self) -> Iterable[dict[str, Any]]:
        """Return the objects at the beginning of a stream."""

    @abstractmethod
    def news(self, part: Part) -> Iterable[dict[str, Any]]:
        """Return the objects of a part."""

    @abstractmethod
    def last(self) -> Iterable[dict[str, Any]]:
        """Return the objects at the end of a stream."""

    @abstractmethod
    def whole(self, parts: list[Part]) -> dict[str, Any]:
        """Return the answer in one object."""

    def failed(self, error: ApiError) -> dict[str, Any]:
        """Return the object of a failure in a stream."""
        return error.body

    async def complete(self) -> dict[str, Any]:
        """Wait, and return the answer in one object. Raises ApiError."""
        try:
            return self.whole(await self.answers.all())
        finally:
            self.close()

    def close(self) -> None:
        """End the choices that have not ended."""
        self.answers.close()


class ChoicesReply(Reply):
    """Reply of an endpoint with choices in chunks."""

    def __init__(
        self,
        answers: Answers,
        prefix: str,
        model: str,
        stream: bool,
        kind: str,
        options: StreamOptions | None,
    ) -> None:
        super().__init__(answers, prefix, model, stream)
        self._kind = kind
        self._usage = bool(options and options.include_usage)
        self._each = bool(options and options.continuous_usage_stats)

    def head(self, kind: str) -> dict[str, Any]:
        """Return the first fields of every object."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a chunk of a stream."""
        made = {**self.head(self._kind), "choices": choices}
        if self._usage or self._each:
            made["usage"] = self.answers.usage() if self._each else None
        return made

    def last(self) -> Iterable[dict[str, Any]]:
        """Yield the usage, if the client wants it."""
        if self._usage:
            yield {**self.head(self._kind), "choices": [], "usage": self.answers.usage()}
