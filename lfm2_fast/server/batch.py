"""Batches: requests of a file in OpenAI's batch format, answered without a server."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lfm2_fast.server.chat import chat_completion
from lfm2_fast.server.completions import completion
from lfm2_fast.server.errors import ApiError, of_engine
from lfm2_fast.server.reply import Reply
from lfm2_fast.server.responses import response
from lfm2_fast.server.service import Service

Begin = Callable[[Service, bytes], Awaitable[Reply]]
CHAT = "/v1/chat/completions"
ENDPOINTS: dict[str, Begin] = {
    CHAT: chat_completion,
    "/v1/completions": completion,
    "/v1/responses": response,
}


@dataclass
class Summary:
    """Counts of a run: ``kept`` were answered before, ``failed`` are among the ``answered``."""

    answered: int = 0
    failed: int = 0
    kept: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0


@dataclass
class Done:
    """Requests that an output file answers: their ids, and numbers of lines without one."""

    ids: set[str] = field(default_factory=set)
    lines: set[int] = field(default_factory=set)

    def has(self, number: int, id: str | None) -> bool:
        """Return True if the request of a line is answered."""
        return number in self.lines or id in self.ids


@dataclass(frozen=True)
class Line:
    """Line of the input: its request, or its fault."""

    number: int
    id: str | None = None
    begin: Begin | None = None
    body: bytes = b""
    wrong: ApiError | None = None


class Output:
    """Answers appended to a file, one in each line. Only one process may have it open.

    A line that a crash cut off is removed. Raises ValueError if another process writes.
    """

    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = path.open("ab+", buffering=0)
        try:
            _lock(self.file, path)
            self.done = self._read()
        except BaseException:
            self.file.close()
            raise

    def _read(self) -> Done:
        done, whole = Done(), 0
        self.file.seek(0)
        with os.fdopen(os.dup(self.file.fileno()), "rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                with suppress(ValueError, AttributeError, TypeError):
                    answer = json.loads(line)
                    if (number := (answer.get("error") or {}).get("line")) is not None:
                        done.lines.add(number)
                    else:
                        done.ids.add(answer["custom_id"])
        self.file.truncate(whole)
        return done

    def write(self, line: dict[str, Any]) -> None:
        """Append a line, whole or not at all."""
        data = encoded(line) + b"\n"
        while data:
            data = data[self.file.write(data) :]

    def close(self) -> None:
        """Write the file to the disk, and close it."""
        os.fsync(self.file.fileno())
        self.file.close()


def encoded(line: dict[str, Any]) -> bytes:
    """Return a line as JSON."""
    try:
        return json.dumps(line, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # Half a surrogate pair in a custom_id, which must be read again as it is.
        return json.dumps(line).encode()


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows does not have these locks
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(
            f"another process writes to {path}; give each shard a file of its own"
        ) from error


def shard_of(text: str) -> tuple[int, int]:
    """Return the shard i/n as (i, n), from 1/n to n/n. Raises ValueError."""
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise ValueError(f"--shard must be I/N with I from 1 to N, like 1/4, got {text!r}")
    return int(first), int(second)


def lines_of(path: Path, shard: tuple[int, int] = (1, 1)) -> Iterator[Line]:
    """Yield the lines of an input file that belong to a shard; empty ones are left out."""
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            line = line_of(number, text)
            if line.id is not None and line.id in seen:
                line = repeated(line)
            elif line.id is not None:
                seen.add(line.id)
            if number % shard[1] == shard[0] % shard[1]:
                yield line


def repeated(line: Line) -> Line:
    """Return the fault of a line whose custom_id an earlier line has."""
    error = ApiError(
        f"line {line.number}: custom_id {(line.id or '')[:100]!r} is in an earlier line too",
        param="custom_id",
        code="duplicate_custom_id",
    )
    return Line(line.number, line.id, wrong=error)


def line_of(number: int, text: bytes) -> Line:
    """Return the request of a line, or its fault."""

    def wrong(message: str, param: str | None, code: str = "invalid_value") -> Line:
        return Line(number, wrong=ApiError(f"line {number}: {message}", param=param, code=code))

    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        return wrong(f"it is not JSON: {error}"[:300], None, "invalid_json")
    if not isinstance(fields, dict):
        return wrong("it must be a JSON object", None, "invalid_json")
    id, url, body = fields.get("custom_id"), fields.get("url", CHAT), fields.get("body")
    if not isinstance(id, str) or not id:
        return wrong("custom_id must be a string that is not empty", "custom_id")
    if fields.get("method", "POST") != "POST":
        return wrong("method must be POST", "method")
    if not isinstance(url, str) or url not in ENDPOINTS:
        return wrong(f"url must be one of {', '.join(ENDPOINTS)}", "url")
    if not isinstance(body, dict):
        return wrong("body must be a JSON object", "body")
    return Line(number, id, ENDPOINTS[url], json.dumps(body).encode())


async def run_batch(
    service: Service,
    lines: Iterator[Line],
    output: Output,
    *,
    at_once: int,
    progress: Callable[[Summary], None] = lambda summary: None,
) -> Summary:
    """Answer the requests of lines that the output does not answer, ``at_once`` at a time.

    Answers are appended one by one, and ``progress`` is called after each. A wrong request gets an
    error as its answer. If the engine itself ends, its error is raised.
    """
    summary = Summary()

    async def work() -> None:
        # All workers take from one iterator.
        for line in lines:
            if output.done.has(line.number, line.id if line.wrong is None else None):
                summary.kept += 1
                continue
            made = await answer_line(service, line)
            output.write(made)
            _count(summary, made)
            progress(summary)

    workers = [asyncio.ensure_future(work()) for _ in range(at_once)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return summary


async def answer_line(service: Service, line: Line) -> dict[str, Any]:
    """Return the line that answers a request. Raises the engine's error if the engine has ended."""
    made: dict[str, Any] = {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": line.id,
        "response": None,
        "error": None,
    }
    if line.wrong is not None:
        made["error"] = {**line.wrong.body["error"], "line": line.number}
        return made
    assert line.begin is not None
    status, body = 200, {}
    try:
        body = await (await line.begin(service, line.body)).complete()
    except Exception as error:
        failed = of_engine(error)
        if failed.code == "engine_stopped":
            raise
        status, body = failed.status, failed.body
    made["response"] = {
        "status_code": status,
        "request_id": f"req-{secrets.token_hex(8)}",
        "body": body,
    }
    return made


def _count(summary: Summary, made: dict[str, Any]) -> None:
    summary.answered += 1
    answer = made["response"]
    if answer is None or answer["status_code"] != 200:
        summary.failed += 1
        return
    usage = answer["body"]["usage"]
    prompt = usage.get("prompt_tokens", usage.get("input_tokens", 0))
    summary.prompt_tokens += prompt
    summary.new_tokens += usage["total_tokens"] - prompt
