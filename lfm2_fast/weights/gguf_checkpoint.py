"""A GGUF file as a checkpoint: its config, its generation parameters, and our fused tensors."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lfm2_fast.config import CheckpointError, Config
from lfm2_fast.weights.checkpoint import BLOCK, fill_table, listed
from lfm2_fast.weights.formats import MIXED, WIDE, Format
from lfm2_fast.weights.fusion import Fused, fusion_table
from lfm2_fast.weights.gguf_blocks import TYPES, parts_of, to_wide
from lfm2_fast.weights.gguf_file import GGUFFile, GGUFTensor, require_gguf

logger = logging.getLogger(__name__)

ARCHITECTURE = "lfm2"
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Their values need a number beside the tensor, or are none of a weight.
REFUSED = {"NVFP4", "Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
# GGUF's architectures of this family, as people call them.
FAMILY = {"lfm2moe": "LFM2-MoE", "lfm3": "LFM3", "clip": "a vision or audio projector (mmproj)"}
# Parameters of sampling, by their names in a generation config.
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def raw_config(file: GGUFFile) -> dict[str, Any]:
    """Return the config.json that the file's metadata mean, before any check of its values.

    Raises CheckpointError for another architecture, and for what this package does not run.
    """
    found = file.metadata
    architecture = found.get("general.architecture")
    if architecture != ARCHITECTURE:
        name = FAMILY.get(str(architecture), f"a model of architecture {architecture!r}")
        raise CheckpointError(
            f"{file.path} holds {name}, which lfm2_fast does not run; it runs the dense text "
            "models (architecture 'lfm2'). Use llama.cpp for this file"
        )

    def key(name: str, default: Any = None) -> Any:
        return found.get(f"{ARCHITECTURE}.{name}", default)

    for name, neutral in (("attention.sliding_window", 0), ("attention.causal", True)):
        if key(name, neutral) != neutral:
            raise CheckpointError(
                f"{file.path}: {ARCHITECTURE}.{name} is {key(name)!r}, which is another model than "
                "the LFM2 that lfm2_fast runs; use llama.cpp for this file"
            )
    heads = key("attention.head_count_kv")
    layers = key("block_count")
    # The metadata may claim any number, and the lists below have that length.
    if type(layers) is not int or not 0 < layers <= len(file.tensors):
        raise CheckpointError(
            f"{file.path}: {ARCHITECTURE}.block_count is {layers!r}, and the file has "
            f"{len(file.tensors)} tensors"
        )
    heads = heads if isinstance(heads, list) else [heads] * layers
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path} lacks token_embd.weight, the embedding")
    if any(type(count) is not int for count in heads) or len(set(heads) - {0}) != 1:
        raise CheckpointError(
            f"{file.path}: {ARCHITECTURE}.attention.head_count_kv is {str(heads)[:200]}; one "
            "number of heads for all attention layers, and 0 for convolutions, is supported"
        )
    eos = [found.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    ends = list(dict.fromkeys(each for each in eos if type(each) is int))
    biased = any(name.endswith(".shortconv.in_proj.bias") for name in file.tensors)
    return {
        "model_type": "lfm2",
        "architectures": ["Lfm2ForCausalLM"],
        "vocab_size": embedding.shape[0],
        "hidden_size": key("embedding_length"),
        "intermediate_size": key("feed_forward_length"),
        "block_auto_adjust_ff_dim": False,
        "num_hidden_layers": layers,
        "num_attention_heads": key("attention.head_count"),
        "num_key_value_heads": max(heads),
        "head_dim": key("attention.key_length"),
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "max_position_embeddings": key("context_length"),
        # A float32 of the file, as the number that was meant: 1e-5, and not 9.99999974e-6.
        "norm_eps": _shortest(key("attention.layer_norm_rms_epsilon")),
        "conv_L_cache": key("shortconv.l_cache"),
        "conv_bias": biased,
        "rope_parameters": _rope(file, key),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": found.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": found.get("tokenizer.ggml.padding_token_id"),
        "dtype": str(FLOATS.get(embedding.type, torch.bfloat16)).removeprefix("torch."),
    }


def _rope(file: GGUFFile, key: Any) -> dict[str, Any]:
    kind = key("rope.scaling.type", "none")
    rope = {"rope_theta": _shortest(key("rope.freq_base")), "rope_type": "default"}
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise CheckpointError(
            f"{file.path}: {ARCHITECTURE}.rope.scaling.type {kind!r} is not supported; lfm2_fast "
            "reads none, linear and yarn"
        )
    rope |= {"rope_type": kind, "factor": key("rope.scaling.factor")}
    original = key("rope.scaling.original_context_length")
    return rope | ({"original_max_position_embeddings": original} if kind == "yarn" else {})


def _shortest(value: Any) -> Any:
    """Return the shortest decimal number that rounds to this float32."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def generation_config(file: GGUFFile, config: Config) -> dict[str, Any]:
    """Return the generation parameters that the file has: its tokens, and sampling if it says."""
    ids = config.to_dict()
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    made = {name: ids[name] for name in names if ids[name] is not None}
    said = {
        name: _shortest(file.metadata[f"general.sampling.{theirs}"])
        for theirs, name in SAMPLING.items()
        if isinstance(file.metadata.get(f"general.sampling.{theirs}"), int | float)
    }
    if said.get("temperature", 1) == 0:
        said = {name: value for name, value in said.items() if name == "repetition_penalty"}
    elif said:
        said["do_sample"] = True
    return made | said


@dataclass(frozen=True)
class _Source:
    """A tensor of a file under the name of Hugging Face's, as ``fill_table`` reads it."""

    stored: GGUFTensor
    name: str
    shape: tuple[int, ...]

    @property
    def type(self) -> str:
        return self.stored.type

    def fill(self, target: Format, places: Sequence[torch.Tensor]) -> None:
        """Fill the parts ``places`` of the ``target`` format; types that it holds are moved."""
        for here, raw in self._bytes():
            if self.type in TYPES and target in (TYPES[self.type][0], WIDE):
                made: tuple[torch.Tensor, ...] = parts_of(self.type, raw)
                if target is WIDE:
                    made = to_wide(TYPES[self.type][0], made)
            else:
                made = target.quantize(self._values(raw).to(places[0].device))
            for place, part in zip(places, made, strict=True):
                place[here] = part

    def copy_to(self, place: torch.Tensor) -> None:
        """Copy the values into ``place``, a vector's or a dense matrix's."""
        for here, raw in self._bytes():
            rows = place if place.dim() == 1 else place[here]
            rows.copy_(self._values(raw).reshape(rows.shape))

    def _bytes(self) -> Any:
        """Yield some rows of bytes at a time, each with their place."""
        whole = self.stored.raw()
        count = max(1, BLOCK // self.stored.shape[-1])
        for first in range(0, len(whole), count):
            # Copied: torch would not take what must not be written.
            yield slice(first, first + count), torch.from_numpy(whole[first : first + count].copy())

    def _values(self, raw: torch.Tensor) -> torch.Tensor:
        if self.type in FLOATS:
            return raw.view(FLOATS[self.type])
        gguf = require_gguf()
        made = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[self.type])
        return torch.from_numpy(made)


def held(file: GGUFFile, config: Config) -> Config:
    """Return ``config`` with the format of every matrix, so that as few as can be are converted.

    Parts that are stacked here have one format: that of all, or a wider one that holds each.
    """
    dense = replace(config, quantization=None, formats=())
    table = fusion_table(dense)
    sources, formats = _sources(file, table), {}
    for name, fused in table.items():
        types = {sources[part.name].type for part in fused.parts}
        if fused.is_matrix and types <= TYPES.keys():
            each = {TYPES[type][0] for type in types}
            formats[name] = (each.pop() if len(each) == 1 else WIDE).name or ""
    if not formats:
        return dense
    return replace(dense, quantization=MIXED.name, formats=tuple(formats.items()))


def load_weights(
    file: GGUFFile,
    config: Config,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str | None = None,
) -> dict[str, torch.Tensor]:
    """Return our fused tensors by name; vectors and dense matrices in ``dtype``, on ``device``.

    ``config`` is what ``held`` returned: matrices in its formats are moved, and no number of them
    changes. ``quantization`` converts a file of dense matrices while it is read. A note says what
    was kept and what converted. Raises CheckpointError for tensors that do not fit.
    """
    table = fusion_table(replace(config, quantization=None, formats=()))
    sources = _sources(file, table)
    wanted = replace(config, quantization=config.quantization or quantization)
    logger.info("%s: %s", file.path, types_in_words(file, config, table, sources, dtype))
    return fill_table(table, wanted, sources, device=device, dtype=dtype)


def types_in_words(
    file: GGUFFile,
    config: Config,
    table: Mapping[str, Fused],
    sources: Mapping[str, _Source],
    dtype: torch.dtype,
) -> str:
    """Return which types of matrices are kept as they are, and which become ``dtype``."""
    formats = dict(config.formats)
    kept: Counter[str] = Counter()
    converted: Counter[str] = Counter()
    for name, fused in table.items():
        for part in fused.parts if fused.is_matrix else ():
            type = sources[part.name].type
            exact = name in formats or FLOATS.get(type) == dtype
            (kept if exact else converted)[type] += 1
    words = [f"kept {_counted(kept)}"] if kept else []
    if converted:
        words.append(f"{_counted(converted)} became {str(dtype).removeprefix('torch.')}")
    return ", ".join(words)


def _counted(types: Counter[str]) -> str:
    return ", ".join(f"{count} {type}" for type, count in types.most_common())


def gguf_names(table: Mapping[str, Fused], layers: int) -> dict[str, str]:
    """Return GGUF's name of each of Hugging Face's tensors, as llama.cpp's converter gives it."""
    gguf = require_gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LFM2, layers)
    parts = [part.name for fused in table.values() for part in fused.parts]
    return {name: names.get_name(name, (".weight", ".bias")) for name in parts}


def _sources(file: GGUFFile, table: Mapping[str, Fused]) -> dict[str, _Source]:
    """Return what each of Hugging Face's tensors is in the file.

    Raises CheckpointError for tensors that are missing, unknown, of another shape, or of a type
    that is not read.
    """
    parts = {part.name: part for fused in table.values() for part in fused.parts}
    layers = 1 + max(int(name.split(".")[2]) for name in parts if ".layers." in name)
    names = gguf_names(table, layers)
    if "output_norm.weight" in file.tensors:  # of older files
        names = {ours: _old(name) for ours, name in names.items()}
    missing = [name for name in names.values() if name not in file.tensors]
    if missing:
        raise CheckpointError(
            f"{file.path} lacks {listed(missing)}, which its metadata ask for; the file is "
            "incomplete, or belongs to another model"
        )
    unknown = sorted(file.tensors.keys() - set(names.values()))
    if unknown:
        raise CheckpointError(
            f"{file.path} holds {listed(unknown)}, which an LFM2 of this kind does not have; use "
            "llama.cpp for this file"
        )
    found = {}
    for ours, theirs in names.items():
        stored, part = file.tensors[theirs], parts[ours]
        # A convolution's taps are [H, W] there.
        shape = tuple(n for i, n in enumerate(part.shape) if not (len(part.shape) == 3 and i == 1))
        if stored.shape != shape:
            raise CheckpointError(
                f"{file.path}: {theirs} has shape {list(stored.shape)}, and the metadata ask for "
                f"{list(shape)}"
            )
        if stored.type in REFUSED:
            raise CheckpointError(
                f"{file.path}: {theirs} is stored as {stored.type}, which lfm2_fast does not read; "
                "take a file of Q4_0, Q4_K_M, Q5_K_M, Q6_K, Q8_0, F16 or BF16"
            )
        found[ours] = _Source(stored, theirs, part.shape)
    return found


def _old(name: str) -> str:
    return name.replace("token_embd_norm", "output_norm")


def check_quantization(file: GGUFFile, config: Config, quantization: str | None) -> None:
    """Raise ValueError where ``quantization`` is asked for of a file that is quantized itself."""
    if quantization is not None and config.quantization is not None:
        types = Counter(t.type for t in file.tensors.values() if t.type not in FLOATS)
        raise ValueError(
            f"quantization={quantization!r}: {file.path} is quantized itself ({_counted(types)}), "
            "and is used as it is; leave quantization out, or give a file in F16 or BF16"
        )
