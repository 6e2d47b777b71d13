"""Hugging Face's forward call: padded ids and a mask in, logits of the wanted columns out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from lfm2_fast.cache.batch import host_by_default
from lfm2_fast.cache.kv_cache import Cache, signature
from lfm2_fast.engine.model_runner import run_batch
from lfm2_fast.hf.pretrained import Lfm2PreTrainedModel


@dataclass(eq=False)
class CausalLMOutput(Mapping[Any, Any]):
    """``logits [B, T, V]`` and the cache, by name, by key or by place, as Hugging Face's output.

    Its keys, like its tuple, are the fields that are not None; there is never a ``loss``.
    """

    loss: None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(self[name] for name in self)

    def __getitem__(self, key: int | slice | str) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in list(self):
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return (each.name for each in fields(self) if getattr(self, each.name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@torch.no_grad()
@host_by_default()
def forward(
    model: Lfm2PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    return_dict: bool = True,
) -> CausalLMOutput | tuple[Any, ...]:
    """Logits of ``input_ids [B, T]``, continuing ``past_key_values`` where given.

    ``attention_mask``, ``[B, T]`` or the longer one of a whole conversation whose last T
    columns count, marks padding on the left or the right with zeros; logits there are zeros.
    ``logits_to_keep`` keeps the last so many positions, or those of an index tensor; 0 keeps
    all. The answer is a CausalLMOutput, or its tuple. Raises ValueError for ids out of range,
    a mask with holes, or a cache of another batch size.
    """
    input_ids = check_ids(model, input_ids)
    count, width = input_ids.shape
    mask = unpadded(input_ids, attention_mask)
    cache = past_key_values
    if cache is None:
        cache = model.new_cache(count)
    check_cache(model, cache, count)
    counts = mask.sum(-1).tolist()
    batch = cache.next_batch(counts, range(count), model.device)
    tokens = input_ids[mask]

    if isinstance(logits_to_keep, int):
        columns = torch.arange(width, device=mask.device)[-logits_to_keep:]
    else:
        columns = logits_to_keep.to(mask.device)
    packed = mask.flatten().cumsum(0).view_as(mask) - 1
    shown = mask[:, columns]
    logits = run_batch(model.model, tokens, batch, cache, packed[:, columns][shown])
    cache.record_tokens(batch, (c.tolist() for c in tokens.cpu().split([n for n in counts if n])))

    if bool(shown.all()):
        full = logits.view(*shown.shape, model.config.vocab_size)
    else:
        full = logits.new_zeros(*shown.shape, model.config.vocab_size)
        full[shown] = logits
    kept = None if use_cache is False else cache
    answer = CausalLMOutput(logits=full, past_key_values=kept)
    return answer if return_dict else answer.to_tuple()


def check_ids(model: Lfm2PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """``input_ids`` on the model's device. Raises ValueError unless ``[B, T]`` and in range."""
    if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.is_complex():
        raise ValueError(
            "input_ids must be integers of shape [batch, tokens], got "
            f"{tuple(input_ids.shape)} of {input_ids.dtype}"
        )
    wrong = (input_ids < 0) | (input_ids >= model.config.vocab_size)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"input_ids[{row}, {column}] is {int(input_ids[row, column])}, but this model's "
            f"vocabulary has {model.config.vocab_size} tokens; is the tokenizer another model's?"
        )
    return input_ids.to(model.device, torch.int64)


def check_cache(model: Lfm2PreTrainedModel, cache: Cache, rows: int) -> None:
    """Raise TypeError unless a caller's cache is ours, ValueError unless it fits the model.

    It must have ``rows`` slots.
    """
    if not isinstance(cache, Cache):
        raise TypeError(
            f"past_key_values must be a cache of model.new_cache(), not {type(cache).__name__}"
        )
    if cache.slots != rows:
        raise ValueError(
            f"past_key_values holds {cache.slots} sequences, but {rows} rows are to be run"
        )
    if cache.signature != signature(model.config, model.dtype, model.device):
        raise ValueError(
            "past_key_values is of another model, dtype or device; make one with new_cache() of "
            "the model that is called, and anew when that was moved"
        )


def unpadded(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """``[B, T]`` bool, true at tokens; ValueError for a mask that does not fit or has holes."""
    count, width = input_ids.shape
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if (
        attention_mask.dim() != 2
        or attention_mask.shape[0] != count
        or attention_mask.shape[1] < width
    ):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {(count, width)}; "
            "it must have the same rows and at least as many columns"
        )
    mask = attention_mask[:, attention_mask.shape[1] - width :].to(input_ids.device) != 0
    edges = (mask[:, 1:] & ~mask[:, :-1]).sum(-1) + mask[:, :1].sum(-1)
    if (edges > 1).any():
        row = int((edges > 1).nonzero()[0])
        raise ValueError(
            f"attention_mask row {row} has zeros between tokens; padding may stand on the left or "
            "on the right of a row, not inside it"
        )
    return mask
