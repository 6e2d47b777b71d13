"""``lfm2-fast eval``: measures how well a checkpoint predicts a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lfm2_fast.cli import options as opt


def eval(
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
    gguf_file: opt.GGUFFile = None,
    adapter: opt.Adapter = None,
    local_files_only: opt.LocalFilesOnly = False,
    force_download: opt.ForceDownload = False,
) -> None:
    """Measure how well a checkpoint predicts a text, and what fewer bits lose.

    With --reference: KL divergence from it, and the share of equal most likely tokens.
    """
    words = opt.read_text(text, "--text")
    from lfm2_fast.cli.environment import show
    from lfm2_fast.cli.evaluation import load_and_evaluate
    from lfm2_fast.cli.terminal import Terminal

    found = load_and_evaluate(
        Terminal(), model, words, window=window, reference=reference, **opt.loading_options(context)
    )
    show({"quality": found}, as_json=json)
