"""``lfm2-fast chat``: the loop that reads messages and answers them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from lfm2_fast.cli import options as opt

if TYPE_CHECKING:
    from lfm2_fast.cli.terminal import Terminal
    from lfm2_fast.text.conversation import Conversation

HELP = """\
/reset          start again, with the same system prompt
/system TEXT    start again with this system prompt, or with none
/help           this list
/exit           leave, as Ctrl-D does
A line that ends in \\ goes on in the next one. Ctrl-C stops an answer."""


def chat(
    context: typer.Context,
    model: opt.Model,
    system: opt.System = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Largest number of new tokens in an answer.")
    ] = None,
    preset: opt.Preset = None,
    do_sample: opt.DoSample = None,
    temperature: opt.Temperature = None,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    min_p: opt.MinP = None,
    repetition_penalty: opt.RepetitionPenalty = None,
    seed: opt.Seed = None,
    stop: opt.Stop = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    backend: opt.Backend = "auto",
    quantization: opt.Quantization = None,
    revision: opt.Revision = None,
    gguf_file: opt.GGUFFile = None,
    adapter: opt.Adapter = None,
    max_length: opt.MaxLength = None,
    local_files_only: opt.LocalFilesOnly = False,
    force_download: opt.ForceDownload = False,
) -> None:
    """Talk with a checkpoint. /help lists the commands.

    Without a terminal, every line of stdin is a message.
    """
    from lfm2_fast.cli.session import session_of
    from lfm2_fast.cli.terminal import Terminal

    terminal = Terminal()
    session = session_of(terminal, context, chat=True)
    conversation = session.conversation(system, max_new_tokens)
    if sys.stdin.isatty():
        terminal.note("/help lists commands, /exit leaves")
        converse(conversation, terminal, typed(terminal))
    else:
        converse(conversation, terminal, piped())


def converse(conversation: Conversation, terminal: Terminal, messages: Iterable[str]) -> None:
    """Answer messages, and run commands: messages that are a slash and a word."""
    for message in messages:
        command = re.fullmatch(r"/([a-z]+)(?:\s+(.*))?", message, re.DOTALL)
        match command and command[1]:
            case None:
                _answer(conversation, terminal, message)
            case "exit":
                return
            case "help":
                terminal.note(HELP)
            case "reset":
                conversation.reset(conversation.system)
                terminal.note("a new conversation")
            case "system":
                conversation.reset(command[2] if command else None)
                terminal.note(f"a new conversation; system prompt: {conversation.system or 'none'}")
            case unknown:
                terminal.note(f"there is no command /{unknown}; /help lists them")


def _answer(conversation: Conversation, terminal: Terminal, message: str) -> None:
    """Answer a message. Without a terminal, Ctrl-C and errors end the conversation: they raise."""
    from lfm2_fast.cli.terminal import interruptible

    typing = sys.stdin.isatty()
    try:
        with interruptible() as stopped:
            answer = conversation.ask(message, terminal.show, stopped)
    except KeyboardInterrupt:
        terminal.finish()
        terminal.note("stopped; the message is removed")
        if not typing:
            raise
    except (ValueError, RuntimeError) as error:
        terminal.finish()
        if not typing:
            raise
        terminal.note(f"{error}; /reset starts a new conversation")
    else:
        terminal.finish()
        terminal.note(str(answer))
        if answer.stopped and not typing:
            raise KeyboardInterrupt


def typed(terminal: Terminal) -> Iterator[str]:
    """Yield messages typed at a prompt, until Ctrl-D, or Ctrl-C twice."""
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and a history)

    def line(prompt: str) -> str:
        if terminal.out.is_terminal:
            return input(prompt)
        terminal.err.print(prompt, end="")
        return input()

    leaving = False
    while True:
        try:
            message = line("> ")
            while message.endswith("\\"):
                message = f"{message[:-1]}\n{line('. ')}"
        except EOFError:
            terminal.err.print()
            return
        except KeyboardInterrupt:
            terminal.err.print()
            if leaving:
                return
            leaving = True
            terminal.note("Ctrl-C again, Ctrl-D or /exit leaves")
            continue
        leaving = False
        if message.strip():
            yield message


def piped() -> Iterator[str]:
    """Yield messages from stdin, one a line."""
    for line in sys.stdin:
        if line.strip():
            yield line.removesuffix("\n")
