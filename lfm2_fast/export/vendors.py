"""Vendors' exporters: the commands that call them, and how their quantizers round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lfm2_fast.config import Config
from lfm2_fast.export.rounding import Rounding

# Name of a type -> those of optimum-intel and of ONNX Runtime GenAI's model builder.
OPENVINO_TYPES = {"f32": "fp32", "f16": "fp16", "int8": "int8", "int4": "int4"}
ONNX_TYPES = {"f32": "fp32", "int8": "int8", "int4": "int4"}
PROGRAMS = Path(__file__).parent / "vendor"
# Tokens of a text in Core ML, whose states have a fixed size.
COREML_CONTEXT = 2048

Command = list[str | Path]
# The calls that write the checkpoint in a folder as another folder: by the environment's Python,
# those two folders, a type of weights, the checkpoint's config.
Commands = Callable[[Path, Path, Path, str, Config], list[Command]]


@dataclass(frozen=True)
class Vendor:
    """Exporter with its runtime.

    ``modules`` are those that its environment must import, the last of them for running an export.
    ``types`` are those of weights. ``commands`` makes the calls that write the checkpoint in a
    folder as another folder. ``rounding`` says how a type rounds, None for not at all.

    ``static`` is true if the runtime makes static shapes for an NPU, which a CPU runs too.
    ``unproven`` says which part of the export was not run, if any. This package does not run it.
    ``context`` is the most tokens of a text that an export has room for, None for the model's.
    """

    name: str
    title: str
    modules: tuple[str, ...]
    types: tuple[str, ...]
    commands: Commands
    rounding: Callable[[str, Config], Rounding | None]
    static: bool = False
    unproven: str | None = None
    context: int | None = None


def group_of(config: Config, largest: int) -> int:
    """Return the largest group of columns, a power of two, that divides the rows of all matrices.

    Vendors' quantizers refuse, or leave out, a matrix whose rows are no whole groups.
    """
    widths = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads * config.head_dim,
    )
    group = largest
    while any(width % group for width in widths):
        group //= 2
    return group


def openvino_commands(
    python: Path, source: Path, folder: Path, type: str, config: Config
) -> list[Command]:
    """Return the call of optimum-intel's exporter.

    Integers are symmetric, which an NPU needs.
    """
    options: list[str] = []
    if type in ("int8", "int4"):
        options.append("--sym")
    if type == "int4":
        options += ["--ratio", "1.0", "--group-size", str(group_of(config, 128))]
    program: Command = [python, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
    task = ["--task", "text-generation-with-past"]
    weights = ["--weight-format", OPENVINO_TYPES[type], *options]
    return [[*program, "--model", source, *task, *weights, folder]]


def openvino_rounding(type: str, config: Config) -> Rounding | None:
    """Return NNCF's rounding: int8 by row, int4 by group with an embedding and a head in int8."""
    return {
        "f32": None,
        "f16": Rounding(16),
        "int8": Rounding(8),
        "int4": Rounding(4, group_of(config, 128), tables=8),
    }[type]


def onnx_commands(
    python: Path, source: Path, folder: Path, type: str, config: Config
) -> list[Command]:
    """Return the calls of ONNX Runtime GenAI's model builder, and of the program that mends it.

    The head has 8 bits where the other matrices have 4. The builder's default rule for scales makes
    no valid graph of both, and k_quant's has smaller errors than the others.
    """
    options = ["hf_token=false"]
    if type in ("int8", "int4"):
        options.append(f"block_size={group_of(config, 32)}")
    if type == "int4":
        options += ["algo_config=k_quant", "matmul_mixed_precision=last_matmul:int8"]
    cache = folder.with_name(f"{folder.name}.cache")
    module = "onnxruntime_genai.models.builder"
    program: Command = [python, "-m", module, "-i", source, "-o", folder]
    chosen: Command = [
        "-p",
        ONNX_TYPES[type],
        "-e",
        "cpu",
        "-c",
        cache,
        "--extra_options",
        *options,
    ]
    return [[*program, *chosen], [python, PROGRAMS / "mend_onnx.py", folder / "model.onnx"]]


def onnx_rounding(type: str, config: Config) -> Rounding | None:
    """Return the builder's rounding: by groups, the head of int4 in int8.

    Its own rule for int4 has zero points, with smaller errors.
    """
    return {
        "f32": None,
        "int8": Rounding(8, group_of(config, 32)),
        "int4": Rounding(4, group_of(config, 32), tables=8),
    }[type]


def coreml_commands(
    python: Path, source: Path, folder: Path, type: str, config: Config
) -> list[Command]:
    """Return the call of the program that converts by coremltools."""
    context = str(min(COREML_CONTEXT, config.context_length))
    return [[python, PROGRAMS / "convert_coreml.py", source, folder, type, context]]


def coreml_rounding(type: str, config: Config) -> Rounding | None:
    """Return the rounding of a type: float16, or none."""
    return {"f32": None, "f16": Rounding(16)}[type]


OPENVINO = Vendor(
    "openvino",
    "OpenVINO",
    ("optimum.intel", "nncf", "openvino"),
    tuple(OPENVINO_TYPES),
    openvino_commands,
    openvino_rounding,
    static=True,
)
ONNX = Vendor(
    "onnx",
    "ONNX Runtime GenAI",
    ("onnx", "onnxruntime_genai.models.builder", "onnxruntime_genai"),
    tuple(ONNX_TYPES),
    onnx_commands,
    onnx_rounding,
)
COREML = Vendor(
    "coreml",
    "Core ML",
    ("torch", "safetensors", "coremltools"),
    ("f16", "f32"),
    coreml_commands,
    coreml_rounding,
    unproven="the program was proven before coremltools converted it; Core ML, which needs macOS "
    "15 or iOS 18, has not run it",
    context=COREML_CONTEXT,
)
VENDORS = {vendor.name: vendor for vendor in (OPENVINO, ONNX, COREML)}
