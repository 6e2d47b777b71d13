"""Tool calls as LFM2 writes them: a list of Python calls, or of JSON objects, read as data."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lfm2_fast.text.literals import LiteralError, LiteralReader, skip_space

_HEAD = re.compile(r"\s*([^\W\d][\w-]*(?:\.[\w-]+)*)\s*\(")
_ARGUMENT = re.compile(r"\s*([^\W\d]\w*)\s*=(?!=)")
# End of a call that cannot be read, outside of strings.
_NESTING = re.compile(r"[()\[\]{}\"',]|\\.", re.DOTALL)
# Most parts that are not calls. After them the rest of a text counts as one part.
MAX_FAULTS = 64
# Keys of a call's arguments in JSON.
ARGUMENTS = ("arguments", "parameters", "args")


class Call(NamedTuple):
    """Call of a tool. ``arguments`` is the text of a JSON object."""

    name: str
    arguments: str


def call(name: str, arguments: Mapping[str, Any]) -> Call:
    """Return the call of ``name`` with these arguments."""
    return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))


def read_calls(body: str) -> tuple[list[Call], list[str]]:
    """Return the calls in the text between the markers, and the parts that are not calls.

    If a call cannot be read, the other calls still are. It never raises.
    """
    calls: list[Call] = []
    rest: list[str] = []
    at = skip_space(body, 0)
    end = len(body.rstrip())
    if body.startswith("[", at):
        at += 1
        end -= body.endswith("]", 0, end) and end > at
    while (at := skip_space(body, at)) < end:
        try:
            found, after = _one(body, at, end)
            calls.append(found)
        except LiteralError:
            after = _after(body, at, end) if len(rest) < MAX_FAULTS else end
            if part := body[at:after].strip():
                rest.append(part)
        at = skip_space(body, after)
        at += body.startswith(",", at)
    return calls, rest


def _one(body: str, at: int, end: int) -> tuple[Call, int]:
    """Read the Python call or the JSON object at ``at``, and return it and its end."""
    if body.startswith("{", at):
        value, after = LiteralReader(body).value(at)
        return from_json(value, at), _ended(body, after, end)
    try:
        found, after = _python_call(body, at, mends=False)
        return found, _ended(body, after, end)
    except LiteralError:
        found, after = _python_call(body, at, mends=True)
        return found, _ended(body, after, end)


def _ended(body: str, at: int, end: int) -> int:
    """Return ``at`` if a call ends there: at a comma, or at the end of the list."""
    after = skip_space(body, at)
    if after < end and not body.startswith(",", after):
        raise LiteralError("',' or ']' is missing", after)
    return at


def from_json(value: Any, at: int = 0) -> Call:
    """Return the call in a JSON object, in any of the usual spellings.

    Raises LiteralError, which names the place ``at``.
    """
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise LiteralError("an object has no name of a tool", at)
    given: Any = next((value[key] for key in ARGUMENTS if key in value), {})
    if isinstance(given, str):
        given, after = LiteralReader(given).value(0) if given.strip() else ({}, 0)
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise LiteralError("arguments are not an object", at)
    return call(value["name"], given)


def _python_call(body: str, at: int, *, mends: bool) -> tuple[Call, int]:
    head = _HEAD.match(body, at)
    if head is None:
        raise LiteralError("a call is missing", at)
    reader = LiteralReader(body, mends=mends)
    arguments: dict[str, Any] = {}
    at, comma = head.end(), True
    while True:
        at = skip_space(body, at)
        if body.startswith(")", at):
            return call(head[1], arguments), at + 1
        if not comma:
            raise LiteralError("',' or ')' is missing", at)
        name = _ARGUMENT.match(body, at)
        if name is not None:
            arguments[name[1]], at = reader.value(name.end(), "argument")
        else:
            # A single mapping may have all arguments.
            start = at + 2 * body.startswith("**", at)
            given, at = reader.value(start, "argument")
            if not isinstance(given, dict):
                raise LiteralError("an argument has no name", start)
            arguments |= given
        at = skip_space(body, at)
        comma = body.startswith(",", at)
        at += comma


def _after(body: str, at: int, end: int) -> int:
    """Return the end of a call that cannot be read: the next comma, or ``end``."""
    depth, quotes = 0, {quote: body.rfind(quote) for quote in "'\""}
    while (found := _NESTING.search(body, at, end)) is not None:
        at, what = found.end(), found[0]
        if what in quotes:
            # A quote without a second one of its kind opens no string.
            if at <= quotes[what]:
                at = _string_end(body, at, what)
        elif what in "([{":
            depth += 1
        elif what in ")]}":
            depth -= 1
        elif what == "," and depth <= 0:
            return found.start()
    return end


def _string_end(body: str, at: int, quote: str) -> int:
    while (found := _CLOSER[quote].search(body, at)) is not None:
        at = found.end()
        if found[0] == quote:
            return at
    return at


_CLOSER = {quote: re.compile(rf"{quote}|\\.", re.DOTALL) for quote in "'\""}


def written_calls(calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Write calls as LFM2 does between the markers. ``read_calls`` is the inverse."""
    written = []
    for name, arguments in calls:
        pairs = (f"{key}={_written(value)}" for key, value in arguments.items())
        written.append(f"{name}({', '.join(pairs)})")
    return f"[{', '.join(written)}]"


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value)
    return json.dumps(value, ensure_ascii=False)
