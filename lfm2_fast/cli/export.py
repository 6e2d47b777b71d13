"""``lfm2-fast export``: a checkpoint as files that other programs run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lfm2_fast.cli import options as opt

app = typer.Typer()

Checkpoint = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id or folder of the unquantized checkpoint.")
]
Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder to write; it must be empty, or not exist.")
]


@app.callback(invoke_without_command=True)
def _exports(context: typer.Context) -> None:
    """Write a checkpoint as files that other programs run."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def gguf(
    model: Checkpoint,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="GGUF file to write.")],
    type: Annotated[
        str, typer.Option(help="Matrices: f16, bf16, q8_0, q4_0, f32, q4_1, q5_0, q5_1.")
    ] = "q4_0",
    revision: opt.Revision = None,
    local_files_only: opt.LocalFilesOnly = False,
    force_download: opt.ForceDownload = False,
) -> None:
    """Write a GGUF file with weights, tokenizer and chat template, which llama.cpp runs.

    Needs the extra "gguf": pip install 'lfm2-fast[gguf]'. In q4 and q5 files, embedding and head
    are q8_0.
    """
    from lfm2_fast.cli.terminal import Terminal
    from lfm2_fast.text.tokenizer import TOKENIZER_FILES
    from lfm2_fast.weights.gguf_export import export_gguf
    from lfm2_fast.weights.hub import find_checkpoint

    opt.check_new_file(file, "FILE")
    folder = find_checkpoint(
        model,
        also=TOKENIZER_FILES,
        revision=revision,
        local_files_only=local_files_only,
        force_download=force_download,
    )
    if folder.is_file():
        raise ValueError(
            f"{folder} is already a GGUF file: convert it with llama.cpp's llama-quantize"
        )
    export_gguf(folder, file, type.lower())
    Terminal().note(f"{file}: {file.stat().st_size / 1e6:,.1f} MB")


@app.command()
def openvino(
    context: typer.Context,
    model: Checkpoint,
    folder: Folder,
    type: Annotated[str, typer.Option(help="Weights: f32, f16, int8, int4.")] = "int8",
    environment: opt.Environment = None,
    revision: opt.Revision = None,
    local_files_only: opt.LocalFilesOnly = False,
    force_download: opt.ForceDownload = False,
) -> None:
    """Write a folder for OpenVINO, which runs on Intel's NPUs, GPUs and CPUs.

    optimum-intel makes it. Its logits and greedy tokens are then compared with the model's. Run it
    with lfm2-fast generate DIR --device npu.
    """
    _export("openvino", context)


@app.command()
def onnx(
    context: typer.Context,
    model: Checkpoint,
    folder: Folder,
    type: Annotated[str, typer.Option(help="Weights: f32, int8, int4.")] = "int4",
    environment: opt.Environment = None,
    revision: opt.Revision = None,
    local_files_only: opt.LocalFilesOnly = False,
    force_download: opt.ForceDownload = False,
) -> None:
    """Write a folder for ONNX Runtime GenAI.

    Its model builder makes it. If the builder connected the head to a wrong norm, that is mended.
    Logits and greedy tokens are then compared with the model's.
    """
    _export("onnx", context)


@app.command()
def coreml(
    context: typer.Context,
    model: Checkpoint,
    folder: Folder,
    type: Annotated[str, typer.Option(help="Weights: f16, f32.")] = "f16",
    environment: opt.Environment = None,
    revision: opt.Revision = None,
    local_files_only: opt.LocalFilesOnly = False,
    force_download: opt.ForceDownload = False,
) -> None:
    """Write a folder with a package for Core ML, which an application for macOS or iOS runs.

    coremltools converts a traced program. The program's logits and greedy tokens are first compared
    with the model's. The package itself is not run, because Core ML needs one of Apple's systems.
    """
    _export("coreml", context)


@app.command(hidden=True)
def executorch(model: Checkpoint, file: Folder) -> None:
    """Say why there is no export for ExecuTorch."""
    raise ValueError(
        "export executorch is not offered: its program begins a text with the state of the last "
        "one (docs/usage/export.md); use export gguf, onnx or openvino"
    )


def _export(vendor: str, context: typer.Context) -> None:
    """Run a vendor's exporter with the parameters of its command, and tell the size."""
    from lfm2_fast.cli.terminal import Terminal
    from lfm2_fast.export.exporting import export
    from lfm2_fast.export.vendors import VENDORS

    terminal, asked = Terminal(), context.params
    folder = asked["folder"]
    export(
        VENDORS[vendor],
        asked["model"],
        folder,
        asked["type"].lower(),
        environment=asked["environment"],
        note=terminal.note,
        **opt.loading_options(context),
    )
    size = sum(file.stat().st_size for file in folder.rglob("*"))
    run = "" if VENDORS[vendor].unproven else f"; run it with lfm2-fast generate {folder}"
    terminal.note(f"{folder}: {size / 1e6:,.1f} MB{run}")
