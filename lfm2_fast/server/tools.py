"""Tools of a chat: their checks, and the rules for their calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lfm2_fast.server.errors import ApiError, refused
from lfm2_fast.server.protocol import ChatBody


@dataclass(frozen=True)
class Tools:
    """Tools of a body, in the form of templates, and the rules for their calls."""

    functions: tuple[Mapping[str, Any], ...] = ()
    choice: str = "none"
    name: str | None = None

    @property
    def shown(self) -> tuple[Mapping[str, Any], ...]:
        """Tools in the prompt."""
        return () if self.choice == "none" else self.functions


def tools_of(body: ChatBody) -> Tools:
    """Return the tools of a body. Raises ApiError for a wrong tool or an unknown name."""
    functions = tuple(
        checked_tool(tool, f"tools[{place}]") for place, tool in enumerate(body.tools or ())
    )
    choice: Any = body.tool_choice
    if choice is None:
        choice = "auto" if functions else "none"
    if isinstance(choice, str):
        if choice == "required" and not functions:
            raise ApiError(
                "tool_choice is required, but there are no tools",
                param="tool_choice",
                code="invalid_value",
            )
        return Tools(functions, choice if functions else "none")
    named = choice.get("function") if choice.get("type") == "function" else None
    name = named.get("name") if isinstance(named, Mapping) else None
    names = [each["function"]["name"] for each in functions]
    if not isinstance(name, str) or name not in names:
        raise ApiError(
            "tool_choice must be none, auto, required, or an object of type function with the "
            f"name of one of the tools: {', '.join(names) or 'there are none'}",
            param="tool_choice",
            code="invalid_value",
        )
    return Tools(functions, "named", name)


def checked_tool(tool: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return a tool with all fields for templates and grammars. Raises ApiError."""
    if tool.get("type") != "function":
        raise refused(f"{where}.type must be function, got {str(tool.get('type'))[:100]!r}", where)
    function = tool.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ApiError(
            f"{where}.function must be an object with a name", param=where, code="invalid_value"
        )
    if not isinstance(function.get("parameters", {}), Mapping | None):
        raise ApiError(
            f"{where}.function.parameters must be a JSON schema",
            param=where,
            code="invalid_value",
        )
    return tool
