"""Options that several commands have in common."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

T = TypeVar("T", str | None, list[str] | None)


def text(value: T) -> T:
    """Return the text. Raises for bytes that are not UTF-8, which are lone surrogates in Python."""
    for each in value if isinstance(value, list) else [value or ""]:
        try:
            each.encode()
        except UnicodeEncodeError:
            raise typer.BadParameter("it is not UTF-8 text") from None
    return value


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, like LiquidAI/LFM2-1.2B or .../LFM2-1.2B-GGUF:Q4_K_M, folder or .gguf.",
    ),
]
System = Annotated[str | None, typer.Option(callback=text, help="System prompt.")]
Preset = Annotated[
    str | None, typer.Option(help="Recommended sampling; else the one that fits MODEL's name.")
]
DoSample = Annotated[bool | None, typer.Option("--do-sample/--greedy", help="Draw tokens, or not.")]
Temperature = Annotated[float | None, typer.Option(help="Sharper below 1; 0 is greedy.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the k most likely tokens.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the most likely tokens with total p.")]
MinP = Annotated[float | None, typer.Option(help="Draw from tokens above p times the best one.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1 avoids repetition.")]
Seed = Annotated[int | None, typer.Option(min=0, help="The same seed draws the same text.")]
Stop = Annotated[
    list[str] | None, typer.Option(callback=text, help="End after this string; repeatable.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), bfloat16, float16, float32.")]
Backend = Annotated[str, typer.Option(help="Implementation; lfm2-fast info lists them.")]
Quantization = Annotated[
    str | None,
    typer.Option(help="int8 or int4: integer matrices, half or a third of bfloat16's memory."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
GGUFFile = Annotated[
    str | None, typer.Option("--gguf-file", help="GGUF file in the folder or repository MODEL.")
]
Adapter = Annotated[
    str | None, typer.Option(help="LoRA adapter that is merged while loading: hub id or folder.")
]
MaxLength = Annotated[int | None, typer.Option(help="Bound of the context in tokens.")]
ServedModelName = Annotated[
    list[str] | None, typer.Option(help="Name that requests may ask for; repeatable.")
]
MaxRows = Annotated[int, typer.Option(min=1, help="Texts that are written at the same time.")]
MaxModelLen = Annotated[
    int | None, typer.Option("--max-model-len", min=1, help="Bound of the context in tokens.")
]
Memory = Annotated[
    str | None,
    typer.Option(help="Memory of the context: 8GB, 50%; else 25% on a CPU, 85% on a GPU."),
]
ChatTemplate = Annotated[Path | None, typer.Option(help="File with another chat template.")]
Environment = Annotated[
    Path | None,
    typer.Option(
        envvar="LFM2_FAST_ENVIRONMENT",
        help="Folder of a virtual environment with the exporter; else one is made in the cache.",
    ),
]
LocalFilesOnly = Annotated[bool, typer.Option("--local-files-only", help="Download nothing.")]
ForceDownload = Annotated[
    bool, typer.Option("--force-download", help="Download files again that the cache has.")
]
Replicas = Annotated[
    int | None, typer.Option(min=1, help="Engines that work side by side, run by Ray.")
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Ray cluster that runs them: auto, HOST:PORT; else one of this command."),
]
CpusPerReplica = Annotated[
    float | None, typer.Option(min=0, help="Cores; else a replica's share, or 1 beside a GPU.")
]
GpusPerReplica = Annotated[
    float | None, typer.Option(min=0, help="GPUs; else 1 if --device may be one.")
]

# The parameters of a command that are arguments of ``load``.
LOADING = (
    "device",
    "dtype",
    "backend",
    "quantization",
    "revision",
    "gguf_file",
    "adapter",
    "max_length",
    "local_files_only",
    "force_download",
)


def loading_options(context: typer.Context) -> dict[str, Any]:
    """Return the options of a command that go to ``load``."""
    return {name: value for name, value in context.params.items() if name in LOADING}


def read_text(file: Path) -> str:
    """Return a file's text, without the line feed that ends it."""
    try:
        return file.read_text(encoding="utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
