"""Export as ``generate`` uses it: opened by its runtime, with tokenizer and sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import typer

from lfm2_fast.cli.options import LOADING
from lfm2_fast.cli.session import chosen
from lfm2_fast.cli.terminal import Terminal
from lfm2_fast.export.answering import Exported, open_export
from lfm2_fast.hf.generation_args import resolve_args
from lfm2_fast.text.conversation import Answer, check_template
from lfm2_fast.text.presets import SAMPLING, sampling
from lfm2_fast.text.reply_parser import Delta, ReplyParser

# Options of ``load`` that an export's own files decide.
DECIDED = [name for name in LOADING if name not in ("device", "max_length")]


@dataclass
class Question:
    """One message in the chat template, after a system prompt or none."""

    session: ExportSession
    system: str | None
    max_new_tokens: int

    def ask(
        self, message: str, show: Callable[[Delta], None], stopped: Callable[[], bool]
    ) -> Answer:
        """Answer the message, handing text, thinking and tool calls to ``show`` as they come."""
        tokenizer = self.session.tokenizer
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": message})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        parser = ReplyParser(tokenizer, tools=True, thinking=None, prompt_ids=ids)

        def take(token: int) -> None:
            for delta in parser.feed([token]):
                show(delta)

        answer = self.session.exported.stream_answer(
            ids,
            lambda text: None,
            max_new_tokens=self.max_new_tokens,
            arguments=self.session.arguments,
            stopped=stopped,
            take=take,
        )
        for delta in parser.finish():
            show(delta)
        return answer


@dataclass
class ExportSession:
    """Opened export with the sampling arguments of ``generate``."""

    exported: Exported
    arguments: dict[str, Any]

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the export's folder."""
        return self.exported.tokenizer

    def conversation(self, system: str | None, max_new_tokens: int) -> Question:
        """Return a conversation of one message in the chat template."""
        return Question(self, system, max_new_tokens)

    def continuation(
        self,
        text: str,
        sink: Callable[[str], None],
        max_new_tokens: int,
        stopped: Callable[[], bool],
    ) -> Answer:
        """Continue a text without a template."""
        return self.exported.stream_answer(
            self.tokenizer(text).input_ids,
            sink,
            max_new_tokens=max_new_tokens,
            arguments=self.arguments,
            stopped=stopped,
        )


def export_session_of(
    terminal: Terminal, context: typer.Context, record: Mapping[str, Any], *, chat: bool
) -> ExportSession:
    """Open the export that a command names, and write notes about its runtime and sampling.

    Raises ValueError for options that have no effect on an export.
    """
    asked = context.params
    for name in DECIDED:
        if asked[name] not in (None, False, "auto"):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} has no effect on an export; leave it out")
    name, given = asked["model"], {key: asked[key] for key in SAMPLING}
    arguments, _ = sampling(name, preset=asked["preset"], given=given)
    resolve_args(arguments, None, {}, vocab_size=1)
    terminal.note(f"loading {name}")
    exported = open_export(
        name,
        record,
        device=asked["device"],
        max_length=asked["max_length"],
        environment=asked["environment"],
        note=terminal.note,
    )
    try:
        if chat:
            check_template(exported.tokenizer, name)
        facts = exported.runtime.facts
        terminal.note(f"{record['type']} weights, on {facts['device']} with {facts['runtime']}")
        arguments = chosen(
            terminal,
            name,
            preset=asked["preset"],
            file=exported.defaults or None,
            given=given,
            stop=asked["stop"],
            seed=asked["seed"],
        )
    except BaseException:
        exported.runtime.close()
        raise
    return ExportSession(exported, arguments)
