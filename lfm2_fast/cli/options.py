"""Options that several commands have in common."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

T = TypeVar("T", str | None, list[str] | None)
# Largest seed of torch's generators that is a signed integer of 64 bits.
MOST_SEED = 2**63 - 1


def text(value: T) -> T:
    """Return the text. Raises BadParameter if it is not UTF-8: Python reads that as surrogates."""
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
DoSample = Annotated[
    bool | None, typer.Option("--do-sample/--greedy", help="Sample tokens, or not.")
]
Temperature = Annotated[float | None, typer.Option(help="Sharper below 1; 0 is greedy.")]
TopK = Annotated[int | None, typer.Option(help="Sample from the k most likely tokens.")]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample from the most likely tokens whose probabilities add up to p."),
]
MinP = Annotated[
    float | None,
    typer.Option(help="Sample from tokens of at least p times the highest probability."),
]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1 avoids repetition.")]
Seed = Annotated[
    int | None, typer.Option(min=0, max=MOST_SEED, help="The same seed gives the same text.")
]
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
MaxLength = Annotated[int | None, typer.Option(help="Largest context in tokens.")]
ServedModelName = Annotated[
    list[str] | None, typer.Option(help="Name that requests may ask for; repeatable.")
]
MaxRows = Annotated[int, typer.Option(min=1, help="Texts that are written at the same time.")]
MaxModelLen = Annotated[
    int | None, typer.Option("--max-model-len", min=1, help="Largest context in tokens.")
]
Memory = Annotated[
    str | None,
    typer.Option(help="Memory of the KV cache: 8GB, 50%; else 25% on a CPU, 85% on a GPU."),
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
    int | None, typer.Option(min=1, help="Engines that run side by side, managed by Ray.")
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Ray cluster to use: auto, HOST:PORT; else this command starts one."),
]
CpusPerReplica = Annotated[
    float | None,
    typer.Option(min=0, help="Cores of a replica; else an equal share, or 1 beside a GPU."),
]
GpusPerReplica = Annotated[
    float | None, typer.Option(min=0, help="GPUs of a replica; else 1 if --device allows a GPU.")
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


def read_text(file: Path, option: str) -> str:
    """Return the text of an option's file, without its last line feed.

    Raises ValueError if the file cannot be read or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {file} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise ValueError(
            f"{option} {file} cannot be read: {error.strerror}; give a file with UTF-8 text"
        ) from error


def check_new_file(file: Path, name: str) -> None:
    """Raise ValueError if the file that an option or argument names has no folder, or is one."""
    if file.is_dir():
        raise ValueError(f"{name} {file} is a folder: name a file in it")
    if not file.parent.is_dir():
        raise ValueError(f"{name} {file}: there is no folder {file.parent}; create it first")
