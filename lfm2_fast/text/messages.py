"""Messages of clients, converted to the form that chat templates read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lfm2_fast.text.literals import LiteralError, LiteralReader
from lfm2_fast.text.markers import CALL_PAIR
from lfm2_fast.text.tool_calls import written_calls

ROLES = {"developer": "system"}
# Names of the field for thinking, in clients' messages and in templates.
THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")


def normalize_messages(
    messages: Sequence[Mapping[str, Any]], template: str | None = None
) -> list[dict[str, Any]]:
    """Return copies of ``messages`` in the form that templates of this family read.

    The arguments of earlier calls become mappings. Parts of text become one string, and missing
    content becomes "". The role "developer" becomes "system". Thinking is stored under all of its
    names. If the chat ``template`` is given and reads no tool calls, they are written into the
    content. Raises ValueError, which names the message, for a wrong one.
    """
    return [_normalized(message, at, template) for at, message in enumerate(messages)]


def _normalized(message: Mapping[str, Any], at: int, template: str | None) -> dict[str, Any]:
    where = f"messages[{at}]"
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} must be an object, got {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str):
        raise ValueError(f"{where}.role must be a string, got {role!r}")
    made = {**message, "role": ROLES.get(role, role)}
    made["content"] = _content(message.get("content"), where)
    thought = next((made[key] for key in THINKING_KEYS if isinstance(made.get(key), str)), None)
    for key in THINKING_KEYS:
        made.pop(key, None)
        if thought is not None:
            made[key] = thought
    calls = message.get("tool_calls")
    if not calls:
        made.pop("tool_calls", None)
        return made
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ValueError(f"{where}.tool_calls must be a list, got {type(calls).__name__}")
    made["tool_calls"] = [_call(each, f"{where}.tool_calls[{i}]") for i, each in enumerate(calls)]
    if template is not None and "tool_calls" not in template:
        functions = [each["function"] for each in made["tool_calls"]]
        pairs = [(function["name"], function["arguments"]) for function in functions]
        written = f"{CALL_PAIR[0]}{written_calls(pairs)}{CALL_PAIR[1]}"
        made["content"] = f"{written}{made['content']}"
    return made


def _content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"{where}.content must be a string or a list of parts of type text")
    texts = []
    for place, part in enumerate(content):
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(
                f"{where}.content[{place}] is of type {kind!r}, and this model reads only text: "
                "send parts of type text"
            )
        texts.append(part["text"])
    return "".join(texts)


def _call(given: Any, where: str) -> dict[str, Any]:
    function = given.get("function") if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where}.function must be an object with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = _parsed(arguments)
        except LiteralError as error:
            raise ValueError(
                f"{where}.function.arguments must be the text of a JSON object: {error}"
            ) from error
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise ValueError(
            f"{where}.function.arguments must be a JSON object, got {type(arguments).__name__}"
        )
    return {**given, "function": {**function, "arguments": dict(arguments)}}


def _parsed(text: str) -> Any:
    if not text.strip():
        return {}
    value, at = LiteralReader(text).value(0)
    if text[at:].strip():
        raise LiteralError("text follows the object", at)
    return value
