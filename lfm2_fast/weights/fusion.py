"""Fusion table: our tensors, their parts among Hugging Face's tensors, and their formats.

Fused: q, k and v into ``qkv_proj``; gate (``w1``) and up (``w3``) into ``gate_up_proj``. This is
the only place that knows tensor names. Sizes and parameter counts come from it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from lfm2_fast.config import Config
from lfm2_fast.weights.formats import DENSE, MIXED, Format, find_format

logger = logging.getLogger(__name__)

# Prefix of Hugging Face's class with a head, before the names of the class inside.
BASE = "model."
EMBEDDING, NORM, HEAD = "embed_tokens.weight", "embedding_norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Part:
    """Hugging Face's tensor: its name and its shape there."""

    name: str
    shape: tuple[int, ...]

    @property
    def base_name(self) -> str:
        """Name in a checkpoint of ``Lfm2Model``, Hugging Face's class without a head."""
        return self.name.removeprefix(BASE)

    @property
    def rows(self) -> int:
        """Number of rows of this part in the fused tensor."""
        return self.shape[0]


@dataclass(frozen=True)
class Fused:
    """Our tensor: ``parts`` stacked along the first axis.

    ``shape`` is ours. ``dtype`` is that of the stored tensor, None for the model's dtype.
    ``is_matrix`` is True for the numbers of a projection or embedding, which are in ``format``.
    ``is_norm`` is True for the weight of an RMSNorm.
    """

    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    is_matrix: bool = False
    is_norm: bool = False
    format: Format = DENSE

    def split(self, whole: torch.Tensor) -> Iterator[tuple[Part, torch.Tensor]]:
        """Yield each part with its rows of ``whole``, in Hugging Face's shape."""
        rows = whole.split([part.rows for part in self.parts])
        for part, own in zip(self.parts, rows, strict=True):
            yield part, own.reshape(part.shape)


def fusion_table(config: Config) -> dict[str, Fused]:
    """Return our tensors by name, in the order of a checkpoint."""
    formats = dict(config.formats)
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads * size, config.num_key_value_heads * size
    table: dict[str, Fused] = {}

    def vector(name: str, length: int, *, is_norm: bool = False) -> None:
        part = Part(BASE + name, (length,))
        table[name] = Fused((part,), (length,), is_norm=is_norm)

    def matrix(name: str, columns: int, *stacked: tuple[str, int], base: str = BASE) -> None:
        parts = tuple(Part(base + theirs, (rows, columns)) for theirs, rows in stacked)
        table.update(_stored(name, parts, _format_of(config, formats, name, columns)))

    matrix(EMBEDDING, hidden, (EMBEDDING, config.vocab_size))
    for i, kind in enumerate(config.layer_types):
        at = f"layers.{i}."
        vector(at + "operator_norm.weight", hidden, is_norm=True)
        vector(at + "ffn_norm.weight", hidden, is_norm=True)
        if kind == "conv":
            at += "conv."
            matrix(at + "in_proj.weight", hidden, (at + "in_proj.weight", 3 * hidden))
            # Hugging Face keeps a depthwise kernel as [H, 1, W]; ours is [H, W].
            taps = Part(f"{BASE}{at}conv.weight", (hidden, 1, config.conv_L_cache))
            table[at + "conv.weight"] = Fused((taps,), (hidden, config.conv_L_cache))
            matrix(at + "out_proj.weight", hidden, (at + "out_proj.weight", hidden))
            if config.conv_bias:
                vector(at + "in_proj.bias", 3 * hidden)
                vector(at + "conv.bias", hidden)
                vector(at + "out_proj.bias", hidden)
        else:
            at += "self_attn."
            matrix(
                at + "qkv_proj.weight",
                hidden,
                (at + "q_proj.weight", heads),
                (at + "k_proj.weight", kv_heads),
                (at + "v_proj.weight", kv_heads),
            )
            matrix(at + "out_proj.weight", heads, (at + "out_proj.weight", hidden))
            vector(at + "q_layernorm.weight", size, is_norm=True)
            vector(at + "k_layernorm.weight", size, is_norm=True)
        at = f"layers.{i}.feed_forward."
        matrix(
            at + "gate_up_proj.weight", hidden, (at + "w1.weight", inner), (at + "w3.weight", inner)
        )
        matrix(at + "down_proj.weight", inner, (at + "w2.weight", hidden))
    vector(NORM, hidden, is_norm=True)
    if not config.tie_word_embeddings:
        matrix(HEAD, hidden, (HEAD, config.vocab_size), base="")
    return table


def _stored(name: str, parts: tuple[Part, ...], format: Format) -> dict[str, Fused]:
    """Return the tensors of a matrix, given as dense parts, in ``format``."""
    rows, columns = sum(part.rows for part in parts), parts[0].shape[1]
    made = {}
    for suffix, (shape, dtype) in format.parts((rows, columns)).items():
        own = tuple(Part(part.name + suffix, format.parts(part.shape)[suffix][0]) for part in parts)
        made[name + suffix] = Fused(own, shape, dtype, is_matrix=not suffix, format=format)
    return made


def _format_of(config: Config, formats: Mapping[str, str], name: str, columns: int) -> Format:
    """Return the format of the matrix ``name [N, columns]`` in a model of ``config``."""
    whole = find_format(config.quantization)
    if whole is MIXED:
        return find_format(formats.get(name))
    return whole.of_matrix(columns, is_table=name in (EMBEDDING, HEAD))


def formats_of(config: Config) -> dict[str, Format]:
    """Return the format of every matrix, by our name; a tied head has the embedding's."""
    table = fusion_table(config)
    found = {name: fused.format for name, fused in table.items() if fused.is_matrix}
    return {HEAD: found[EMBEDDING], **found}


def interleave(config: Config, weights: Mapping[str, torch.Tensor]) -> None:
    """Put every matrix of ``weights`` into the order that implementations read, in place."""
    for name, format in formats_of(config).items():
        if name in weights:
            format.interleave([weights[name + suffix] for suffix in format.suffixes])


def widen_for(device: torch.device, config: Config, weights: dict[str, torch.Tensor]) -> Config:
    """Make matrices dense if ``device`` has no code for them, in place; return the new config.

    A note says so. They become the model's dtype one by one, which keeps the peak of memory low.
    """
    formats = formats_of(config)
    narrow = [name for name, format in formats.items() if not format.on_gpu and name in weights]
    if device.type == "cpu" or not narrow:
        return config
    for name in narrow:
        parts = [weights.pop(name + suffix) for suffix in formats[name].suffixes]
        weights[name] = formats[name].matrix(parts, weights[NORM].dtype)
    logger.warning(
        "%s has no code for %s yet: %d matrices are held in %s there, with the same values",
        device,
        ", ".join(sorted({str(formats[name].name) for name in narrow})),
        len(narrow),
        weights[NORM].dtype,
    )
    kept = {name: format.name for name, format in formats.items() if format.on_gpu and format.name}
    if not kept:
        return replace(config, quantization=None, formats=())
    return replace(config, quantization=MIXED.name, formats=tuple(kept.items()))


def unfused(config: Config, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return our ``weights`` in the form of a checkpoint: its names, matrices row after row."""
    made = {}
    rows: dict[str, torch.Tensor] = {}
    for name, fused in fusion_table(config).items():
        if fused.is_matrix:
            names = [name + suffix for suffix in fused.format.suffixes]
            parts = fused.format.stored([weights[each] for each in names])
            rows = dict(zip(names, parts, strict=True))
        for part, own in fused.split(rows.get(name, weights[name])):
            made[part.name] = own
    return made


def tie(config: Config, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``weights`` with the embedding's tensors as the head, if they are tied."""
    if not config.tie_word_embeddings:
        return weights
    suffixes = formats_of(config)[EMBEDDING].suffixes
    heads = {HEAD + suffix: weights[EMBEDDING + suffix] for suffix in suffixes}
    return {**weights, **heads}


def random_weights(
    config: Config,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    """Return new weights by our names: norms 1, biases 0, the others normal as in the config.

    Drawn from ``generator``, or torch's own. ``config`` must be dense.
    """
    made = {}
    for name, fused in fusion_table(config).items():
        tensor = torch.empty(fused.shape, dtype=dtype, device=device)
        if name.endswith(".bias"):
            tensor.zero_()
        elif fused.is_norm:
            tensor.fill_(1)
        else:
            tensor.normal_(std=config.initializer_range, generator=generator)
        made[name] = tensor
    return made


def dtype_tensor(table: Mapping[str, Fused]) -> str:
    """Return the name of the tensor whose dtype is the model's: the embedding, else a norm."""
    return EMBEDDING if table[EMBEDDING].dtype is None else NORM


def num_parameters(config: Config) -> int:
    """Return the number of parameters of the dense model, a tied head counted once."""
    table = fusion_table(replace(config, quantization=None, formats=()))
    return sum(math.prod(fused.shape) for fused in table.values())


def checkpoint_bytes(config: Config, dtype: torch.dtype) -> int:
    """Return the bytes of all tensors. Those without their own dtype are in ``dtype``."""
    return sum(
        (fused.dtype or dtype).itemsize * math.prod(fused.shape)
        for fused in fusion_table(config).values()
    )
