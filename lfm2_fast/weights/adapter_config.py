"""AdapterConfig: what adapter_config.json of PEFT says of a LoRA adapter, every field checked.

Fields without effect on a trained adapter are ignored. A field that would change the result and is
not supported is an error that names it, unknown fields included.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lfm2_fast.config_values import CheckpointError, read_json

FILE = "adapter_config.json"
HEAD_MODULE = "lm_head"

# Fields that this file reads.
READ = {
    "peft_type",
    "base_model_name_or_path",
    "revision",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "bias",
    "modules_to_save",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
}
# Fields that say how an adapter was begun or trained, or where it came from.
NO_EFFECT = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "lora_dropout",
    "fan_in_fan_out",  # PEFT sets it by the kind of module
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "qalora_group_size",
}
# Beginnings that leave the base as it is. Others (PiSSA, OLoRA, CorDA, LoftQ) change its weights.
PLAIN_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class AdapterConfig:
    """Fields of a LoRA adapter that decide its result; those of PEFT, by PEFT's names."""

    source: Path
    r: int
    lora_alpha: float
    base: str | None = None
    revision: str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    target_modules: str | Sequence[str] = ()
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] = ()
    layers_to_transform: Sequence[int] | None = None
    layers_pattern: Sequence[str] = ()

    @classmethod
    def from_file(cls, path: Path) -> AdapterConfig:
        """Read ``path``. Raises CheckpointError, naming the field, for what is not supported."""
        raw = read_json(path)
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(
                f"{path}: peft_type={kind!r} is not supported; lfm2_fast runs LoRA adapters. Merge "
                "it with PEFT's merge_and_unload(), and load that checkpoint"
            )
        for name, value in raw.items():
            if name not in READ | NO_EFFECT and value not in (None, False, [], {}):
                raise CheckpointError(
                    f"{path}: {name}={value!r} is not supported by lfm2_fast, and would change the "
                    "result; merge the adapter with PEFT's merge_and_unload(), and load that"
                )
        begun = raw.get("init_lora_weights", True)
        if begun not in PLAIN_BEGINNINGS:
            raise CheckpointError(
                f"{path}: init_lora_weights={begun!r} changes the base's own weights; save the "
                "adapter with PEFT's path_initial_model_for_weight_conversion"
            )
        targets = raw.get("target_modules")
        layers = raw.get("layers_to_transform")
        if isinstance(layers, int):
            layers = [layers]
        try:
            made = cls(
                source=path,
                r=int(raw["r"]),
                lora_alpha=float(raw["lora_alpha"]),
                base=raw.get("base_model_name_or_path"),
                revision=raw.get("revision"),
                rank_pattern={k: int(v) for k, v in (raw.get("rank_pattern") or {}).items()},
                alpha_pattern={k: float(v) for k, v in (raw.get("alpha_pattern") or {}).items()},
                use_rslora=bool(raw.get("use_rslora")),
                use_dora=bool(raw.get("use_dora")),
                lora_bias=bool(raw.get("lora_bias")),
                target_modules=targets if isinstance(targets, str) else tuple(targets or ()),
                exclude_modules=raw.get("exclude_modules") or None,
                modules_to_save=tuple(raw.get("modules_to_save") or ()),
                layers_to_transform=None if not layers else tuple(layers),
                layers_pattern=_listed(raw.get("layers_pattern")),
            )
            for pattern in made._patterns():
                re.compile(pattern)
        except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
            raise CheckpointError(
                f"{path} is no LoRA config that PEFT writes ({type(error).__name__}: {error})"
            ) from error
        if made.r < 1 or min(made.rank_pattern.values(), default=1) < 1:
            raise CheckpointError(f"{path}: r must be at least 1, and so must be rank_pattern")
        return made

    def _patterns(self) -> Iterator[str]:
        yield from (*self.rank_pattern, *self.alpha_pattern, *self.modules_to_save)
        yield from self.layers_pattern
        for each in (self.target_modules, self.exclude_modules):
            if isinstance(each, str):
                yield each

    def rank(self, module: str) -> int:
        """Return the rank of a module's change."""
        return self.rank_pattern.get(_pattern(self.rank_pattern, module), self.r)

    def scale(self, module: str) -> float:
        """Return the number that a module's change is multiplied by."""
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.lora_alpha)
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def is_saved_whole(self, name: str) -> bool:
        """Return True if ``modules_to_save`` names the module ``name`` or one around it."""
        return any(re.match(rf"(^|.*\.){each}($|\..*)", name) for each in self.modules_to_save)

    def is_target(self, module: str) -> bool:
        """Return True if the change has a part for a module, by the rules of PEFT."""
        excluded = self.exclude_modules
        if isinstance(excluded, str):
            if re.fullmatch(excluded, module):
                return False
        elif excluded and _ends_with(module, excluded):
            return False
        if self.is_saved_whole(module):
            return False
        targets = self.target_modules
        if isinstance(targets, str):
            if targets.lower() == "all-linear":
                return module != HEAD_MODULE and not module.endswith("embed_tokens")
            return re.fullmatch(targets, module) is not None
        if module in targets:
            return True
        return _ends_with(module, targets) and self._is_in_layers(module)

    def _is_in_layers(self, module: str) -> bool:
        """Return True if ``layers_to_transform`` has the layer of a module."""
        if self.layers_to_transform is None:
            return True
        patterns = [rf"(?:^|.*?\.){each}\.(\d+)\." for each in self.layers_pattern]
        found = [re.match(each, module) for each in patterns or [r".*?\.[^.]*\.(\d+)\."]]
        number = next((match[1] for match in found if match), None)
        return number is not None and int(number) in self.layers_to_transform


def _listed(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) and value else tuple(value or ())


def _ends_with(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _pattern(patterns: Iterable[str], module: str) -> str:
    """Return the first pattern that the end of a module's name matches, else the name."""
    for each in patterns:
        if re.match(rf"(.*\.)?({each})$", module):
            return each
    return module
