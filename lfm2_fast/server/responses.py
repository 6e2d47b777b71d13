"""``/v1/responses`` without stored responses: text, thinking, tool calls, whole or as a stream."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

from lfm2_fast.server.answers import Answers
from lfm2_fast.server.chat import start_chat
from lfm2_fast.server.errors import ApiError, refused
from lfm2_fast.server.output import Part
from lfm2_fast.server.protocol import parse
from lfm2_fast.server.reply import Reply
from lfm2_fast.server.responses_body import REFUSED, ResponsesBody, chat_of, check_echoed
from lfm2_fast.server.service import Service
from lfm2_fast.text.reply_parser import Delta


async def response(service: Service, data: bytes) -> ResponsesReply:
    """Answer a body of ``/v1/responses``. Raises ApiError."""
    body = parse(ResponsesBody, data)
    for name, advice in REFUSED.items():
        if (body.model_extra or {}).get(name):
            raise refused(f"{name} is not supported: {advice}", name)
    if body.truncation == "auto":
        raise refused(
            "truncation must be disabled: a client would not see what is left out", "truncation"
        )
    if not body.input:
        raise ApiError(
            "input is empty: give a text or messages", param="input", code="invalid_value"
        )
    check_echoed(body)
    try:
        return ResponsesReply(service, await start_chat(service, chat_of(body)), body)
    except ApiError as error:
        if (error.param or "").startswith("messages"):
            error.param = "input"
        raise


class ResponsesReply(Reply):
    """Response, whole or as events. Its items are thinking, a message and calls, in their order."""

    done_mark = False

    def __init__(self, service: Service, answers: Answers, body: ResponsesBody) -> None:
        super().__init__(answers, "resp_", service.served(body.model), bool(body.stream))
        self._texts, self._body = service.texts, body
        self._items: list[dict[str, Any]] = []
        self._kind: str | None = None
        self._sequence = 0
        self._end: str | None = None
        self._logprobs: list[Any] = []
        self._wants_logprobs = body.top_logprobs is not None or "message.output_text.logprobs" in (
            body.include or ()
        )

    def first(self) -> Iterable[dict[str, Any]]:
        """Yield that the response begins."""
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._response("in_progress"))

    def news(self, part: Part) -> Iterable[dict[str, Any]]:
        """Yield the events of a part's pieces."""
        self._logprobs += part.logprobs
        for piece in part.deltas:
            yield from self._piece(piece)
        self._end = part.finish_reason or self._end

    def last(self) -> Iterable[dict[str, Any]]:
        """Yield the end of the last item, and the whole response."""
        status = self._status()
        yield from self._close(status)
        yield self._event(f"response.{status}", response=self._response(status))

    def failed(self, error: ApiError) -> dict[str, Any]:
        """Return the event of an error."""
        given = {"code": error.code or error.kind, "message": error.message}
        return self._event("error", **given, param=error.param)

    def whole(self, parts: list[Part]) -> dict[str, Any]:
        """Return the response."""
        for part in parts:
            for _ in self.news(part):
                pass
        status = self._status()
        for _ in self._close(status):
            pass
        return self._response(status)

    def _status(self) -> str:
        return "incomplete" if self._end == "length" else "completed"

    def _piece(self, piece: Delta) -> Iterable[dict[str, Any]]:
        if piece.kind == "tool_call":
            yield from self._close()
            yield from self._call(piece)
            return
        if self._kind != piece.kind:
            yield from self._close()
            yield from self._open(piece.kind)
        item = self._items[-1]
        item["content"][0]["text"] += piece.text
        name = "output_text" if piece.kind == "text" else "reasoning_text"
        more: dict[str, Any] = {}
        if piece.kind == "text":
            more["logprobs"] = self._new_logprobs()
        yield self._event(f"response.{name}.delta", **self._place(), delta=piece.text, **more)

    def _new_logprobs(self) -> list[dict[str, Any]]:
        """Return the log-probabilities of the pieces since the last call."""
        found, self._logprobs = self._logprobs, []
        new = self._texts.chat(found)["content"] if self._wants_logprobs else []
        if self._items and self._kind == "text":
            self._items[-1]["content"][0]["logprobs"] += new
        return list(new)

    def _open(self, kind: str) -> Iterable[dict[str, Any]]:
        self._kind = kind
        part: dict[str, Any]
        item: dict[str, Any]
        if kind == "text":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"type": "message", "role": "assistant", "id": _id("msg")}
        else:
            part = {"type": "reasoning_text", "text": ""}
            item = {"type": "reasoning", "summary": [], "id": _id("rs")}
        item |= {"status": "in_progress", "content": []}
        self._items.append(item)
        yield self._event("response.output_item.added", **self._at(), item={**item})
        item["content"] = [part]
        # A copy: the item's own part grows.
        yield self._event("response.content_part.added", **self._place(), part={**part})

    def _close(self, status: str = "completed") -> Iterable[dict[str, Any]]:
        if self._kind is None:
            return
        item = self._items[-1]
        self._new_logprobs()
        part = item["content"][0]
        name = "output_text" if self._kind == "text" else "reasoning_text"
        more = {"logprobs": part["logprobs"]} if self._kind == "text" else {}
        self._kind = None
        yield self._event(f"response.{name}.done", **self._place(), text=part["text"], **more)
        yield self._event("response.content_part.done", **self._place(), part=part)
        item["status"] = status
        yield self._event("response.output_item.done", **self._at(), item=item)

    def _call(self, piece: Delta) -> Iterable[dict[str, Any]]:
        item = {
            "type": "function_call",
            "id": _id("fc"),
            "call_id": piece.id,
            "name": piece.name,
            "arguments": "",
            "status": "in_progress",
        }
        self._items.append(item)
        yield self._event("response.output_item.added", **self._at(), item={**item})
        name = "response.function_call_arguments"
        given = {**self._at(), "item_id": item["id"]}
        yield self._event(f"{name}.delta", **given, delta=piece.arguments)
        item |= {"arguments": piece.arguments, "status": "completed"}
        yield self._event(f"{name}.done", **given, name=piece.name, arguments=piece.arguments)
        yield self._event("response.output_item.done", **self._at(), item=item)

    def _at(self) -> dict[str, Any]:
        return {"output_index": len(self._items) - 1}

    def _place(self) -> dict[str, Any]:
        return {**self._at(), "item_id": self._items[-1]["id"], "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        made = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return made

    def _response(self, status: str) -> dict[str, Any]:
        """Return the response object as it is now."""
        body = self._body
        ended = status != "in_progress"
        made: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": (body.model_extra or {}).get("metadata") or {},
            "model": self.model,
            "output": list(self._items),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": body.reasoning or {"effort": None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": _usage(self.answers.usage()) if ended else None,
        }
        if status == "incomplete":
            made["incomplete_details"] = {"reason": "max_output_tokens"}
        return made


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


def _usage(found: dict[str, Any]) -> dict[str, Any]:
    """Return a usage object under the names of this endpoint."""
    return {
        "input_tokens": found["prompt_tokens"],
        "input_tokens_details": found["prompt_tokens_details"],
        "output_tokens": found["completion_tokens"],
        "output_tokens_details": found["completion_tokens_details"],
        "total_tokens": found["total_tokens"],
    }
