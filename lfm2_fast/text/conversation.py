"""Conversations: messages in a chat template, and the cache of their tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.engine.request import Request
from lfm2_fast.hf.causal_lm import Lfm2ForCausalLM
from lfm2_fast.hf.criteria import stop_criterion
from lfm2_fast.hf.generate import seed_of
from lfm2_fast.hf.generation_args import resolve_args
from lfm2_fast.hf.generation_names import PROCESSED
from lfm2_fast.hf.hooks import check_generates
from lfm2_fast.text.markers import markers_of, open_passage
from lfm2_fast.text.reply_parser import Delta, ReplyParser
from lfm2_fast.text.token_stream import Timing, TokenStream

# Arguments of ``generate`` for several rows, or for results beside the text.
OF_A_BATCH = {
    "num_return_sequences",
    "num_beams",
    "return_dict_in_generate",
    "max_time",
    "token_healing",
}


@dataclass
class Answer:
    """Text written after a prompt. ``end`` has the reason if something stopped the model."""

    text: str
    timing: Timing
    prompt_tokens: int
    kept_tokens: int
    stopped: bool
    end: str

    def __str__(self) -> str:
        parts = [str(self.timing)]
        if self.kept_tokens:
            parts.append(f"{self.kept_tokens} of {self.prompt_tokens} prompt tokens kept")
        return "; ".join([*parts, self.end] if self.end else parts)


def stream_answer(
    model: Lfm2ForCausalLM,
    tokenizer: Any,
    ids: list[int],
    sink: Callable[[str], None],
    *,
    max_new_tokens: int | None,
    arguments: Mapping[str, Any],
    cache: Cache | None = None,
    stopped: Callable[[], bool] = lambda: False,
    take: Callable[[int], None] = lambda token: None,
) -> Answer:
    """Continue ``ids``, handing text to ``sink`` as it comes, and each token to ``take``.

    ``stopped`` is called after every token. ``arguments`` are those of ``generate`` for the choice
    of tokens and the end of the text. The context and ``max_new_tokens`` limit the text. Ids that
    ``cache`` holds already do not run again. Raises ValueError if the context is full, and the
    exceptions of ``generate``.
    """
    check_generates(model)
    room = model.max_length - len(ids)
    if room < 1:
        raise ValueError(
            f"{len(ids)} tokens fill the context of {model.max_length}: shorten the prompt, or "
            "load the model with a larger max_length"
        )
    budget = min(max_new_tokens or room, room)
    defaults, vocab_size = model.generation_defaults(), model.network.config.vocab_size
    request = streamed_request(defaults, vocab_size, tokenizer, ids, budget, arguments)
    stream, end, kept = TokenStream(tokenizer, sink), "", 0
    is_borrowed = cache is None
    if cache is None:
        cache = model.workspace.take(model.network, 1, model.max_length)
    engine = model.workspace.engine(model.network, cache)
    id = engine.add(request, [0])
    try:
        while engine.busy:
            for event in engine.step():
                if event.error is not None:
                    raise event.error
                kept = event.cached_tokens
                if event.token is not None:
                    stream.put(event.token)
                    take(event.token)
                    if stopped():
                        end = "stopped"
                        engine.cancel(id)
                        break
                if event.finish_reason == "length":
                    end = "the context is full" if budget == room else f"cut at {budget} tokens"
    finally:
        engine.abandon()
    if is_borrowed:
        model.workspace.give_back(model.network, cache)
    stream.end()
    return Answer(stream.text, stream.timing, len(ids), kept, end == "stopped", end)


def streamed_request(
    defaults: Mapping[str, Any],
    vocab_size: int,
    tokenizer: Any,
    ids: list[int],
    budget: int,
    arguments: Mapping[str, Any],
) -> Request:
    """Return the request that ``generate`` would make of one prompt.

    ``defaults`` are those of the checkpoint's generation config. Raises ValueError for arguments
    that need all rows, like ``num_beams``.
    """
    given = dict(arguments)
    seed = seed_of(given.pop("seed", None), given.pop("generator", None))
    asked = resolve_args(given, given.pop("generation_config", None), defaults, vocab_size)
    rows = asked.copies > 1 or asked.return_dict_in_generate or asked.token_healing
    if rows or asked.processed or asked.max_time < math.inf:
        refused = ", ".join(sorted(given.keys() & {*PROCESSED, *OF_A_BATCH}))
        named = refused or "what generation_config.json asks for"
        raise ValueError(f"{named} is not supported for one streamed text: call generate()")
    stop = None
    if asked.stop_strings:
        criterion = stop_criterion(asked, tokenizer)

        def stop(written: Sequence[int]) -> bool:
            end = [*ids, *written][-criterion.maximum_token_len :]
            return bool(criterion(torch.tensor([end]), None))

    return Request(
        ids,
        asked.sampling,
        asked.eos_token_id,
        budget,
        min_tokens=min(asked.min_new_tokens, budget),
        stop=stop,
        seed=seed,
        stream=True,
    )


def check_template(tokenizer: Any, name: str) -> None:
    """Raise ValueError if the tokenizer of checkpoint ``name`` has no chat template."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"{name} has no chat template; it can continue text: lfm2-fast generate --raw"
        )


def set_template(tokenizer: Any, template: str) -> None:
    """Replace the tokenizer's chat template. Raises ValueError for one that cannot be parsed."""
    from jinja2 import TemplateSyntaxError

    tokenizer.chat_template = template
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"chat_template has a fault in line {error.lineno}: {error.message}; mend it, or leave "
            "chat_template out"
        ) from error
    except Exception:
        return  # A template is a program: it may refuse this message, and take others.


class Conversation:
    """Messages in a checkpoint's chat template, answered one after another.

    The cache is kept between answers, and only tokens that it does not hold run. Every prompt is
    made from all messages again. So a template that leaves out earlier thinking leaves it out here
    too. ``arguments`` are those of ``stream_answer``.
    """

    def __init__(
        self,
        model: Lfm2ForCausalLM,
        tokenizer: Any,
        *,
        system: str | None = None,
        max_new_tokens: int | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        check_template(tokenizer, model.name_or_path)
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.arguments = dict(arguments or {})
        self.reset(system)

    def reset(self, system: str | None) -> None:
        """Delete every message, and begin with this system prompt."""
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []
        self.cache = self.model.new_cache(1)

    def ask(
        self,
        message: str,
        show: Callable[[Delta], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Answer a message, handing text, thinking and tool calls to ``show`` as they come.

        If ``stopped`` ends an answer, its text so far stays. If there is only thinking, or after an
        exception, the message is removed. Raises ValueError if the context is full.
        """
        self.messages.append({"role": "user", "content": message})
        said = False
        try:
            ids = self._prompt()
            parser = ReplyParser(self.tokenizer, tools=True, thinking=None, prompt_ids=ids)

            def hand(deltas: Sequence[Delta]) -> None:
                nonlocal said
                for delta in deltas:
                    said |= delta.kind != "reasoning"
                    show(delta)

            answer = stream_answer(
                self.model,
                self.tokenizer,
                ids,
                lambda text: None,
                max_new_tokens=self.max_new_tokens,
                arguments=self.arguments,
                cache=self.cache,
                stopped=stopped,
                take=lambda token: hand(parser.feed([token])),
            )
            # Templates find thinking by its closing marker, so thinking that was cut off gets one.
            # A tool call that was cut off stays text.
            closer = parser.closer
            hand(parser.finish())
        except BaseException as error:
            self.messages.pop()
            if not isinstance(error, ValueError):
                self.cache = self.model.new_cache(1)
            raise
        if answer.stopped and not said:
            self.messages.pop()
            answer.end = "stopped; the message is removed"
        else:
            opened, begun = open_passage(self.tokenizer, ids, markers_of(self.tokenizer))
            inside = f"{opened.text}{begun}" if opened is not None else ""
            content = f"{inside}{answer.text}{closer}"
            self.messages.append({"role": "assistant", "content": content})
        return answer

    def _prompt(self) -> list[int]:
        """Return the token ids of all messages in the template. Raises ValueError."""
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)
