"""Structured output: the grammar for the fields of a body."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lfm2_fast.server.errors import ApiError, refused
from lfm2_fast.server.protocol import Sampled
from lfm2_fast.server.service import Service, in_thread
from lfm2_fast.server.tools import Tools
from lfm2_fast.text.grammar import Grammar, GrammarCompiler

# Returns the grammar of the reply to a prompt, None without a constraint.
OfPrompt = Callable[[Sequence[int]], Grammar | None]
# Longest schema in characters that is compiled at once. A thread compiles longer ones.
LONG = 1 << 20


def _free(prompt: Sequence[int]) -> None:
    return None


async def constraint_of(
    service: Service, body: Sampled, tools: Tools | None = None, *, thinks: bool = False
) -> OfPrompt:
    """Return the maker of a body's grammar. Raises ApiError, which names the field.

    Calls that must come are constrained by the tools alone. Where calls may come, a reply that
    must be JSON is either. With ``thinks`` the reply may begin with thinking, which is free.
    """
    asked = wanted(body)
    choice = tools.choice if tools is not None else "none"
    if asked is None and choice == "none":
        return _free
    if asked is not None and choice == "auto" and asked[1] not in ("json", "object"):
        raise refused(
            f"{asked[0]} and tools exclude one another, unless it is a JSON schema; leave one out, "
            "or set tool_choice to none",
            asked[0],
        )
    compiler = service.compiler
    grammar: Grammar | None = None
    if asked is not None:
        field, kind, value, strict = asked
        grammar = await _compiled(field, lambda: compiled(compiler, field, kind, value, strict))
    if choice != "none":
        assert tools is not None
        parallel = getattr(body, "parallel_tool_calls", None) is not False
        more: dict[str, Any] = {"parallel": parallel}
        if asked is not None:
            more |= {"answer": {"type": "object"} if kind == "object" else value, "strict": strict}
        name = tools.name or choice
        grammar = await _compiled("tools", lambda: compiler.tools(tools.functions, name, **more))
    if grammar is None:
        return _free
    found = grammar
    return lambda prompt: found.for_reply(prompt, may_think=thinks)


async def _compiled(field: str, work: Callable[[], Grammar | None]) -> Grammar | None:
    """Return what ``work`` compiles. Raises ApiError, which names the field."""
    try:
        # Compiling takes milliseconds, and a large grammar seconds.
        return await in_thread(work, LONG)
    except ImportError as error:
        raise ApiError(
            f"{field} needs a library that this server lacks ({error})", status=501, param=field
        ) from None
    except ValueError as error:
        raise ApiError(str(error), param=field, code="invalid_grammar") from None


def wanted(body: Sampled) -> tuple[str, str, Any, bool] | None:
    """Return the field for a grammar, its kind, its value, and its strictness.

    Raises ApiError for a field of an unknown kind, and for two fields at once.
    """
    found = [each for each in (*_formats(body), *_structured(body), *_guided(body)) if each]
    if len(found) > 1:
        raise ApiError(
            f"{found[0][0]} and {found[1][0]} ask for a grammar each; give one",
            param=found[1][0],
            code="invalid_value",
        )
    return found[0] if found else None


def _formats(body: Sampled) -> list[tuple[str, str, Any, bool]]:
    given, field = body.response_format, "response_format"
    if given is None or given.get("type") == "text":
        return []
    kind = given.get("type")
    if kind == "json_object":
        schema = given.get("schema")  # llama.cpp's and others' spelling
        return [(field, "json" if schema is not None else "object", schema, True)]
    if kind == "json_schema":
        named = given.get("json_schema")
        if not isinstance(named, Mapping) or not isinstance(named.get("schema"), Mapping | bool):
            raise ApiError(
                "response_format.json_schema must be an object with a schema",
                param=field,
                code="invalid_value",
            )
        return [(field, "json", named["schema"], named.get("strict") is not False)]
    for name in ("regex", "grammar"):
        if kind == name:
            return [(field, name, given.get("pattern", given.get(name)), True)]
    raise ApiError(
        f"response_format.type must be text, json_object, json_schema, regex or grammar, got "
        f"{str(kind)[:100]!r}",
        param=field,
        code="invalid_value",
    )


def _structured(body: Sampled) -> list[tuple[str, str, Any, bool]]:
    given, field = body.structured_outputs, "structured_outputs"
    kinds = {"json": "json", "json_schema": "json", "json_object": "object", "regex": "regex"}
    kinds |= {"choice": "choice", "grammar": "grammar"}
    options = ("disable_fallback", "disable_any_whitespace", "whitespace_pattern")
    values = {name: value for name, value in (given or {}).items() if value not in (None, False)}
    if unknown := sorted(
        values.keys() - kinds.keys() - {*options, "disable_additional_properties"}
    ):
        raise refused(
            f"structured_outputs.{unknown[0][:100]} is not supported; use one of "
            f"{', '.join(kinds)}",
            field,
        )
    return [(field, kinds[name], values[name], True) for name in values if name in kinds]


def _guided(body: Sampled) -> list[tuple[str, str, Any, bool]]:
    kinds = {"guided_json": "json", "json_schema": "json", "guided_json_object": "object"}
    kinds |= {"guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
    kinds |= {"grammar": "grammar"}
    values = [(name, kind, getattr(body, name), True) for name, kind in kinds.items()]
    return [each for each in values if each[2] not in (None, False)]


def compiled(compiler: GrammarCompiler, field: str, kind: str, value: Any, strict: bool) -> Grammar:
    """Return a grammar of a kind. Raises ValueError for a wrong one."""
    if kind == "object":
        return compiler.json_object()
    if kind == "json":
        return compiler.json_schema(value, strict=strict)
    if kind == "choice":
        if not isinstance(value, list):
            raise ValueError(f"{field}: a choice must be a list of texts")
        return compiler.choice(value)
    if not isinstance(value, str):
        raise ValueError(f"{field}: a {kind} must be a string")
    return compiler.regex(value) if kind == "regex" else compiler.ebnf(value)
