"""``/v1/chat/completions``: messages in the chat template, answered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lfm2_fast.server.answers import Answers
from lfm2_fast.server.constraints import constraint_of
from lfm2_fast.server.errors import ApiError, refused
from lfm2_fast.server.output import Parser, Part, PlainParser
from lfm2_fast.server.parameters import Asked
from lfm2_fast.server.protocol import ChatBody, parse
from lfm2_fast.server.reply import ChoicesReply
from lfm2_fast.server.service import Service
from lfm2_fast.server.tools import tools_of
from lfm2_fast.text.reply_parser import Delta, ReplyParser

CHUNK = "chat.completion.chunk"


def variables_of(body: ChatBody) -> dict[str, Any]:
    """Return the variables that a body sets in the template."""
    found = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        found.setdefault("reasoning_effort", body.reasoning_effort)
        if body.reasoning_effort == "none":
            found.setdefault("enable_thinking", False)
    return found


async def start_chat(service: Service, body: ChatBody) -> Answers:
    """Add a chat to the engine. Raises ApiError."""
    service.check_model(body.model)
    tools = tools_of(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(
            "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value"
        )
    if set(body.modalities or ()) - {"text"}:
        raise refused("modalities must be text alone: this model writes nothing else", "modalities")
    constraint = await constraint_of(service, body, tools, thinks=service.thinks)
    text = await service.chat_prompt(body, tools.shown, variables_of(body))
    prompt = await service.tokens_of(text, special=bool(body.add_special_tokens))

    def parser(prompt: Sequence[int]) -> Parser:
        if body.skip_special_tokens is False:
            return PlainParser(service.tokenizer)
        return ReplyParser(
            service.tokenizer,
            tools=bool(tools.shown),
            thinking=None,
            prompt_ids=prompt,
            functions=tools.functions,
        )

    limits = [each for each in (body.max_completion_tokens, body.max_tokens) if each is not None]
    asked = Asked(
        body,
        service.defaults,
        service.vocab_size,
        service.max_length,
        limits[0] if limits else None,
        n=body.n or 1,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        constraint=constraint,
        seconds=service.options.seconds,
        field="messages",
    )
    return await service.start(asked, [prompt], parser, one_call=body.parallel_tool_calls is False)


class ChatReply(ChoicesReply):
    """Chat completion, whole or in chunks."""

    def __init__(self, service: Service, answers: Answers, body: ChatBody) -> None:
        super().__init__(
            answers,
            "chatcmpl-",
            service.served(body.model),
            bool(body.stream),
            CHUNK,
            body.stream_options,
        )
        self._texts, self._body = service.texts, body
        self._thinks = body.include_reasoning is not False
        self._unsent: dict[int, list[Any]] = {}

    def first(self) -> Iterable[dict[str, Any]]:
        """Yield the role of every choice."""
        for choice in self.answers.choices.values():
            delta = {"role": "assistant", "content": ""}
            yield self._chunk(choice.index, delta, None, None)

    def news(self, part: Part) -> Iterable[dict[str, Any]]:
        """Yield a chunk for each piece, and one for the end.

        If text is held back, the log-probabilities of its tokens come with the next piece.
        """
        unsent = self._unsent.setdefault(part.index, [])
        unsent += part.logprobs
        tokens: list[int] | None = part.tokens if self._body.return_token_ids else None
        for piece in part.deltas:
            if piece.kind == "reasoning" and not self._thinks:
                continue
            yield self._chunk(part.index, _delta(piece), None, self._logprobs(unsent), tokens)
            unsent.clear()
            tokens = [] if tokens is not None else None
        if part.finish_reason is not None:
            yield self._chunk(part.index, {}, part.finish_reason, self._logprobs(unsent), tokens)
            unsent.clear()

    def whole(self, parts: list[Part]) -> dict[str, Any]:
        """Return the completion."""
        choices = []
        for part in parts:
            calls, content = part.calls, part.text
            message: dict[str, Any] = {
                "role": "assistant",
                "content": content if content or not calls else None,
                "refusal": None,
            }
            if calls:
                message["tool_calls"] = [_call(call) for call in calls]
            if part.reasoning and self._thinks:
                message["reasoning"] = message["reasoning_content"] = part.reasoning
            choice = {
                "index": part.index,
                "message": message,
                "logprobs": self._texts.chat(part.logprobs) if self._body.logprobs else None,
                "finish_reason": part.finish_reason,
            }
            if self._body.return_token_ids:
                choice["token_ids"] = part.tokens
            choices.append(choice)
        made = {
            **self.head("chat.completion"),
            "choices": choices,
            "usage": self.answers.usage(),
        }
        if parts and parts[0].prompt_logprobs is not None:
            prompt = self.answers.prompts[0]
            made["prompt_logprobs"] = self._texts.prompt(prompt, parts[0].prompt_logprobs)
        if self._body.return_token_ids:
            made["prompt_token_ids"] = list(self.answers.prompts[0])
        return made

    def _logprobs(self, found: list[Any]) -> dict[str, Any] | None:
        return self._texts.chat(found) if found else None

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        reason: str | None,
        logprobs: dict[str, Any] | None,
        tokens: list[int] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        if tokens is not None:
            choice["token_ids"] = tokens
        return self.chunk([choice])


def _call(delta: Delta) -> dict[str, Any]:
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"id": delta.id, "type": "function", "function": function}


def _delta(piece: Delta) -> dict[str, Any]:
    """Return a piece in the form of a stream. A tool call is sent whole."""
    if piece.kind == "text":
        return {"content": piece.text}
    if piece.kind == "reasoning":
        return {"reasoning": piece.text, "reasoning_content": piece.text}
    return {"tool_calls": [{"index": piece.index, **_call(piece)}]}


async def chat_completion(service: Service, data: bytes) -> ChatReply:
    """Answer a body of ``/v1/chat/completions``. Raises ApiError."""
    body = parse(ChatBody, data)
    return ChatReply(service, await start_chat(service, body), body)
