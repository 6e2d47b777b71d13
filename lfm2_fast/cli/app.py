"""Command line: ``lfm2-fast chat``, ``serve`` and the others.

Commands import torch only when they run, so that ``--help`` is fast.
"""

from __future__ import annotations

from typing import Annotated

import typer

import lfm2_fast
from lfm2_fast.cli.batch import batch
from lfm2_fast.cli.bench import bench
from lfm2_fast.cli.chat import chat
from lfm2_fast.cli.demo import demo
from lfm2_fast.cli.eval import eval
from lfm2_fast.cli.export import app as export
from lfm2_fast.cli.generate import generate
from lfm2_fast.cli.info import info
from lfm2_fast.cli.serve import serve

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
for command in (generate, chat, info, eval, bench, serve, batch, demo):
    app.command()(command)
app.add_typer(export, name="export")


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
        return
    from lfm2_fast.cli.terminal import show_loading_notes

    show_loading_notes()
