"""Checkpoints of DSpark drafters: their config, and their tensors as ours.

The layout is that of LiquidAI's ``Lfm2DSparkDraftModel`` checkpoints, as SGLang reads them
(``sglang/srt/models/dspark.py`` and ``dflash.py``). A drafter has neither embedding nor head: it
uses its target's. Its blocks are attention blocks like LFM2's, under Qwen3's names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lfm2_fast.config import Config
from lfm2_fast.config_values import CheckpointError, Reader, read_json
from lfm2_fast.weights.formats import INT8, MIXED, Format, find_format
from lfm2_fast.weights.hub_files import Repository, folder_or_repository
from lfm2_fast.weights.safetensors_files import INDEX, Stored, open_tensors

ARCHITECTURE = "Lfm2DSparkDraftModel"
WHOLE = "model.safetensors"
# Tensors of a drafter that are not used: the target's own embedding and head are, and measured
# acceptance takes the place of the confidence head.
UNUSED = ("confidence_head.", "embed_tokens.", "lm_head.", "rotary_emb.")
# Values that fields may have: others would change the result and are not supported.
FIXED = {
    "hidden_act": "silu",
    "markov_head_type": "vanilla",
    "attention_bias": False,
    "is_causal": False,
    "use_sliding_window": False,
    "rope_scaling": None,
    "quantization_config": None,
    "speculators_model_type": None,
}


@dataclass(frozen=True)
class DrafterConfig:
    """Sizes and settings of a drafter.

    ``blocks`` has those of its attention blocks. It reads the streams after the layers
    ``target_layers`` of a target with ``target_depth`` layers. A block of ``block_size`` tokens
    begins with the last known token, and has ``mask_token`` in the other places. ``rank`` is that
    of the Markov head. ``interleaved`` says that RoPE rotates neighbours, not halves.
    """

    blocks: Config
    target_layers: tuple[int, ...]
    target_depth: int
    block_size: int
    mask_token: int
    rank: int
    interleaved: bool

    @classmethod
    def from_file(cls, path: Path) -> DrafterConfig:
        """Read a drafter's config.json. Raises CheckpointError, which names the field."""
        raw = read_json(path)
        if ARCHITECTURE not in (raw.get("architectures") or ()):
            raise CheckpointError(
                f"{path}: architectures must have {ARCHITECTURE!r}, not "
                f"{raw.get('architectures')!r}: it is not a DSpark drafter of LFM2"
            )
        inner = raw.get("dflash_config")
        read = Reader({**raw, **(inner if isinstance(inner, dict) else {})}, str(path))
        for name, value in FIXED.items():
            if read.value(name, default=value) != value:
                raise read.error(f"{name}={read.value(name)!r} is not supported, only {value!r}")
        depth = read.count("num_hidden_layers")
        kinds = read.items("layer_types")
        if kinds is not None and kinds != ["full_attention"] * depth:
            raise read.error(f"layer_types must be 'full_attention' {depth} times, not {kinds!r}")
        rope = read.value("rope_parameters", default={})
        if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
            raise read.error(
                f"rope_parameters={rope!r} is not supported, only RoPE without scaling"
            )
        theta = rope.get("rope_theta")
        heads, hidden = read.count("num_attention_heads"), read.count("hidden_size")
        layers = read.items("target_layer_ids") or []
        target_depth = read.count("num_target_layers")
        # The last layer runs only for a prompt's last token, as without a drafter.
        if not layers or layers != [n for n in range(target_depth - 1) if n in layers]:
            raise read.error(
                f"target_layer_ids must be layers of the {target_depth} that num_target_layers "
                f"says, in order and without the last one, not {layers!r}"
            )
        mask, vocab_size = read.token("mask_token_id"), read.count("vocab_size")
        if mask is None or not 0 <= mask < vocab_size:
            raise read.error(f"mask_token_id must be one of {vocab_size} tokens, not {mask!r}")
        blocks = Config(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=read.count("intermediate_size"),
            num_attention_heads=heads,
            num_key_value_heads=read.count("num_key_value_heads"),
            head_dim=read.count("head_dim", default=hidden // heads),
            layer_types=("full_attention",) * depth,
            max_position_embeddings=read.count("max_position_embeddings"),
            norm_eps=read.number("rms_norm_eps"),
            rope_theta=theta or read.number("rope_theta"),
            conv_L_cache=1,
            conv_bias=False,
            tie_word_embeddings=True,
        )
        return cls(
            blocks=blocks,
            target_layers=tuple(layers),
            target_depth=target_depth,
            block_size=read.count("block_size"),
            mask_token=mask,
            rank=read.count("markov_rank"),
            interleaved=not read.flag("rope_is_neox_style", default=True),
        )

    def check(self, target: Config, path: Path) -> None:
        """Raise CheckpointError for a drafter that was made for another model than ``target``."""
        own, read = self.blocks, Reader({}, str(path))
        for name, ours, theirs in (
            ("vocab_size", own.vocab_size, target.vocab_size),
            ("hidden_size", own.hidden_size, target.hidden_size),
            ("num_target_layers", self.target_depth, target.num_hidden_layers),
        ):
            if ours != theirs:
                raise read.error(
                    f"{name}={ours} is that of another model: the loaded one has {theirs}; give "
                    "the drafter of this model"
                )
        pages = own.num_key_value_heads, own.head_dim
        if pages != (target.num_key_value_heads, target.head_dim):
            raise read.error(
                f"{pages[0]} key-value heads of {pages[1]} do not fit into the model's pages, of "
                f"{target.num_key_value_heads} heads of {target.head_dim}"
            )


@dataclass(frozen=True)
class _Tensor:
    """One of our tensors: its parts in the file, stacked by rows; ``permuted`` is for RoPE."""

    name: str
    parts: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    permuted: tuple[str, ...] = ()


def _tensors(config: DrafterConfig) -> Iterator[_Tensor]:
    own, hidden = config.blocks, config.blocks.hidden_size
    inner, width = own.intermediate_size, own.head_dim
    heads, kv_heads = own.num_attention_heads * width, own.num_key_value_heads * width

    def one(ours: str, theirs: str, *shape: int, permuted: bool = False) -> _Tensor:
        return _Tensor(ours, (theirs,), (shape,), (theirs,) if permuted else ())

    yield one("fc.weight", "fc.weight", hidden, len(config.target_layers) * hidden)
    yield one("hidden_norm.weight", "hidden_norm.weight", hidden)
    yield one("norm.weight", "norm.weight", hidden)
    for name in ("markov_w1.weight", "markov_w2.weight"):
        yield one(name, f"markov_head.{name}", own.vocab_size, config.rank)
    for number in range(own.num_hidden_layers):
        at = f"layers.{number}."
        attention, mlp = f"{at}self_attn.", f"{at}mlp."
        yield one(f"{at}operator_norm.weight", f"{at}input_layernorm.weight", hidden)
        yield one(f"{at}ffn_norm.weight", f"{at}post_attention_layernorm.weight", hidden)
        q, k, v = (f"{attention}{each}_proj.weight" for each in "qkv")
        yield _Tensor(
            f"{attention}qkv_proj.weight",
            (q, k, v),
            ((heads, hidden), (kv_heads, hidden), (kv_heads, hidden)),
            (q, k),
        )
        yield one(f"{attention}out_proj.weight", f"{attention}o_proj.weight", hidden, heads)
        for each in "qk":
            theirs = f"{attention}{each}_norm.weight"
            yield one(f"{attention}{each}_layernorm.weight", theirs, width, permuted=True)
        gate_up = (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight")
        own_name = f"{at}feed_forward.gate_up_proj.weight"
        yield _Tensor(own_name, gate_up, ((inner, hidden), (inner, hidden)))
        down = f"{at}feed_forward.down_proj.weight"
        yield one(down, f"{mlp}down_proj.weight", hidden, inner)


def format_of(target: Config, columns: int) -> Format:
    """Return the format of a drafter's matrix ``[N, columns]``: the target's, or int8 beside it."""
    chosen = find_format(target.quantization)
    if chosen is MIXED or not chosen.from_dense:
        chosen = INT8
    return chosen.of_matrix(columns, is_table=False)


def load_weights(
    folder: Path, config: DrafterConfig, target: Config, *, like: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return a drafter's tensors by our names, on the device and in the dtype of ``like``.

    Matrices are in the format of ``target``. Raises CheckpointError, which names the tensor, for
    one that is missing, unknown or of another shape.
    """
    found = open_tensors(folder, WHOLE, INDEX)
    weights: dict[str, torch.Tensor] = {}
    known: set[str] = set()
    for tensor in _tensors(config):
        rows = []
        for name, shape in zip(tensor.parts, tensor.shapes, strict=True):
            part = _stored(found, name, shape, folder).read().to(like.device, like.dtype)
            if config.interleaved and name in tensor.permuted:
                part = by_halves(part, config.blocks.head_dim)
            rows.append(part)
        known.update(tensor.parts)
        whole = torch.cat(rows)
        if whole.dim() == 1 or tensor.name == "markov_w1.weight":
            weights[tensor.name] = whole
            continue
        format = format_of(target, whole.shape[1])
        parts = {
            suffix: torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
            for suffix, (shape, dtype) in format.parts(tuple(whole.shape)).items()
        }
        format.fill(list(parts.values()), [(slice(None), whole)])
        format.interleave(list(parts.values()))
        weights.update({f"{tensor.name}{suffix}": part for suffix, part in parts.items()})
    unknown = sorted(n for n in found.keys() - known if not n.startswith(UNUSED))
    if unknown:
        raise CheckpointError(
            f"{folder} has {unknown[0]}, which no drafter of this kind uses: it may be of a newer "
            "version of lfm2_fast"
        )
    return weights


def _stored(found: dict[str, Stored], name: str, shape: tuple[int, ...], folder: Path) -> Stored:
    stored = found.get(name)
    if stored is None:
        raise CheckpointError(f"{folder} lacks {name}, of shape {list(shape)}")
    if stored.shape != shape:
        raise CheckpointError(
            f"{folder}: {name} has shape {list(stored.shape)}, and the config asks for "
            f"{list(shape)}"
        )
    return stored


def by_halves(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Return rows of heads of ``width`` in the order in which RoPE rotates halves.

    Rotating neighbours 2i and 2i + 1 is then rotating i and i + width / 2. Scores do not change,
    because queries and keys have the same order.
    """
    return rows.unflatten(0, (-1, width // 2, 2)).transpose(1, 2).flatten(0, 2)


def find_drafter(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Return the folder of a drafter, downloaded if ``name`` is a hub id.

    The options are those of ``hub.find_checkpoint``. Raises CheckpointError.
    """
    options = revision, cache_dir, token, local_files_only, force_download
    found = folder_or_repository(name, *options)
    if not isinstance(found, Repository):
        if not found.is_dir():
            text = os.fspath(name)
            raise CheckpointError(f"there is no folder {text!r}; give a drafter's folder or hub id")
        return found
    config = found.fetch("config.json", needed=True)
    if config is None:
        raise CheckpointError(
            f"{found.name} on the hub has no config.json; it is not a drafter: give another name"
        )
    DrafterConfig.from_file(config)  # before its weights follow
    found.at_commit_of(config, "config.json").fetch(WHOLE, needed=True)
    return config.parent
