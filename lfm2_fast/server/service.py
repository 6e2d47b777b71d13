"""Service: a model with its tokenizer and engine, for all endpoints."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from lfm2_fast.engine.async_engine import AsyncEngine
from lfm2_fast.engine.engine import Engine
from lfm2_fast.server.answers import Answers
from lfm2_fast.server.errors import ApiError, of_engine, of_value_error, refused
from lfm2_fast.server.metrics import Metrics
from lfm2_fast.server.output import Choice, Parser
from lfm2_fast.server.parameters import Asked, Defaults, seed_of, stops_of, too_long
from lfm2_fast.server.protocol import ChatBody, TokenizeBody
from lfm2_fast.server.token_texts import TokenTexts
from lfm2_fast.text.grammar import GrammarCompiler
from lfm2_fast.text.markers import THINKING_PAIRS, template_of
from lfm2_fast.text.messages import normalize_messages
from lfm2_fast.weights.adapter_hub import find_adapter
from lfm2_fast.weights.adapter_set import AdapterSet

T = TypeVar("T")
ROLES = ("system", "user", "assistant", "tool")
# Number of characters from which a text is processed in a thread, so that others need not wait.
LONG_TEXT = 8192
# Most characters of a token of ordinary text, to refuse over-long prompts early.
CHARACTERS = 8
# Names of arguments of the tokenizer's method, which are not variables of a template.
NO_VARIABLES = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}


@dataclass(frozen=True)
class Options:
    """Settings of a service, beside its model.

    ``names`` are those that clients may ask for; answers have the first one. ``seconds`` limits a
    request, ``max_body`` its bytes. If there are ``api_keys``, requests without one are refused.
    ``origins`` are the origins of web pages that may call. ``page`` is True to show the page for
    conversations. With ``loads_adapters`` clients may load adapters from any path or hub id, and
    unload them; ``hub`` are then the options of ``find_adapter``.
    """

    names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    seconds: float | None = None
    max_body: int = 16 * 2**20
    origins: tuple[str, ...] = ()
    page: bool = True
    loads_adapters: bool = False
    hub: Mapping[str, Any] = field(default_factory=dict)


class Service:
    """Model that answers requests: ``start`` returns the answers to prompts.

    ``tokenizer`` is the checkpoint's. ``close`` it at the end.
    """

    def __init__(
        self, engine: Engine, tokenizer: Any, defaults: Defaults, options: Options
    ) -> None:
        self.engine = AsyncEngine(engine)
        self.tokenizer, self.defaults, self.options = tokenizer, defaults, options
        self.texts = TokenTexts(tokenizer)
        self.template = template_of(tokenizer)
        # A model that was not trained to think could use its marker to avoid a grammar.
        self.thinks = any(text in self.template for pair in THINKING_PAIRS for text in pair)
        self.vocab_size = engine.model.config.vocab_size
        self.max_length = engine.max_length
        self.rows = engine.max_rows
        self.metrics = Metrics(self.engine, self.name)
        self.compiler = GrammarCompiler(
            tokenizer, vocab_size=self.vocab_size, eos=defaults.eos or (tokenizer.eos_token_id,)
        )
        self.began = int(time.time())
        self.special = {id for id, t in tokenizer.added_tokens_decoder.items() if t.special}
        # Seconds of the latest requests.
        self._seconds = 1.0
        backend = tokenizer.backend_tokenizer
        # The library's own calls set both again.
        backend.no_truncation()
        backend.no_padding()

    @property
    def name(self) -> str:
        """Name of the model in answers."""
        return self.options.names[0]

    def close(self) -> None:
        """End all requests and the engine."""
        self.engine.close()
        self.compiler.close()

    @property
    def names(self) -> list[str]:
        """Names that clients may ask for: the model's, then those of the loaded adapters."""
        own = self.options.names
        return [*own, *(each for each in self._adapters.names if each not in own)]

    @property
    def _adapters(self) -> AdapterSet:
        return self.engine.engine.model.adapters

    def adapter_of(self, name: str | None) -> str | None:
        """Return the adapter that a client means by the model's ``name``, None for none."""
        return name if name not in (None, *self.options.names) else None

    def served(self, name: str | None) -> str:
        """Return the name that answers carry: the adapter's where a client asked for one."""
        return self.adapter_of(name) or self.name

    async def load_adapter(self, name: str, path: str) -> None:
        """Load an adapter between two steps. Raises ApiError for what cannot be loaded."""
        if name in self.names:
            raise ApiError(
                f"the name {name[:200]!r} is taken; choose another, or unload that adapter",
                param="lora_name",
                code="invalid_value",
            )
        like = self.engine.engine.model.embedding_norm.weight
        try:
            folder = await asyncio.to_thread(find_adapter, path, **self.options.hub)
            await self.ask(lambda engine: engine.model.adapters.load(folder, name, like))
        except ValueError as error:
            raise of_value_error(error, "lora_path") from None

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter; requests that run with it end with it. Raises ApiError."""
        try:
            await self.ask(lambda engine: engine.model.adapters.unload(name))
        except ValueError as error:
            raise of_value_error(error, "lora_name") from None

    def check_model(self, name: str | None) -> None:
        """Raise ApiError for a model that is not served."""
        if name is not None and name not in self.names:
            raise ApiError(
                f"the model {name[:200]!r} does not exist here; this server has "
                + ", ".join(map(repr, self.names)),
                status=404,
                param="model",
                code="model_not_found",
            )

    async def tokens_of(self, text: str, *, special: bool, room: bool = True) -> list[int]:
        """Return a text's token ids, with the tokens that begin each text if ``special``.

        Raises ApiError if the text is surely longer than the context, unless ``room`` is False.
        """
        encode = self.tokenizer.backend_tokenizer.encode

        def work() -> list[int]:
            most = self.max_length * CHARACTERS
            if room and len(text) > most:
                count = len(encode(text[:most], add_special_tokens=False))
                # The end of the cut text may form a token with the next characters.
                if count > self.max_length + 16:
                    raise too_long(f"more than {count - 16}", None, self.max_length, "prompt")
            return list(encode(text, add_special_tokens=special).ids)

        try:
            return await in_thread(work, len(text))
        except UnicodeEncodeError:
            raise ApiError("the text has lone surrogates; send valid Unicode") from None

    async def chat_prompt(
        self,
        body: ChatBody | TokenizeBody,
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None,
    ) -> str:
        """Return a body's messages in the chat template. Raises ApiError if it refuses them.

        ``tools`` are those in the prompt, ``variables`` are set in the template.
        """
        if not self.template:
            raise refused(
                "this model has no chat template; use /v1/completions, or start the server with "
                "--chat-template",
                "messages",
                "no_chat_template",
            )
        if taken := sorted(NO_VARIABLES & set(variables or ())):
            raise refused(f"chat_template_kwargs may not set {taken[0]}", "chat_template_kwargs")
        given, goes_on = body.messages or (), bool(body.continue_final_message)
        if goes_on and body.add_generation_prompt:
            raise ApiError(
                "add_generation_prompt begins a message and continue_final_message goes on with "
                "the last one; set one of them",
                param="add_generation_prompt",
                code="invalid_value",
            )
        size = sum(len(str(message.get("content", ""))) for message in given)
        messages = _normalized(given, self.template)

        def work() -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=list(tools) or None,
                    add_generation_prompt=body.add_generation_prompt is not False and not goes_on,
                    continue_final_message=goes_on,
                    tokenize=False,
                    **(variables or {}),
                )
            )

        try:
            return await in_thread(work, size)
        except Exception as error:
            # A template is a program: its exceptions are reported to the client.
            raise ApiError(
                f"the chat template refuses these messages: {type(error).__name__}: {error}"[:1000],
                param="messages",
                code="invalid_value",
            ) from None

    async def start(
        self,
        asked: Asked,
        prompts: Sequence[Sequence[int]],
        parser: Callable[[Sequence[int]], Parser],
        *,
        most: int | None = None,
        one_call: bool = False,
    ) -> Answers:
        """Return the answers to prompts, once the engine has taken all of them.

        Raises ApiError for a prompt that cannot run, and if the queue is full.
        """
        seed, body = seed_of(asked.body), asked.body
        adapter = self.adapter_of(body.model)
        try:
            requests = [
                replace(asked.of_prompt(prompt, place * asked.n, seed), adapter=adapter)
                for place, prompt in enumerate(prompts)
            ]
            stream = await self.engine.start(requests)
        except (ValueError, RuntimeError) as error:
            raise of_engine(error, self._retry_after()) from None
        choices = {}
        for place, request in enumerate(requests):
            for index in range(asked.n):
                choices[stream.ids[place], index] = Choice(
                    place * asked.n + index,
                    parser(request.prompt),
                    stops=stops_of(body),
                    ends=frozenset(asked.ends),
                    keep_stop=bool(body.include_stop_str_in_output),
                    one_call=one_call,
                    most=most,
                    narrowed=body.allowed_token_ids is not None,
                )
        return Answers(self, stream, [request.prompt for request in requests], choices)

    async def ask(self, function: Callable[[Engine], T]) -> T:
        """Call a quick function of the engine between two steps. Raises ApiError."""
        try:
            return await self.engine.between_steps(function)
        except RuntimeError as error:
            raise of_engine(error) from None

    def took(self, seconds: float) -> None:
        """Note the seconds of a request that has ended."""
        self._seconds += (seconds - self._seconds) / 8

    def _retry_after(self) -> int:
        """Estimate the seconds until a row is free."""
        waves = self.engine.engine.statistics.waiting / self.rows
        return min(max(math.ceil(self._seconds * waves / 2), 1), 60)


def _normalized(messages: Sequence[Mapping[str, Any]], template: str) -> list[dict[str, Any]]:
    """Return messages as a template reads them. Raises ApiError for a wrong form or role."""
    try:
        made = normalize_messages(messages, template)
    except ValueError as error:
        raise of_value_error(error, "messages") from None
    for place, message in enumerate(made):
        if message["role"] not in ROLES:
            raise ApiError(
                f"messages[{place}].role must be one of {', '.join(ROLES)}, or developer, got "
                f"{message['role'][:40]!r}",
                param=f"messages[{place}].role",
                code="invalid_value",
            )
    return made


async def in_thread(work: Callable[[], T], size: int) -> T:
    """Return the result of ``work``, in a thread if ``size`` characters take long."""
    return await asyncio.to_thread(work) if size > LONG_TEXT else work()
