"""Adapter: a folder that PEFT saved -> the changes of tensors, checked by a model's config.

Nothing is ignored: a tensor that no part of the model takes is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lfm2_fast.config import Config
from lfm2_fast.config_values import FETCH_AGAIN, CheckpointError
from lfm2_fast.weights import adapter_config
from lfm2_fast.weights.adapter_config import AdapterConfig
from lfm2_fast.weights.fusion import BASE, EMBEDDING, HEAD, Part, fusion_table

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

# What follows a module's name in the name of one of its tensors.
KINDS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "bias",
    "lora_embedding_A": "down",
    "lora_embedding_B": "up",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}


@dataclass(frozen=True)
class LowRank:
    """Change of a matrix ``[N, K]``, in float32: ``scale * up @ down`` is added to it.

    ``down [r, K]``, ``up [N, r]``. ``bias [N]``, times ``scale``, is added to the product.
    ``magnitude`` is DoRA's: the changed matrix is scaled until its rows, those of an embedding's
    transpose, have these norms.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None


@dataclass(frozen=True)
class Adapter:
    """Changes that an adapter makes, by Hugging Face's names.

    ``low_rank`` has those of matrices, by module. ``replaced`` are tensors that were trained whole.
    ``bases`` stand for the base's own, which the adapter's training had changed or only kept.
    """

    folder: Path
    config: AdapterConfig
    low_rank: Mapping[str, LowRank]
    replaced: Mapping[str, torch.Tensor]
    bases: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def unties(self) -> bool:
        """Return True if embedding and head differ once the adapter is merged into tied ones."""
        names = {f"{name}.weight" for name in self.low_rank} | set(self.replaced)
        return bool(names & {BASE + EMBEDDING, HEAD})


def holds_adapter(folder: Path) -> bool:
    """Return True for a folder that holds an adapter as PEFT saves it, alone or beside weights."""
    return (folder / adapter_config.FILE).is_file()


def is_adapter(folder: Path) -> bool:
    """Return True for a folder that holds an adapter and no checkpoint.

    Some trainers save the base's config.json with it.
    """
    is_whole = (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    return holds_adapter(folder) and not is_whole


def read_adapter(folder: Path, config: Config) -> Adapter:
    """Read the adapter in ``folder`` for a model of ``config``, dense or not.

    Raises CheckpointError, which names file and tensor, for a tensor that is missing, unknown or of
    a wrong shape. It also raises for unsupported fields of its config.
    """
    fields = AdapterConfig.from_file(folder / adapter_config.FILE)
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {FILE}; lfm2_fast reads safetensors only: save the adapter with "
            "PEFT's save_pretrained()"
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({error}); {FETCH_AGAIN}") from error
    return _Reader(path, fields, config).read(tensors)


class _Reader:
    """Sorts the tensors of a file into an ``Adapter``, checking each."""

    def __init__(self, path: Path, fields: AdapterConfig, config: Config) -> None:
        self.path, self.fields = path, fields
        dense = replace(config, quantization=None, formats=(), tie_word_embeddings=False)
        table = fusion_table(dense)
        self.parts = {part.name: part for fused in table.values() for part in fused.parts}
        self.full = {part.base_name: part.name for part in self.parts.values()}
        self.modules = {
            part.name.removesuffix(".weight"): part
            for fused in table.values()
            if fused.is_matrix
            for part in fused.parts
        }

    def read(self, tensors: Mapping[str, torch.Tensor]) -> Adapter:
        found: dict[str, dict[str, torch.Tensor]] = {}
        replaced: dict[str, torch.Tensor] = {}
        bases: dict[str, torch.Tensor] = {}
        for key, tensor in tensors.items():
            name = key.removeprefix(PREFIX)
            match = re.fullmatch(rf"(.+)\.({'|'.join(map(re.escape, KINDS))})", name)
            if match is not None:
                module = self.full.get(f"{match[1]}.weight", f"{match[1]}.weight")
                module = module.removesuffix(".weight")
                if module not in self.modules or not self.fields.is_target(match[1]):
                    raise self.error(
                        f"{key} would not be applied: {match[1]} is "
                        + ("no target of its config" if module in self.modules else "not adapted")
                    )
                found.setdefault(module, {})[KINDS[match[2]]] = tensor.float()
                continue
            name = name.replace(".modules_to_save.", ".")
            plain = name.replace(".base_layer.", ".")
            whole = self.full.get(plain, plain)
            if whole not in self.parts:
                raise self.error(f"{key} would not be applied: the model has no such tensor")
            self.check_shape(key, tensor, self.parts[whole].shape)
            # A vocabulary that was resized, and what stands below a change, is saved with it.
            is_base = not (whole.endswith(".bias") or self.fields.is_saved_whole(plain))
            (bases if is_base else replaced)[whole] = tensor
        headless = self.is_headless(tensors)
        theirs = {each: each.removeprefix(BASE) if headless else each for each in self.modules}
        low_rank = {each: self.low_rank(each, theirs[each], found[each]) for each in found}
        for module, name in theirs.items():
            if module not in low_rank and self.fields.is_target(name):
                raise self.error(f"lacks the tensors of {name}, which is a target of its config")
        if not low_rank and not replaced:
            raise self.error("has no tensors")
        return Adapter(self.path.parent, self.fields, low_rank, replaced, bases)

    def is_headless(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Return True if the names are those of a base without a head."""
        return any(key.removeprefix(PREFIX).startswith("layers.") for key in tensors)

    def low_rank(self, module: str, theirs: str, parts: dict[str, torch.Tensor]) -> LowRank:
        """Return the change of a module, made of its tensors; its config calls it ``theirs``."""
        fields, part = self.fields, self.modules[module]
        wanted = self.shapes(part, self.fields.rank(theirs))
        for kind in wanted.keys() | parts.keys():
            if kind not in parts:
                raise self.error(f"lacks the {kind} tensor of {module}")
            if kind not in wanted:
                raise self.error(f"has a {kind} tensor of {module}, which its config rules out")
            self.check_shape(f"the {kind} tensor of {module}", parts[kind], wanted[kind])
        return LowRank(
            parts["down"],
            parts["up"],
            fields.scale(theirs),
            parts.get("bias"),
            parts.get("magnitude"),
        )

    def shapes(self, part: Part, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor that a module must have."""
        rows, columns = part.shape
        if part.name == BASE + EMBEDDING:
            # Its products run over the tokens, so PEFT's names are the other way around.
            rows, columns = columns, rows
        made: dict[str, tuple[int, ...]] = {"down": (rank, columns), "up": (rows, rank)}
        if self.fields.use_dora:
            made["magnitude"] = (rows,)
        if self.fields.lora_bias:
            made["bias"] = (rows,)
        return made

    def check_shape(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise self.error(
                f"{name} has shape {list(tensor.shape)}, but {list(shape)} would fit this base and "
                "this adapter's config"
            )

    def error(self, message: str) -> CheckpointError:
        base = self.fields.base
        return CheckpointError(f"{self.path}: {message}; it is an adapter of {base}")
