"""Bodies of ``/v1/responses``, and the equivalent chats."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from lfm2_fast.server.errors import ApiError, refused
from lfm2_fast.server.protocol import ChatBody, Count, Sampled

# Fields that would need stored responses, or features that do not exist here.
REFUSED = {
    "previous_response_id": "nothing is stored; send the whole conversation as input",
    "conversation": "nothing is stored; send the whole conversation as input",
    "prompt": "nothing is stored; send instructions and input",
    "background": "send the request and wait, or use lfm2-fast batch",
    "max_tool_calls": "it bounds calls of built-in tools, of which there are none",
}
# Fields of a chat that have the same name and meaning here.
SHARED = (*Sampled.model_fields, "parallel_tool_calls", "chat_template_kwargs")


class ResponsesBody(Sampled):
    """Body of a response."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=1024)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    top_logprobs: Count | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def check_echoed(body: ResponsesBody) -> None:
    """Raise ApiError for fields that an answer repeats and that hold numbers JSON has not."""
    given = {**body.model_dump(exclude_unset=True), **(body.model_extra or {})}
    for name in ("metadata", "reasoning", "text", "tool_choice", "tools"):
        try:
            json.dumps(given.get(name), allow_nan=False)
        except ValueError as error:
            raise ApiError(f"{name}: {error}", param=name, code="invalid_value") from None


def chat_of(body: ResponsesBody) -> ChatBody:
    """Return the equivalent chat. Raises ApiError."""
    fields = {name: getattr(body, name) for name in SHARED}
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        messages += messages_of(body.input)
    logprobs = body.top_logprobs is not None or "message.output_text.logprobs" in (
        body.include or ()
    )
    effort = (body.reasoning or {}).get("effort")
    if effort is not None and not isinstance(effort, str):
        raise ApiError("reasoning.effort must be a string", param="reasoning", code="invalid_value")
    if isinstance(choice := body.tool_choice, dict) and "name" in choice:
        choice = {"type": choice.get("type"), "function": {"name": choice["name"]}}
    return ChatBody.model_construct(
        **{
            **fields,
            "messages": messages,
            "max_completion_tokens": body.max_output_tokens,
            "logprobs": logprobs,
            "top_logprobs": (body.top_logprobs or 0) if logprobs else None,
            "reasoning_effort": effort,
            "tools": [_tool(tool, place) for place, tool in enumerate(body.tools or ())] or None,
            "tool_choice": choice,
            "response_format": _format(body),
        }
    )


def _tool(tool: Mapping[str, Any], place: int) -> dict[str, Any]:
    """Return a tool in the form of chats. Raises ApiError for OpenAI's built-in ones."""
    if tool.get("type") != "function":
        raise refused(
            f"tools[{place}].type must be function, got {str(tool.get('type'))[:100]!r}: there are "
            "no built-in tools",
            f"tools[{place}]",
        )
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if name in tool}}


def _format(body: ResponsesBody) -> dict[str, Any] | None:
    """Return the format of a body's text in the form of chats."""
    found = (body.text or {}).get("format")
    if found is None:
        return body.response_format
    if not isinstance(found, dict):
        raise ApiError("text.format must be an object", param="text", code="invalid_value")
    if found.get("type") != "json_schema" or "json_schema" in found:
        return found
    rest = {name: value for name, value in found.items() if name != "type"}
    return {"type": "json_schema", "json_schema": rest}


def messages_of(items: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages of a list of input items. Raises ApiError.

    Adjacent thinking and calls belong to one message of the assistant.
    """
    messages: list[dict[str, Any]] = []

    def assistant() -> dict[str, Any]:
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        return messages[-1]

    for place, item in enumerate(items):
        kind = item.get("type", "message")
        if kind == "message":
            content = item.get("content")
            if isinstance(content, list):
                content = [_part(part, f"input[{place}]") for part in content]
            messages.append({"role": item.get("role"), "content": content})
        elif kind == "reasoning":
            parts = [*(item.get("content") or ()), *(item.get("summary") or ())]
            texts = [part.get("text", "") for part in parts if isinstance(part, Mapping)]
            messages.append({"role": "assistant", "content": ""})
            messages[-1]["reasoning_content"] = "".join(map(str, texts))
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            assistant().setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = item.get("output")
            content = output if isinstance(output, str) else json.dumps(output)
            messages.append(
                {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
            )
        else:
            raise refused(
                f"input[{place}].type {str(kind)[:100]!r} is not supported: send messages, "
                "function calls and their outputs",
                f"input[{place}]",
            )
    return messages


def _part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("input_text", "output_text", "text"):
        raise refused(f"{where}: this model reads only text, got a part of type {kind!r}", where)
    return {"type": "text", "text": part.get("text")}
