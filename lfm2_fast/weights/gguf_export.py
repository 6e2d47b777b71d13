"""Checkpoint of safetensors as a GGUF file, which llama.cpp's programs run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lfm2_fast.config import Config
from lfm2_fast.config_values import CheckpointError, read_json
from lfm2_fast.weights.checkpoint import GENERATION_CONFIG, complete, progress, with_stored_head
from lfm2_fast.weights.fusion import EMBEDDING, HEAD, fusion_table
from lfm2_fast.weights.gguf_checkpoint import gguf_names
from lfm2_fast.weights.gguf_config import ARCHITECTURE, FLOATS, SAMPLING
from lfm2_fast.weights.gguf_file import require_gguf
from lfm2_fast.weights.gguf_vocabulary import ELSEWHERE, Vocabulary
from lfm2_fast.weights.safetensors_files import BLOCK, Stored, checked_tensors

# Types of matrices that the package gguf can make; the name of a file's type has MOSTLY_ before it.
TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def export_gguf(
    folder: Path,
    path: Path,
    type: str,
    *,
    variant: str | None = None,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Write the checkpoint in ``folder`` as a GGUF file, its matrices in ``type`` of ``TYPES``.

    Below 8 bits, embedding and head are Q8_0. Matrices whose rows are not whole groups are F16.
    Vectors and taps are F32. Tokenizer, chat template, end tokens and sampling are included;
    ``vocabulary`` replaces the folder's. One tensor at a time is in memory. Raises CheckpointError
    for a checkpoint that llama.cpp does not run, and ValueError if the package ``gguf`` is missing
    or ``type`` is unknown.
    """
    gguf = require_gguf()
    if type not in TYPES:
        raise ValueError(f"type={type!r} is not supported; use {', '.join(TYPES)}")
    config = Config.from_file(folder / "config.json")
    _check(folder, config)
    config = with_stored_head(folder, config, variant)
    table = fusion_table(config)
    found = checked_tensors(folder, config, table, variant)
    names = gguf_names(table, config.num_hidden_layers)
    vocabulary = vocabulary or Vocabulary.from_folder(folder, config.vocab_size)
    matrices = {part.name for fused in table.values() if fused.is_matrix for part in fused.parts}
    tables = {
        part.name for name in (EMBEDDING, HEAD) if name in table for part in table[name].parts
    }
    kinds = {
        name: _kind(type, found[name].shape, name in tables) if name in matrices else "F32"
        for name in names
    }
    with complete(path) as partial:
        writer = gguf.GGUFWriter(partial, ARCHITECTURE)
        try:
            file_type = "ALL_F32" if type == "f32" else f"MOSTLY_{type.upper()}"
            writer.add_file_type(gguf.LlamaFileType[file_type])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_name(folder.resolve().name)
            _add_config(writer, config)
            _add_generation(writer, folder, config)
            vocabulary.write(writer)
            for ours, theirs in names.items():
                kind = gguf.GGMLQuantizationType[kinds[ours]]
                shape = gguf.quant_shape_to_byte_shape(_shape(found[ours]), kind)
                writer.add_tensor_info(theirs, shape, _bytes_dtype(), math.prod(shape), kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with progress(names.items(), "writing weights") as tensors:
                for ours, _ in tensors:
                    writer.write_tensor_data(_numbers(found[ours], kinds[ours]))
        finally:
            writer.close()


def _check(folder: Path, config: Config) -> None:
    """Raise CheckpointError for a checkpoint that llama.cpp's GGUF files cannot express."""
    if config.quantization is not None:
        raise CheckpointError(
            f"{folder} is already quantized ({config.quantization}): export the unquantized "
            "checkpoint"
        )
    if config.conv_bias:
        raise CheckpointError(f"{folder} has conv_bias, which llama.cpp does not run")
    scaling = dict(config.rope_scaling).get("rope_type", "linear")
    if scaling != "linear":
        raise CheckpointError(f"{folder} has RoPE scaling of type {scaling!r}; {ELSEWHERE}")


def _kind(type: str, shape: tuple[int, ...], is_table: bool) -> str:
    """Return the type of one matrix in a file of ``type``."""
    if type.startswith("q") and shape[-1] % 32:
        return "F16"
    return "Q8_0" if is_table and type.startswith(("q4", "q5")) else type.upper()


def _add_config(writer: Any, config: Config) -> None:
    heads = config.num_key_value_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv([0 if kind == "conv" else heads for kind in config.layer_types])
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    scaling = dict(config.rope_scaling)
    if scaling:
        gguf = require_gguf()
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    writer.add_shortconv_l_cache(config.conv_L_cache)


def _add_generation(writer: Any, folder: Path, config: Config) -> None:
    """Add special tokens and the recommended sampling, if the checkpoint draws."""
    path = folder / GENERATION_CONFIG
    found = read_json(path) if path.is_file() else {}
    config = replace(config, **_ids(config, found))
    eos = config.eos_token_id
    ends = list(eos) if isinstance(eos, tuple) else [eos]
    adders = (writer.add_eos_token_id, writer.add_eot_token_id)
    if len(ends) > len(adders):
        raise CheckpointError(f"{folder} has {len(ends)} end tokens, and a GGUF file {len(adders)}")
    for add, token in (
        (writer.add_bos_token_id, config.bos_token_id),
        *zip(adders, ends, strict=False),
        (writer.add_pad_token_id, config.pad_token_id),
    ):
        if token is not None:
            add(token)
    if found.get("do_sample"):
        for theirs, name in SAMPLING.items():
            value = found.get(name)
            if isinstance(value, int | float):
                add = getattr(writer, f"add_sampling_{theirs}")
                add(int(value) if theirs == "top_k" else float(value))


def _ids(config: Config, found: dict[str, Any]) -> dict[str, Any]:
    """Return the special tokens of a generation config, checked as a config's are."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    given = {name: found[name] for name in names if found.get(name) is not None}
    checked = Config.from_dict({**config.to_dict(), **given}, GENERATION_CONFIG)
    return {name: getattr(checked, name) for name in names}


def _shape(stored: Stored) -> tuple[int, ...]:
    """Return GGUF's shape of a tensor: taps are ``[H, W]`` there."""
    return (stored.shape[0], *stored.shape[2:]) if len(stored.shape) == 3 else stored.shape


def _numbers(stored: Stored, kind: str) -> Any:
    """Return a tensor's bytes in ``kind``, converted some rows at a time."""
    import numpy

    gguf = require_gguf()
    shape = _shape(stored)
    made = numpy.empty(
        gguf.quant_shape_to_byte_shape(shape, gguf.GGMLQuantizationType[kind]), numpy.uint8
    )
    whole = [(slice(None), stored.read())]
    for here, each in stored.blocks(max(1, BLOCK // shape[-1])) if len(shape) > 1 else whole:
        rows = each.reshape(-1, *shape[1:])
        if kind in FLOATS:
            narrow = rows.to(FLOATS[kind]).contiguous()
            if not bool(narrow.isfinite().all()) and bool(rows.isfinite().all()):
                raise CheckpointError(
                    f"{stored.path}: {stored.name} has numbers that {kind} cannot hold; use bf16"
                )
            raw = narrow.view(torch.uint8).numpy()
        else:
            raw = gguf.quants.quantize(rows.float().numpy(), gguf.GGMLQuantizationType[kind])
        made[here] = raw
    return made


def _bytes_dtype() -> Any:
    import numpy

    return numpy.dtype(numpy.uint8)
