"""``/v1/completions``: texts or token ids, continued without a template."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lfm2_fast.engine.request import LogProbs
from lfm2_fast.server.answers import Answers
from lfm2_fast.server.constraints import constraint_of
from lfm2_fast.server.errors import ApiError
from lfm2_fast.server.output import Part, PlainParser
from lfm2_fast.server.parameters import Asked
from lfm2_fast.server.protocol import CompletionBody, parse
from lfm2_fast.server.reply import ChoicesReply
from lfm2_fast.server.service import Service

# Default number of new tokens, as with OpenAI.
MAX_TOKENS = 16


async def completion(service: Service, data: bytes) -> CompletionReply:
    """Answer a body of ``/v1/completions``. Raises ApiError."""
    body = parse(CompletionBody, data)
    service.check_model(body.model)
    constraint = await constraint_of(service, body)
    texts, prompts = await _prompts(service, body)
    most = MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if body.echo and body.logprobs is not None and body.prompt_logprobs is not None:
        raise ApiError(
            "echo with logprobs returns those of the prompt already; leave prompt_logprobs out",
            param="prompt_logprobs",
            code="invalid_value",
        )
    prompt_logprobs = (
        body.logprobs if body.echo and body.logprobs is not None else body.prompt_logprobs
    )

    asked = Asked(
        body,
        service.defaults,
        service.vocab_size,
        service.max_length,
        # The engine writes at least one token. It is dropped if the body asks for none.
        max(most, 1),
        n=body.n or 1,
        logprobs=body.logprobs,
        prompt_logprobs=prompt_logprobs,
        constraint=constraint,
        seconds=service.options.seconds,
    )
    dropped = () if body.skip_special_tokens is False else service.special
    answers = await service.start(
        asked, prompts, lambda prompt: PlainParser(service.tokenizer, dropped), most=most
    )
    if body.echo:
        texts = [
            service.tokenizer.backend_tokenizer.decode(list(prompt), skip_special_tokens=False)
            if text is None or body.truncate_prompt_tokens
            else text
            for text, prompt in zip(texts, answers.prompts, strict=True)
        ]
    return CompletionReply(service, answers, body, texts)


async def _prompts(
    service: Service, body: CompletionBody
) -> tuple[list[str | None], list[list[int]]]:
    """Return the texts of all prompts, None for those of ids, and their ids."""
    given = body.prompt
    if isinstance(given, str):
        given = [given]
    elif isinstance(given[0], int):
        given = [given]
    special = body.add_special_tokens is not False
    texts: list[str | None] = []
    prompts: list[list[int]] = []
    for each in given:
        if isinstance(each, str):
            texts.append(each)
            prompts.append(await service.tokens_of(each, special=special))
        else:
            texts.append(None)
            prompts.append(list(each))
    return texts, prompts


class CompletionReply(ChoicesReply):
    """Completion, whole or in chunks. ``texts`` are those of the prompts, for ``echo``."""

    def __init__(
        self,
        service: Service,
        answers: Answers,
        body: CompletionBody,
        texts: Sequence[str | None],
    ) -> None:
        super().__init__(
            answers,
            "cmpl-",
            service.served(body.model),
            bool(body.stream),
            "text_completion",
            body.stream_options,
        )
        self._service, self._body, self._prompts = service, body, texts
        self._unsent: dict[int, list[tuple[int, LogProbs | None]]] = {}
        self._offsets: dict[int, int] = {}

    def first(self) -> Iterable[dict[str, Any]]:
        """Yield the prompts, if they are echoed without log-probabilities of their tokens."""
        if self._body.echo and self._body.logprobs is None:
            for index in range(len(self.answers.choices)):
                yield self._chunk(index, self._prompt(index), [], None)

    def news(self, part: Part) -> Iterable[dict[str, Any]]:
        """Yield a chunk if there is text, or an end."""
        unsent = self._unsent.setdefault(part.index, [])
        text = part.text
        if part.prompt_logprobs is not None and self._body.echo and not unsent:
            ids = self.answers.prompts[part.index // (self._body.n or 1)]
            unsent += zip(ids, part.prompt_logprobs, strict=True)
            text = self._prompt(part.index) + text
        unsent += part.logprobs
        if text or part.finish_reason is not None:
            yield self._chunk(part.index, text, unsent, part.finish_reason, part.tokens)
            unsent.clear()

    def whole(self, parts: list[Part]) -> dict[str, Any]:
        """Return the completion."""
        choices = []
        body, texts = self._body, self._service.texts
        for part in parts:
            prompt = self.answers.prompts[part.index // (body.n or 1)]
            logprobs: list[tuple[int, LogProbs | None]] = []
            text = part.text
            if body.echo:
                text = self._prompt(part.index) + text
                logprobs += zip(prompt, part.prompt_logprobs or (), strict=False)
            choice = {
                "index": part.index,
                "text": text,
                "logprobs": None,
                "finish_reason": part.finish_reason,
            }
            if body.logprobs is not None:
                choice["logprobs"] = texts.completion([*logprobs, *part.logprobs])
            elif part.prompt_logprobs is not None:
                choice["prompt_logprobs"] = texts.prompt(prompt, part.prompt_logprobs)
            if body.return_token_ids:
                choice |= {"token_ids": part.tokens, "prompt_token_ids": list(prompt)}
            choices.append(choice)
        usage = self.answers.usage()
        return {**self.head("text_completion"), "choices": choices, "usage": usage}

    def _prompt(self, index: int) -> str:
        return self._prompts[index // (self._body.n or 1)] or ""

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: Sequence[tuple[int, LogProbs | None]],
        reason: str | None,
        tokens: Sequence[int] = (),
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": reason,
        }
        if self._body.logprobs is not None:
            offset = self._offsets.get(index, 0)
            choice["logprobs"] = self._service.texts.completion(logprobs, offset)
            self._offsets[index] = offset + sum(map(len, choice["logprobs"]["tokens"]))
        if self._body.return_token_ids:
            choice["token_ids"] = list(tokens)
        return self.chunk([choice])
