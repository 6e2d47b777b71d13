"""The command line: ``lfm2-fast generate | chat | info | eval | bench | demo``.

Nothing here imports torch before a command runs, so that ``--help`` comes at once. The options of
sampling and loading are handed on whole, from a command's context.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import lfm2_fast
from lfm2_fast.cli import options as opt

if TYPE_CHECKING:
    from lfm2_fast.cli.session import Session
    from lfm2_fast.cli.terminal import Terminal

TINY = Path(lfm2_fast.__file__).parent / "tiny"

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"lfm2-fast {lfm2_fast.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _commands(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error comes from.")
    ] = False,
) -> None:
    """Run Liquid AI's LFM2 language models.

    Text goes to stdout, everything else to stderr. "lfm2-fast demo" needs no download.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def generate(
    context: typer.Context,
    model: opt.Model,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="[PROMPT]", callback=opt.text, help="Else --file, else stdin."),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 512,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Ask in the chat template, or continue.")
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
    max_length: opt.MaxLength = None,
    local_files_only: opt.LocalFilesOnly = False,
) -> None:
    """Answer a prompt, or continue it, as the text comes.

    A checkpoint with a chat template answers, unless its name says Base; --raw continues the prompt
    as it stands, and shows every marker.
    """
    text = _prompt(prompt, file)
    if system is not None:
        if chat is False:
            raise ValueError("--system needs the chat template; leave --raw out")
        chat = True
    from lfm2_fast.cli.terminal import Terminal, interruptible
    from lfm2_fast.text.presets import preset_of

    terminal = Terminal()
    session = _session(terminal, context, chat=bool(chat))
    if chat is None:
        chat = bool(session.tokenizer.chat_template) and preset_of(model) != "base"
    with interruptible() as stopped:
        if chat:
            conversation = session.conversation(system, max_new_tokens)
            answer = conversation.ask(text, terminal.show, stopped)
            terminal.finish()
        else:
            answer = session.continuation(text, terminal.write, max_new_tokens, stopped)
            terminal.write("\n")
    terminal.note(str(answer))
    if answer.stopped:
        raise typer.Exit(130)


@app.command("chat")
def chat_(
    context: typer.Context,
    model: opt.Model,
    system: opt.System = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer at most; else the context.")
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
    max_length: opt.MaxLength = None,
    local_files_only: opt.LocalFilesOnly = False,
) -> None:
    """Talk with a checkpoint; /help lists what can be typed besides messages.

    Without a terminal, every line of stdin is a message.
    """
    from lfm2_fast.cli.terminal import Terminal
    from lfm2_fast.text.conversation import converse, piped, typed

    terminal = Terminal()
    session = _session(terminal, context, chat=True)
    conversation = session.conversation(system, max_new_tokens)
    if sys.stdin.isatty():
        terminal.note("/help lists commands, /exit leaves")
        converse(conversation, terminal, typed(terminal))
    else:
        converse(conversation, terminal, piped())


@app.command()
def info(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Hub id or folder to tell about.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
    device: opt.Device = "auto",
    backend: opt.Backend = "auto",
    revision: opt.Revision = None,
    local_files_only: opt.LocalFilesOnly = False,
) -> None:
    """Tell what runs here: versions, device, the body of each operation, and why no faster one.

    Of MODEL, only the config is read.
    """
    from lfm2_fast.cli.info import checkpoint, machine, show

    facts = machine(device, backend)
    if model is not None:
        facts |= checkpoint(model, revision=revision, local_files_only=local_files_only)
    show(facts, as_json=json)


@app.command("eval")
def eval_(
    context: typer.Context,
    model: opt.Model,
    text: Annotated[Path, typer.Option(help="The text to predict, a UTF-8 file.")],
    quantization: opt.Quantization = None,
    dtype: opt.Dtype = "auto",
    reference: Annotated[
        str | None, typer.Option(help="Compare with the same weights in float32 or bfloat16.")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are predicted together.")] = 512,
    json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
    device: opt.Device = "auto",
    backend: opt.Backend = "auto",
    revision: opt.Revision = None,
    local_files_only: opt.LocalFilesOnly = False,
) -> None:
    """Tell how well a checkpoint predicts a text, and what fewer bits lose.

    With --reference: KL divergence from it, and how often both find the same token likeliest.
    """
    words = _read(text)
    from lfm2_fast.cli.evaluation import load_and_evaluate
    from lfm2_fast.cli.info import show
    from lfm2_fast.cli.terminal import Terminal

    found = load_and_evaluate(
        Terminal(), model, words, window=window, reference=reference, **_loading(context)
    )
    show({"quality": found}, as_json=json)


@app.command()
def bench(
    context: typer.Context,
    model: opt.Model,
    prompt: Annotated[str, typer.Option(help="Lengths of prompts in tokens.")] = "128,1024",
    output: Annotated[str, typer.Option(help="Tokens to write.")] = "64",
    batch: Annotated[str, typer.Option(help="Sequences at once.")] = "1,4",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each combination.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on a CPU.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of the figures here.")] = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    backend: opt.Backend = "auto",
    quantization: opt.Quantization = None,
    revision: opt.Revision = None,
    local_files_only: opt.LocalFilesOnly = False,
) -> None:
    """Measure how fast a checkpoint runs here, and how near to the memory's speed.

    Lengths and batches are numbers with commas between them; every combination runs.
    """
    from lfm2_fast.cli.benchmark import cases, load_and_measure
    from lfm2_fast.cli.benchmark_report import check_plot, show
    from lfm2_fast.cli.benchmark_report import plot as draw
    from lfm2_fast.cli.terminal import Terminal

    if plot is not None:
        check_plot(plot)
    wanted = cases(prompt, output, batch)
    found = load_and_measure(
        Terminal(),
        model,
        wanted,
        rounds=rounds,
        threads=threads,
        **_loading(context),
    )
    show(found, as_json=json)
    if plot is not None:
        draw(found, plot)


@app.command()
def demo(
    prompt: Annotated[
        str, typer.Argument(metavar="[PROMPT]", callback=opt.text, help="The text to continue.")
    ] = "The database server",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 160,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws another text.")] = 0,
) -> None:
    """Continue a text with the small LFM2 that this package carries."""
    import torch

    from lfm2_fast.cli.session import Session, load_tokenizer, summary
    from lfm2_fast.cli.terminal import Terminal, interruptible

    terminal = Terminal()
    terminal.note("A small LFM2, trained on manuals, continues a text: style it has, no knowledge.")
    folder = min(str(TINY), os.path.relpath(TINY), key=len)
    model, tokenizer = lfm2_fast.load(folder), load_tokenizer(folder)
    arguments = {
        "do_sample": True,
        "temperature": 0.5,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "eos_token_id": tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]),
    }
    session = Session(model, tokenizer, arguments)
    terminal.note(f"{summary(model)}\n")
    torch.manual_seed(seed)
    terminal.write(prompt, style="bold")
    with interruptible() as stopped:
        answer = session.continuation(prompt, terminal.write, max_new_tokens, stopped)
    terminal.write("\n")
    terminal.note(f"\n{answer}\nTo talk with it: lfm2-fast chat {folder}")
    if answer.stopped:
        raise typer.Exit(130)


def _prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from wherever it was given, without the line feed that ends a file."""
    if prompt is not None and file is not None:
        raise ValueError("give the prompt as an argument or with --file, not both")
    if file is not None:
        text = _read(file)
    elif prompt is not None and prompt != "-":
        text = prompt
    elif sys.stdin.isatty() and prompt is None:
        raise ValueError("there is no prompt: give it as an argument, with --file, or in a pipe")
    else:
        text = sys.stdin.read().removesuffix("\n")
    if not text:
        raise ValueError("the prompt is empty")
    return text


def _read(file: Path) -> str:
    """A file's text, without the line feed that ends it."""
    try:
        return file.read_text(encoding="utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def _session(terminal: Terminal, context: typer.Context, *, chat: bool) -> Session:
    """The session that a command's options ask for."""
    from lfm2_fast.cli.session import open_session
    from lfm2_fast.text.presets import SAMPLING

    asked = context.params
    return open_session(
        terminal,
        asked["model"],
        chat=chat,
        preset=asked["preset"],
        given={name: asked[name] for name in SAMPLING},
        stop=asked["stop"],
        seed=asked["seed"],
        **_loading(context),
    )


def _loading(context: typer.Context) -> dict[str, Any]:
    """Those of a command's options that go to ``load``."""
    return {name: value for name, value in context.params.items() if name in opt.LOADING}
