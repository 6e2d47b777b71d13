"""``lfm2-fast export``: a checkpoint as a file that other programs run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lfm2_fast.cli import options as opt

app = typer.Typer(
    help="Write a checkpoint as a file that other programs run.", no_args_is_help=True
)


@app.command()
def gguf(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id or folder of the unquantized checkpoint.")
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="GGUF file to write.")],
    type: Annotated[
        str, typer.Option(help="Matrices: f16, bf16, q8_0, q4_0, f32, q4_1, q5_0, q5_1.")
    ] = "q4_0",
    revision: opt.Revision = None,
    local_files_only: opt.LocalFilesOnly = False,
    force_download: opt.ForceDownload = False,
) -> None:
    """Write a GGUF file with weights, tokenizer and chat template, which llama.cpp runs.

    Needs the extra "gguf": pip install 'lfm2-fast[gguf]'. Of q4 and q5 files, embedding and head
    are q8_0.
    """
    from lfm2_fast.cli.terminal import Terminal
    from lfm2_fast.text.tokenizer import TOKENIZER_FILES
    from lfm2_fast.weights.gguf_export import export_gguf
    from lfm2_fast.weights.hub import find_checkpoint

    folder = find_checkpoint(
        model,
        also=TOKENIZER_FILES,
        revision=revision,
        local_files_only=local_files_only,
        force_download=force_download,
    )
    if folder.is_file():
        raise ValueError(f"{folder} is a GGUF file itself: llama.cpp's llama-quantize converts it")
    export_gguf(folder, file, type.lower())
    Terminal().note(f"{file}: {file.stat().st_size / 1e6:,.1f} MB")
