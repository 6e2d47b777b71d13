"""``lfm2-fast bench``: measures how fast a checkpoint runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lfm2_fast.cli import options as opt


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
    gguf_file: opt.GGUFFile = None,
    local_files_only: opt.LocalFilesOnly = False,
    force_download: opt.ForceDownload = False,
) -> None:
    """Measure how fast a checkpoint runs here, also as a share of the memory's speed.

    Give lengths and batches as numbers with commas. Every combination runs.
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
        **opt.loading_options(context),
    )
    show(found, as_json=json)
    if plot is not None:
        draw(found, plot)
