"""GGUF file's metadata as a config.json and as a generation config."""

from __future__ import annotations

from typing import Any

import torch

from lfm2_fast.config import Config
from lfm2_fast.config_values import FETCH_AGAIN, CheckpointError
from lfm2_fast.weights.gguf_file import GGUFFile

ARCHITECTURE = "lfm2"
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
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

    Raises CheckpointError for another architecture, and for settings that this package does not
    run.
    """
    found = file.metadata
    _check_architecture(file)

    def key(name: str, default: Any = None) -> Any:
        return found.get(f"{ARCHITECTURE}.{name}", default)

    for name, neutral in (("attention.sliding_window", 0), ("attention.causal", True)):
        if key(name, neutral) != neutral:
            raise CheckpointError(
                f"{file.path}: {ARCHITECTURE}.{name} is {key(name)!r}, which is another model than "
                "the LFM2 that lfm2_fast runs; use llama.cpp for this file"
            )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(
            f"{file.path} lacks token_embd.weight, the embedding; the file is incomplete: "
            f"{FETCH_AGAIN}"
        )
    heads = _kv_heads(file, key)
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
        "num_hidden_layers": len(heads),
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


def _check_architecture(file: GGUFFile) -> None:
    """Raise CheckpointError, which names the model, for another architecture."""
    architecture = file.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        name = FAMILY.get(str(architecture), f"a model of architecture {architecture!r}")
        raise CheckpointError(
            f"{file.path} holds {name}, which lfm2_fast does not run; it runs the dense text "
            "models (architecture 'lfm2'). Use llama.cpp for this file"
        )


def _kv_heads(file: GGUFFile, key: Any) -> list[int]:
    """Return the number of key-value heads of each layer, 0 for convolutions."""
    heads, layers = key("attention.head_count_kv"), key("block_count")
    # The metadata may claim any number, and the list has that length.
    if type(layers) is not int or not 0 < layers <= len(file.tensors):
        raise CheckpointError(
            f"{file.path}: {ARCHITECTURE}.block_count is {layers!r}, and the file has "
            f"{len(file.tensors)} tensors; {FETCH_AGAIN}"
        )
    heads = heads if isinstance(heads, list) else [heads] * layers
    if any(type(count) is not int for count in heads) or len(set(heads) - {0}) != 1:
        raise CheckpointError(
            f"{file.path}: {ARCHITECTURE}.attention.head_count_kv is {str(heads)[:200]}; one "
            "number of heads for all attention layers, and 0 for convolutions, is supported"
        )
    return heads


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
