"""Lfm2Config: the config that callers read and set, with the names and defaults of Hugging Face."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfm2_fast.config import Config
from lfm2_fast.config_values import CheckpointError, read_json
from lfm2_fast.weights import hub
from lfm2_fast.weights.adapter import is_adapter
from lfm2_fast.weights.gguf_config import raw_config
from lfm2_fast.weights.gguf_file import is_gguf, read_gguf

# Defaults of transformers' Lfm2Config, which a bare ``Lfm2Config()`` has as well.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 65536,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128_000,
    "initializer_range": 0.02,
    "norm_eps": 1e-5,
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
    "full_attn_idxs": None,
    "layer_types": None,
    "rope_parameters": None,
    "architectures": None,
    "dtype": None,
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
}
# Older and other spellings, by the name that replaces them.
OTHER_NAMES = {
    "tie_embedding": "tie_word_embeddings",
    "block_ff_dim": "intermediate_size",
    "block_norm_eps": "norm_eps",
    "num_heads": "num_attention_heads",
    "rope_scaling": "rope_parameters",
    "torch_dtype": "dtype",
}
# Fields that ``from_pretrained`` takes as arguments; its own ``dtype`` is not one of them.
FIELDS = frozenset({*DEFAULTS, *OTHER_NAMES, "head_dim"} - {"dtype", "torch_dtype"})


class Lfm2Config:
    """LFM2 model's config, as transformers' class of that name has it.

    Every field is a keyword and an attribute that can be set; fields of no meaning here are kept.
    ``intermediate_size`` is as the config says it, before ``block_auto_adjust_ff_dim``. A model
    reads the sizes when it is made: setting them later changes no weight. Raises CheckpointError,
    as loading does, for values that make no LFM2.
    """

    model_type = "lfm2"
    is_encoder_decoder = False
    hidden_size: int
    num_attention_heads: int
    dtype: Any
    return_dict: bool
    rope_parameters: dict[str, Any]
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(self, **values: Any) -> None:
        self.name_or_path = values.pop("name_or_path", values.pop("_name_or_path", ""))
        if not values.get("rope_scaling"):
            values.pop("rope_scaling", None)
        others = {OTHER_NAMES[name]: values.pop(name) for name in OTHER_NAMES if name in values}
        # As in transformers: the older spellings of these go before the newer ones.
        older = ("tie_word_embeddings", "intermediate_size", "rope_parameters")
        first = {name: others.pop(name) for name in older if name in others}
        fields: dict[str, Any] = {**DEFAULTS, **others, **values, **first}
        if fields["layer_types"] is None:
            layers, chosen = range(fields["num_hidden_layers"]), fields["full_attn_idxs"]
            chosen = layers if chosen is None else chosen
            kinds = ["full_attention" if i in chosen else "conv" for i in layers]
            fields |= {"layer_types": kinds, "full_attn_idxs": list(chosen)}
        theta = fields.pop("rope_theta", None)
        theta = 1e6 if theta is None else theta
        fields["rope_parameters"] = _rope(fields["rope_parameters"], theta)
        for name, value in fields.items():
            setattr(self, name, copy.deepcopy(value))
        self.to_internal()

    def __getattr__(self, name: str) -> Any:
        # Called for names that are not set: another spelling of a field, or nothing.
        if name in OTHER_NAMES:
            return getattr(self, OTHER_NAMES[name])
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        name = OTHER_NAMES.get(name, name)
        if name == "rope_parameters":
            # Scaling that names no base keeps the present one.
            value = _rope(value, vars(self).get(name, {}).get("rope_theta", 1e6))
        super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lfm2Config) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **changed: Any) -> Lfm2Config:
        """Return the config of ``values`` in any published spelling, some of them ``changed``."""
        kept = {k: v for k, v in values.items() if k not in ("model_type", "transformers_version")}
        ropes = {"rope_parameters", "rope_scaling"}
        if ropes & changed.keys():
            theta = cls(**kept).rope_theta
            kept = {k: v for k, v in kept.items() if k not in ropes} | {"rope_theta": theta}
        return cls(**{**kept, **changed})

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> Lfm2Config:
        """Return the config of a checkpoint: a folder, a config.json or a hub id.

        The config of an adapter is its base's.
        ``revision``, ``cache_dir``, ``token``, ``local_files_only``, ``force_download`` and
        ``subfolder`` are the hub's; other options change fields. Raises CheckpointError.
        """
        path, asked = Path(name), hub.hub_options(options)
        if not path.is_file() or is_gguf(path):
            path = hub.find_checkpoint(name, weights=False, **asked)
            if is_adapter(path):
                path = hub.find_base(path, weights=False, **asked)
            path = path if path.is_file() else path / "config.json"
        options = {key: value for key, value in options.items() if key not in asked}
        raw = raw_config(read_gguf(path)) if is_gguf(path) else read_json(path)
        Config.from_dict(raw, str(path))
        return cls.from_dict(raw, **{"name_or_path": os.fspath(name), **options})

    @classmethod
    def of(cls, config: Any) -> Lfm2Config:
        """Return any LFM2 config as this class: ours, the internal one, transformers', a mapping.

        Raises TypeError for anything else.
        """
        if isinstance(config, cls):
            return config
        if isinstance(config, Config | Mapping) or hasattr(config, "to_dict"):
            values = dict(config) if isinstance(config, Mapping) else config.to_dict()
            if values.get("model_type", "lfm2") != "lfm2":
                raise CheckpointError(
                    f"config is of model_type {values['model_type']!r}; give an LFM2 config"
                )
            return cls.from_dict(values)
        raise TypeError(f"config must be an LFM2 config, not {type(config).__name__}")

    def to_internal(self, source: str = "config") -> Config:
        """Return the checked, frozen config that the network is made of."""
        return Config.from_dict(self.to_dict(), source)

    def to_transformers(self) -> Any:
        """Return transformers' own Lfm2Config with these values."""
        from transformers import Lfm2Config as Theirs

        values = {k: v for k, v in self.to_dict().items() if k not in ("model_type", "torch_dtype")}
        return Theirs(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a config.json has them."""
        values = {k: v for k, v in vars(self).items() if k != "name_or_path"}
        dtype = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        values |= {"model_type": self.model_type, "dtype": dtype, "rope_theta": self.rope_theta}
        return copy.deepcopy(values)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the fields that differ from the defaults."""
        return {k: v for k, v in self.to_dict().items() if k not in DEFAULTS or v != DEFAULTS[k]}

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the fields as JSON text, by default those that differ from the defaults."""
        values = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write ``to_json_string`` to a file."""
        Path(path).write_text(self.to_json_string(use_diff), encoding="utf-8")

    def save_pretrained(self, folder: str | os.PathLike[str], **_: Any) -> None:
        """Write config.json into a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.to_json_file(Path(folder) / "config.json", use_diff=False)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Return this config: the model has text alone."""
        return self

    def update(self, values: Mapping[str, Any]) -> None:
        """Set several fields."""
        for name, value in values.items():
            setattr(self, name, value)

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return vars(self).get("head_dim") or self.hidden_size // self.num_attention_heads

    @head_dim.setter
    def head_dim(self, value: int | None) -> None:
        vars(self)["head_dim"] = value

    @property
    def rope_theta(self) -> float:
        """RoPE's base, which ``rope_parameters`` has beside the scaling."""
        return self.rope_parameters["rope_theta"]

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = {**self.rope_parameters, "rope_theta": value}

    @property
    def quantization(self) -> str | None:
        """Name of the weight format in ``quantization_config``, None for dense weights."""
        return (vars(self).get("quantization_config") or {}).get("format")

    @property
    def use_return_dict(self) -> bool:
        """Older name of ``return_dict``."""
        return self.return_dict


def _rope(given: Any, theta: float) -> dict[str, Any]:
    """Return RoPE's parameters in the newer spelling, with the base ``theta`` if they name none."""
    if given and not isinstance(given, Mapping):
        raise CheckpointError(f"config: rope_parameters must be an object, not {given!r}")
    rope = dict(given or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = theta
    return rope
