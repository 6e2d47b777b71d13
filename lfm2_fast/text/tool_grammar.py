"""Grammar of tool calls in Lark: the tools' schemas in the model's own syntax."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lfm2_fast.text.markers import Marker

# Most levels of a schema.
MAX_DEPTH = 48
# Most alternatives of a value in XML.
MAX_KINDS = 256
# White space between parts of JSON. Without a limit a model may write white space forever.
WHITE_SPACE = r"[ \n\t\r]{0,32}"

_NAME = re.compile(r"[^\W\d][\w-]*(\.[\w-]+)*")
_KEY = {False: re.compile(r"[^\W\d]\w*"), True: re.compile(r"[^>\n]*[^>\s]")}
# Keywords of a schema whose properties can be written one by one.
_PLAIN = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_PLAIN |= {"title", "description", "$schema", "$id", "strict", "default", "examples"}
_LOCAL = ("#/$defs/", "#/definitions/")
_VALUE_END = "\n</parameter>\n"
_VALUE_END_PATTERN = r"\n<\/parameter>\n"


def options(strict: bool) -> dict[str, Any]:
    """Return llguidance's options for a JSON schema."""
    return {
        "whitespace_pattern": WHITE_SPACE,
        "lenient": not strict,
        "coerce_one_of": not strict,
    }


def checked_schema(schema: Any, where: str) -> Any:
    """Return a schema, parsed if it is text. Raises ValueError if it is wrong or too deep."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(schema, (Mapping, bool)):
        raise ValueError(f"{where} must be an object, got {type(schema).__name__}")
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH + 1):
        level = [value for each in level for value in _parts(each)]
        if not level:
            break
    else:
        raise ValueError(f"{where} is more than {MAX_DEPTH} values deep")
    try:
        json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    return schema


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value


def tools_grammar(
    tools: Sequence[Mapping[str, Any]],
    only: str | None,
    markers: tuple[Marker, Marker],
    *,
    xml: bool,
    parallel: bool,
    answer: Any = None,
    strict: bool = True,
) -> str:
    """Return the grammar, in Lark, of calls of ``tools`` between their markers.

    With ``only`` it has calls of the tool of that name alone. With a schema ``answer`` a reply may
    be JSON of that schema instead, which ``strict`` enforces whole. Raises ValueError, which names
    the tool, if a tool or its schema is wrong.
    """
    functions = [_function(tool, f"tools[{place}]") for place, tool in enumerate(tools)]
    names = [function["name"] for function in functions]
    if only is not None and only not in names:
        raise ValueError(
            f"tool_choice names {only!r}, which is not a tool here: {', '.join(names) or 'none'}"
        )
    if not functions:
        raise ValueError("tools is empty: calls need at least one tool")
    chosen = [function for function in functions if only in (None, function["name"])]
    start, end = (_marker(marker) for marker in markers)
    calls = " | ".join(f"call_{place}" for place in range(len(chosen)))
    rules = [f"call: {calls}"]
    if xml:
        more = ' ("\\n" one)*' if parallel else ""
        rules = [f"calls: one{more}", f'one: {start} "\\n" call "\\n" {end}', *rules]
    else:
        more = ' (", " call)*' if parallel else ""
        rules = [f'calls: {start} "[" call{more} "]" {end}', *rules]
    if answer is None:
        rules.insert(0, "start: calls")
    else:
        rules = ["start: calls | answer", f"answer: {_json(answer, strict)}", *rules]
    for place, function in enumerate(chosen):
        rules += _call(place, function, xml)
    return "\n".join(rules)


def _marker(marker: Marker) -> str:
    return _text(marker.text) if marker.id is None else f"<[{marker.id}]>"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _function(tool: Any, where: str) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} must be a function with a name")
    name = function["name"]
    if not name.strip():
        raise ValueError(f"{where} has no name")
    schema = function.get("parameters")
    schema = checked_schema({} if schema is None else schema, f"the parameters of tool {name!r}")
    return {"name": name, "schema": schema, "strict": function.get("strict") is True}


def _call(place: int, function: Mapping[str, Any], xml: bool) -> list[str]:
    """Return the rules of calls of one function."""
    name, schema, strict = function["name"], function["schema"], function["strict"]
    if not _NAME.fullmatch(name) or not _is_plain(schema, xml):
        # Arguments that the model's own syntax cannot express become a JSON object, which it writes
        # too.
        begin = f'{{"name": {_text(name)}, "arguments": '
        whole = {"type": "object"} | dict(schema) if isinstance(schema, Mapping) else {}
        return [f'call_{place}: {_text(begin)} value_{place} "}}"'] + [
            f"value_{place}: {_json(whole, strict)}"
        ]
    properties = schema.get("properties") or {}
    required = schema.get("required") or []
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    pairs = list(properties.items())
    begin, end = (f"<function={name}>\n", "</function>") if xml else (f"{name}(", ")")
    rules = [f"call_{place}: {_text(begin)} first_{place}_0 {_text(end)}"]
    for at, (key, value) in enumerate(pairs):
        pair = f"pair_{place}_{at}"
        after = f"{'first' if xml else 'rest'}_{place}_{at + 1}"
        needed = key in required
        rules.append(f"first_{place}_{at}: {pair} {after}")
        if not needed:
            rules[-1] += f" | first_{place}_{at + 1}"
        if not xml:
            rules.append(f'rest_{place}_{at}: ", " {pair} {after}')
            if not needed:
                rules[-1] += f" | rest_{place}_{at + 1}"
        rules += (_xml_pair if xml else _pair)(pair, key, value, shared, strict)
    rules.append(f'first_{place}_{len(pairs)}: ""')
    if not xml:
        rules.append(f'rest_{place}_{len(pairs)}: ""')
    return rules


def _pair(rule: str, key: str, schema: Any, shared: dict[str, Any], strict: bool) -> list[str]:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind == "boolean" and not schema.keys() & {"enum", "const"}:
        return [f'{rule}: {_text(f"{key}=")} ("True" | "False")']
    if kind == "null":
        return [f"{rule}: {_text(f'{key}=None')}"]
    return [
        f"{rule}: {_text(f'{key}=')} {rule}_value",
        f"{rule}_value: {_json(schema, strict, shared)}",
    ]


def _xml_pair(rule: str, key: str, schema: Any, shared: dict[str, Any], strict: bool) -> list[str]:
    """Return the rules of an argument in XML, where texts have no quotes."""
    # Schemas may refer to each other in circles.
    kinds = list(itertools.islice(_kinds(schema, shared, MAX_DEPTH), MAX_KINDS))
    names = [f"{rule}_{place}" for place in range(len(kinds))]
    rules = [f"{rule}: {_text(f'<parameter={key}>' + chr(10))} ({' | '.join(names)})"]
    for name, kind in zip(names, kinds, strict=True):
        if isinstance(kind, str):
            rules.append(f"{name}: {_text(kind + _VALUE_END)}")
        elif isinstance(kind, Mapping) and kind.get("type") != "string":
            rules.append(f"{name}: {name}_value {_text(_VALUE_END)}")
            rules.append(f"{name}_value: {_json(kind, strict, shared)}")
        elif isinstance(kind, Mapping) and (pattern := _pattern(kind)):
            rules.append(f"{name}: /{pattern}{_VALUE_END_PATTERN}/")
        else:
            rules.append(f"{name}: {name}_text")
            rules.append(f"{name}_text[suffix={_text(_VALUE_END)}]: /(?s:.*)/")
    return rules


def _kinds(schema: Any, shared: Mapping[str, Any], depth: int) -> Iterator[Any]:
    """Yield the alternatives of a value: a fixed text, a schema of one type, None for any text."""
    if isinstance(schema, Mapping) and depth:
        if "$ref" in schema:
            place, _, name = str(schema["$ref"])[2:].partition("/")
            named = shared.get(place)
            found = named.get(name) if isinstance(named, Mapping) else None
            yield from _kinds(found, shared, depth - 1)
            return
        choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(choices, list):
            yield from (each if isinstance(each, str) else {"const": each} for each in choices)
            return
        either = schema.get("anyOf", schema.get("oneOf"))
        if isinstance(either, list):
            for each in either:
                yield from _kinds(each, shared, depth - 1)
            return
        kinds = schema.get("type")
        if kinds is not None:
            for kind in kinds if isinstance(kinds, list) else [kinds]:
                yield {**schema, "type": kind}
            return
    yield None


def _pattern(schema: Mapping[str, Any]) -> str | None:
    """Return a regular expression of the texts of a schema, None for any."""
    pattern = schema.get("pattern")
    if isinstance(pattern, str) and pattern[:1] == "^" and pattern[-1:] == "$":
        return "(" + re.sub(r"(?<!\\)/", r"\\/", pattern[1:-1]) + ")"
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if isinstance(most, int):
        return f"(?s:.{{{least},{most}}})"
    return None


def _json(schema: Any, strict: bool, shared: Mapping[str, Any] | None = None) -> str:
    if not isinstance(schema, Mapping):
        schema = {} if schema else {"enum": []}
    whole = {**schema, **(shared or {}), "x-guidance": options(strict)}
    return f"%json {json.dumps(whole, ensure_ascii=False)}"


def _is_plain(schema: Any, xml: bool) -> bool:
    """Return True if arguments of this schema have only its properties."""
    if not isinstance(schema, Mapping) or not schema.keys() <= _PLAIN:
        return False
    if schema.get("type", "object") != "object" or isinstance(
        schema.get("additionalProperties"), Mapping
    ):
        return False
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        return False
    if not all(_KEY[xml].fullmatch(key) for key in properties):
        return False
    return set(required) <= properties.keys() and all(_is_local(ref) for ref in _refs(schema))


def _is_local(ref: Any) -> bool:
    return isinstance(ref, str) and ref.startswith(_LOCAL)


def _refs(schema: Any) -> Iterator[Any]:
    if isinstance(schema, Mapping) and "$ref" in schema:
        yield schema["$ref"]
    for part in _parts(schema):
        yield from _refs(part)
