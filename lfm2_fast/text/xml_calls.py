"""Tool calls as LFM3 writes them: XML between markers. Schemas give the types of values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lfm2_fast.text.literals import LiteralError, LiteralReader, joined_surrogates
from lfm2_fast.text.tool_calls import Call, call, read_calls

_FUNCTION = re.compile(r"<function=([^>\n]+)>")
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>")
_VALUE_END = re.compile(r"</parameter>|(?=<parameter=)|(?=</function>)|\Z")


def read_xml_calls(
    body: str, schemas: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[list[Call], list[str]]:
    """Return the calls in the text between the markers, and the parts that are not calls.

    ``schemas`` has the JSON schema of each tool's arguments. A value is a string if its schema says
    so. Otherwise it is read as a literal, or is a string if that fails. A JSON object in place of
    the XML is read too. It never raises.
    """
    if body.lstrip()[:1] in ("{", "["):
        return read_calls(body)
    calls, rest, at = [], [], 0
    while (head := _FUNCTION.search(body, at)) is not None:
        rest.append(body[at : head.start()].strip())
        properties = _properties((schemas or {}).get(head[1].strip()))
        arguments, at = {}, head.end()
        while True:
            end = body.find("</function>", at)
            end = len(body) if end < 0 else end
            parameter = _PARAMETER.search(body, at, end)
            if parameter is None:
                break
            closed = _VALUE_END.search(body, parameter.end())
            assert closed is not None
            text = body[parameter.end() : closed.start()]
            text = text.removeprefix("\n").removesuffix("\n")
            key = parameter[1].strip()
            arguments[key] = _value(text, properties.get(key))
            at = closed.end()
        at = min(end + len("</function>"), len(body))
        calls.append(call(head[1].strip(), arguments))
    rest.append(body[at:].strip())
    return calls, [part for part in rest if part]


def written_xml_call(name: str, arguments: Mapping[str, Any]) -> str:
    """Return a call as LFM3 writes it between the markers."""
    import json

    lines = [f"<function={name}>"]
    for key, value in arguments.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines += [f"<parameter={key}>", text, "</parameter>"]
    return "\n".join([*lines, "</function>"])


def _properties(schema: Any) -> Mapping[str, Any]:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}


def _value(text: str, schema: Any) -> Any:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind == "string" or isinstance(kind, list) and set(kind) <= {"string"}:
        return joined_surrogates(text)
    try:
        value, at = LiteralReader(text).value(0)
    except LiteralError:
        return joined_surrogates(text)
    # The format has no quoting, so a quoted string is text with quotes.
    whole = not text[at:].strip() and not isinstance(value, str)
    return value if whole else joined_surrogates(text)
