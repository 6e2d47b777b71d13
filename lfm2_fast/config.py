"""Config: a checkpoint's config.json, in any of its published spellings, as one frozen object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm2_fast.config_values import CheckpointError, Reader, read_json

NOT_YET = {
    "lfm2_moe": "LFM2-MoE",
    "lfm2_vl": "LFM2-VL",
    "lfm2-vl": "LFM2-VL",
    "lfm2_audio": "LFM2-Audio",
}
# Classes with these weights, in lower case. The second has no head of its own.
CLASSES = ("Lfm2ForCausalLM", "Lfm2Model")
# The quant_method of checkpoints that save_pretrained wrote; "format" names a weight format.
OWN_METHOD = "lfm2_fast"
# Another project's method that is read; ``weights.compressed_tensors`` lists its formats.
OTHER_METHOD = "compressed-tensors"
# RoPE types that scale, with the required and optional fields of `rope_parameters`. They are
# transformers' types that rotate whole heads.
ORIGINAL, SHARE = "original_max_position_embeddings", "partial_rotary_factor"
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor", ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor", ORIGINAL), ("factor", "attention_factor")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", ORIGINAL), ()),
    "proportional": ((SHARE,), ("factor",)),
}
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Config:
    """Sizes and settings of an LFM2 checkpoint's model, under Hugging Face's names.

    ``intermediate_size`` is the real size of the feed-forward matrices: the rounding of
    ``block_auto_adjust_ff_dim`` is already done. ``layer_types`` names every layer "conv" or
    "full_attention". ``quantization`` names the weight format of the matrices; None is dense. If it
    is "mixed", ``formats`` has the name and format of every matrix that is not dense.

    ``rope_scaling`` is empty for plain RoPE. Else it has name and value of every field that
    `ROPE_TYPES` lists for the type. Defaults are filled in, and ``rope_type`` comes first.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layer_types: tuple[str, ...]
    max_position_embeddings: int
    norm_eps: float
    rope_theta: float
    conv_L_cache: int
    conv_bias: bool
    tie_word_embeddings: bool
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    dtype: str | None = None
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    quantization: str | None = None
    formats: tuple[tuple[str, str], ...] = ()

    model_type = "lfm2"
    is_encoder_decoder = False

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks of the model."""
        return len(self.layer_types)

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """RoPE's base and scaling, as a config.json of transformers 5 has them."""
        scaling = {n: list(v) if isinstance(v, tuple) else v for n, v in self.rope_scaling}
        return {"rope_type": "default", "rope_theta": self.rope_theta, **scaling}

    @property
    def quantization_config(self) -> dict[str, Any]:
        """Weight format as a config.json has it."""
        formats = {"formats": dict(self.formats)} if self.formats else {}
        return {"quant_method": OWN_METHOD, "format": self.quantization, **formats}

    @property
    def context_length(self) -> int:
        """Longest context: ``max_position_embeddings``, or its value after RoPE scaling."""
        scaling = dict(self.rope_scaling)
        original = scaling.get(ORIGINAL, self.max_position_embeddings)
        return max(self.max_position_embeddings, int(original * scaling.get("factor", 1)))

    @property
    def rope_follows_length(self) -> bool:
        """Return True if the frequencies of rotary embedding depend on the context's length."""
        return dict(self.rope_scaling).get("rope_type") in ("dynamic", "longrope")

    def cache_bytes(self, item: int, tokens: int = 1, more_layers: int = 0) -> int:
        """Bytes of the keys and values of ``tokens``, at ``item`` bytes a number.

        ``more_layers`` is the number of a drafter's layers.
        """
        layers = self.layer_types.count("full_attention") + more_layers
        return 2 * layers * self.num_key_value_heads * self.head_dim * item * tokens

    @classmethod
    def from_file(cls, path: Path) -> Config:
        """Read ``config.json``. Raises CheckpointError, which names the file and the fault."""
        return cls.from_dict(read_json(path), source=str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config") -> Config:
        """Read a config in the spelling of transformers 4 or 5.

        ``source`` is the config's name in messages. Raises CheckpointError for the config of
        another model, and for a feature that this package does not have. It also raises for a value
        that is missing, of the wrong type or out of range. Weight formats are checked when the
        weights are read.
        """
        _check_kind(raw, source)
        read = Reader(raw, source)
        hidden = read.count("hidden_size")
        heads = read.count("num_attention_heads", "num_heads")
        kv_heads = read.count("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise read.error(
                f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
            )
        if raw.get("head_dim") is None and hidden % heads:
            raise read.error(f"hidden_size={hidden} is not a multiple of {heads} heads")
        head_dim = read.count("head_dim", default=hidden // heads)
        if head_dim % 2:
            raise read.error(f"head_dim={head_dim} is odd, but RoPE turns pairs")
        return cls(
            vocab_size=read.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=_intermediate_size(read),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            layer_types=_layer_types(read),
            max_position_embeddings=_longest(read),
            norm_eps=read.number("norm_eps", "block_norm_eps", default=1e-5),
            conv_L_cache=read.count("conv_L_cache", default=3),
            conv_bias=read.flag("conv_bias", default=False),
            tie_word_embeddings=read.flag("tie_embedding", "tie_word_embeddings", default=True),
            initializer_range=read.number("initializer_range", default=0.02),
            pad_token_id=read.token("pad_token_id"),
            bos_token_id=read.token("bos_token_id"),
            eos_token_id=_eos_token_id(read),
            dtype=_dtype(read),
            **_rope(read, head_dim),
            quantization=_quantization(read),
            formats=_formats(read),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a config.json for Hugging Face, in the spellings of transformers 4 and 5."""
        eos = self.eos_token_id
        quantized = {}
        if self.quantization is not None:
            quantized = {"quantization_config": self.quantization_config}
        # The older spelling, which counts if both are present.
        scaled = {"rope_scaling": self.rope_parameters} if self.rope_scaling else {}
        return {
            "architectures": ["Lfm2ForCausalLM"],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "block_auto_adjust_ff_dim": False,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "layer_types": list(self.layer_types),
            "max_position_embeddings": self.max_position_embeddings,
            "norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": self.rope_parameters,
            **scaled,
            "conv_L_cache": self.conv_L_cache,
            "conv_bias": self.conv_bias,
            "tie_embedding": self.tie_word_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
            "dtype": self.dtype,
            "torch_dtype": self.dtype,
            **quantized,
        }


def _check_kind(raw: Mapping[str, Any], source: str) -> None:
    kind = raw.get("model_type")
    if isinstance(kind, str) and kind in NOT_YET:
        raise CheckpointError(
            f"{source}: this is an {NOT_YET[kind]} checkpoint, which lfm2_fast does not support "
            "yet; it runs the dense text models (LFM2 and LFM2.5: 350M, 700M, 1.2B, 2.6B)"
        )
    if kind != "lfm2":
        what = f"model_type {kind!r}" if kind else "no model_type"
        raise CheckpointError(
            f"{source}: this is not an LFM2 checkpoint, its config has {what}; "
            "load it with transformers instead"
        )
    names = raw.get("architectures") or []
    code = raw.get("auto_map") or {}
    if not isinstance(names, list) or not isinstance(code, dict):
        raise CheckpointError(f"{source}: architectures must be a list, and auto_map an object")
    # A class of the checkpoint's own code: "file.Class".
    names = names + [at for auto, at in code.items() if auto.startswith("AutoModel")]
    known = {name.lower() for name in CLASSES}
    for name in names:
        if str(name).rpartition(".")[2].lower() not in known:
            raise CheckpointError(
                f"{source}: this is a checkpoint of {name}, which computes something else than "
                f"{CLASSES[0]}, the model that lfm2_fast runs; load it with transformers instead"
            )


def _intermediate_size(read: Reader) -> int:
    """Real feed-forward size: if the config says so, two thirds, times a multiplier, rounded up."""
    size = read.count("block_ff_dim", "intermediate_size")
    if read.flag("block_auto_adjust_ff_dim", default=True):
        size = int(2 * size / 3)
        # An explicit null multiplier skips the rounding too, as in Hugging Face's class.
        if read.raw.get("block_ffn_dim_multiplier", 1.0) is not None:
            size = int(read.number("block_ffn_dim_multiplier", default=1.0) * size)
            multiple = read.count("block_multiple_of", default=256)
            size = -(-size // multiple) * multiple
    return size


def _layer_types(read: Reader) -> tuple[str, ...]:
    layers = read.count("num_hidden_layers")
    types = read.items("layer_types")
    if types is None:
        chosen = read.items("full_attn_idxs")
        chosen = list(range(layers)) if chosen is None else chosen
        wrong = [i for i in chosen if not isinstance(i, int) or not 0 <= i < layers]
        if wrong:
            raise read.error(f"full_attn_idxs names layer {wrong[0]!r} of {layers} layers")
        types = ["full_attention" if i in chosen else "conv" for i in range(layers)]
    if len(types) != layers:
        raise read.error(f"layer_types names {len(types)} layers, num_hidden_layers is {layers}")
    for i, kind in enumerate(types):
        if kind not in ("conv", "full_attention"):
            raise read.error(
                f"layer_types[{i}] is {kind!r}; lfm2_fast knows 'conv' and 'full_attention'"
            )
    return tuple(types)


def _rope(read: Reader, head_dim: int) -> dict[str, Any]:
    """Read ``rope_theta`` and ``rope_scaling`` as transformers' Lfm2 class does."""
    spelling = "rope_scaling" if read.raw.get("rope_scaling") else "rope_parameters"
    raw = read.value(spelling, default={})
    if not isinstance(raw, dict):
        raise read.error(f"{spelling} must be an object, not {raw!r}")
    if "conv" in raw or "full_attention" in raw:
        raise read.error(
            f"{spelling} names kinds of layers, which only other models have; give one object "
            "with a rope_type, for all layers"
        )
    values = {SHARE: read.value(SHARE, default=1.0), ORIGINAL: _longest(read)}
    values |= {name: value for name, value in raw.items() if value is not None}
    values[ORIGINAL] = read.value(ORIGINAL, default=values[ORIGINAL])
    rope = Reader(values, f"{read.source}: {spelling}")
    theta = rope.number("rope_theta", default=read.number("rope_theta", default=1e6))
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        known = ", ".join(("default", *ROPE_TYPES))
        raise read.error(f"rope_type {kind!r} is not supported; lfm2_fast knows {known}")
    if kind == "yarn":
        # Default of transformers for null.
        nulls = {"factor": _longest(read) / rope.count(ORIGINAL), "truncate": False}
        values |= {name: v for name, v in nulls.items() if name in raw and raw[name] is None}
    if values[SHARE] != 1 and (kind != "proportional" or not 0 < rope.number(SHARE) <= 1):
        raise rope.error(
            f"{SHARE}={values[SHARE]!r} is not supported with rope_type {kind!r}; leave it out "
            "(rope_type 'proportional' takes a share up to 1)"
        )
    needed, optional = ROPE_TYPES[kind]
    found: dict[str, Any] = {"rope_type": kind}
    for name in (*needed, *optional):
        if name in optional and name not in values:
            continue
        if name == ORIGINAL:
            found[name] = rope.count(name)
        elif name == "truncate":
            found[name] = rope.flag(name, default=True)
        elif name in ("short_factor", "long_factor"):
            found[name] = rope.numbers(name, head_dim // 2)
        else:
            found[name] = rope.number(name)
    return {"rope_theta": theta, "rope_scaling": tuple(found.items())}


def _longest(read: Reader) -> int:
    return read.count("max_position_embeddings", default=128_000)


def _dtype(read: Reader) -> str | None:
    found = read.value("dtype", "torch_dtype")
    if found is not None and found not in DTYPES:
        raise read.error(f"torch_dtype {found!r} is not one of {', '.join(DTYPES)}")
    return found


def _quantization(read: Reader) -> str | None:
    found = read.value("quantization_config", default={})
    if not isinstance(found, dict):
        raise read.error(f"quantization_config must be an object, not {found!r}")
    if not found:
        return None
    if found.get("quant_method") == OTHER_METHOD:
        return OTHER_METHOD
    format = found.get("format")
    own = {name: value for name, value in found.items() if name != "formats"}
    if own != {"quant_method": OWN_METHOD, "format": format} or not isinstance(format, str):
        method = found.get("quant_method", "unknown method")
        raise read.error(
            f"the checkpoint is quantized ({method}), which lfm2_fast does not read; load the "
            "unquantized checkpoint, with quantization='int8' if memory is short"
        )
    return format


def _formats(read: Reader) -> tuple[tuple[str, str], ...]:
    found = read.value("quantization_config", default={}).get("formats", {})
    if not isinstance(found, dict) or not all(isinstance(each, str) for each in found.values()):
        raise read.error(f"quantization_config's formats must be names by matrix, not {found!r}")
    return tuple(found.items())


def _eos_token_id(read: Reader) -> int | tuple[int, ...] | None:
    found = read.value("eos_token_id")
    if isinstance(found, list) and found and all(type(i) is int for i in found):
        return tuple(found)
    return read.token("eos_token_id")
