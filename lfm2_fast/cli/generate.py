"""``lfm2-fast generate``: answer a prompt, or continue it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lfm2_fast.cli import options as opt


def generate(
    context: typer.Context,
    model: opt.Model,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="[PROMPT]", callback=opt.text, help="The prompt; else --file, else stdin."
        ),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of new tokens.")] = 512,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="Answer in the chat template, or continue the text."),
    ] = None,
    system: opt.System = None,
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
    environment: opt.Environment = None,
) -> None:
    """Answer a prompt, or continue it, and show the text token by token.

    A checkpoint with a chat template answers, unless its name has Base in it. --raw continues the
    prompt without a template, and shows every marker. A folder that lfm2-fast export wrote runs in
    its own runtime, with --device cpu, gpu or npu.
    """
    text = _prompt(prompt, file)
    if system is not None:
        if chat is False:
            raise ValueError("--system needs the chat template; leave --raw out")
        chat = True
    from lfm2_fast.cli.export_session import ExportSession, export_session_of
    from lfm2_fast.cli.session import Session, session_of
    from lfm2_fast.cli.terminal import Terminal, interruptible
    from lfm2_fast.export.answering import read_record
    from lfm2_fast.text.presets import preset_of

    terminal = Terminal()
    record = read_record(model)
    session: Session | ExportSession
    if record is None:
        session = session_of(terminal, context, chat=bool(chat))
    else:
        session = export_session_of(terminal, context, record, chat=bool(chat))
    if chat is None:
        chat = bool(session.tokenizer.chat_template) and preset_of(model) != "base"
    try:
        with interruptible() as stopped:
            if chat:
                conversation = session.conversation(system, max_new_tokens)
                answer = conversation.ask(text, terminal.show, stopped)
            else:
                answer = session.continuation(text, terminal.write, max_new_tokens, stopped)
                terminal.write("\n")
    finally:
        terminal.finish()  # an error in the middle of a text gets its own line
        if isinstance(session, ExportSession):
            session.exported.runtime.close()
    terminal.note(str(answer))
    if answer.stopped:
        raise typer.Exit(130)


def _prompt(prompt: str | None, file: Path | None) -> str:
    """Return the prompt from the argument, file or pipe, without a file's last line feed."""
    if prompt is not None and file is not None:
        raise ValueError("give the prompt as an argument or with --file, not both")
    if file is not None:
        text = opt.read_text(file, "--file")
    elif prompt is not None and prompt != "-":
        text = prompt
    elif sys.stdin.isatty() and prompt is None:
        raise ValueError("there is no prompt: give it as an argument, with --file, or in a pipe")
    else:
        text = sys.stdin.read().removesuffix("\n")
    if not text:
        raise ValueError("the prompt is empty: give some text")
    return text
