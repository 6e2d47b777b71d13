"""Prompts of a call of ``generate``: from all their forms to padded rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.hf.forward import check_embeds, checked_ids
from lfm2_fast.hf.generation_args import GenerationArgs
from lfm2_fast.hf.packing import check_cache, text_before, unpadded
from lfm2_fast.hf.pretrained import Lfm2PreTrainedModel


@dataclass
class Prompts:
    """Padded rows of a call.

    An answer begins with ``ids [B, W]``. ``mask [B, T]`` bool is true at tokens. They are those of
    the ids or, if given, of ``embeds [B, T, H]`` on the model's device, which run instead. Ids and
    mask are on the host, so that checks of them take no launches. ``before`` has the tokens of each
    row that are in the cache already. ``device`` is the caller's, None if the prompts had none.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    embeds: torch.Tensor | None
    before: list[list[int]]
    device: torch.device | None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def width(self) -> int:
        """Number of columns that ``max_length`` counts: ids, and embeddings beside them."""
        given, shown = self.mask.shape[1], self.ids.shape[1]
        return shown if given == shown else given + shown

    def tokens(self) -> list[list[int]]:
        """Return the tokens of each row, without padding; 0 stands for each embedding."""
        if self.embeds is not None:
            return [[0] * count for count in self.mask.sum(-1).tolist()]
        own = [row[kept].tolist() for row, kept in zip(self.ids, self.mask, strict=True)]
        return [held + new for held, new in zip(self.before, own, strict=True)]


def read_ids(
    model: Lfm2PreTrainedModel, inputs: Any, attention_mask: Any, kwargs: dict[str, Any]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.device | None]:
    """Return ids ``[B, T]``, mask and the caller's device, each None if it was not given."""
    if "input_ids" in kwargs:
        if inputs is not None:
            raise ValueError("give the prompts as inputs or as input_ids, not both")
        inputs = kwargs.pop("input_ids")
    if isinstance(inputs, Mapping) or hasattr(inputs, "input_ids"):
        if attention_mask is None:
            attention_mask = inputs.get("attention_mask")
        inputs = inputs["input_ids"]
    mask = attention_mask
    if isinstance(mask, Sequence):
        rows = mask if mask and isinstance(mask[0], Sequence) else [mask]
        mask = _left_padded(rows, 0)[0]
    if mask is not None and mask.dim() == 1:
        mask = mask[None]
    if inputs is None:
        return None, mask, None
    if isinstance(inputs, torch.Tensor):
        ids = inputs
    elif isinstance(inputs, str | bytes) or not isinstance(inputs, Sequence):
        raise _no_ids(inputs, "")
    elif inputs and isinstance(inputs[0], str | bytes | Mapping | torch.Tensor):
        raise _no_ids(inputs[0], "a list of ")
    elif inputs and isinstance(inputs[0], Sequence):
        ids, left = _left_padded(inputs, model.config.pad_token_id or 0)
        mask = left if mask is None else mask
    else:
        ids = torch.tensor([list(inputs)], dtype=torch.int64)
    if ids.dim() == 1:
        ids = ids[None]
    return ids, mask, inputs.device if isinstance(inputs, torch.Tensor) else None


def gather_prompts(
    model: Lfm2PreTrainedModel,
    asked: GenerationArgs,
    ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    device: torch.device | None,
    embeds: torch.Tensor | None,
    cache: Cache | None,
    tokenizer: Any,
) -> Prompts:
    """Return the checked prompts of a call. Without ids and embeddings they are the bos token.

    Raises ValueError, which names the argument, for values out of range or inputs that do not fit
    together.
    """
    if embeds is not None:
        if asked.token_healing:
            raise ValueError("token_healing cannot replace ids beside inputs_embeds: leave it out")
        return _embedded(model, ids, mask, embeds, cache)
    if ids is None:
        if asked.bos_token_id is None:
            raise ValueError("generate() needs input_ids: the checkpoint names no bos_token_id")
        ids, mask = torch.tensor([[asked.bos_token_id]]), None
    ids = checked_ids(model, ids.cpu()).long()
    if asked.token_healing:
        ids, mask = _healed(model, ids, mask, tokenizer)
    before: list[list[int]] = [[] for _ in ids]
    if mask is None:
        mask = _inferred_mask(ids, asked)
    else:
        whole, mask = mask, unpadded(ids, mask.to(ids.device), holes=True)
        if cache is not None:
            check_cache(model, cache, len(ids) * asked.copies)
            before = text_before(cache, ids.shape[1], whole, asked.copies)
    return _without_empty(Prompts(ids, mask, None, before, device), "input_ids")


def _embedded(
    model: Lfm2PreTrainedModel,
    ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    embeds: torch.Tensor,
    cache: Cache | None,
) -> Prompts:
    embeds, device = check_embeds(model, embeds), embeds.device
    if ids is None:
        ids = torch.zeros(len(embeds), 0, dtype=torch.int64)
    ids = checked_ids(model, ids.cpu()).long()
    if len(ids) != len(embeds):
        raise ValueError(f"inputs_embeds has {len(embeds)} rows, input_ids {len(ids)}")
    if isinstance(cache, Cache) and any(cache.lengths):
        raise ValueError(
            "past_key_values must be empty beside inputs_embeds: embeddings have no ids by which "
            "to find what they share; give input_ids, or an empty cache"
        )
    # The numbers of embeddings do not matter to a mask, only their places.
    places = torch.empty(embeds.shape[:2])
    mask = unpadded(places, mask, holes=True)
    rows: list[list[int]] = [[] for _ in ids]
    return _without_empty(Prompts(ids, mask, embeds, rows, device), "inputs_embeds")


def _without_empty(prompts: Prompts, name: str) -> Prompts:
    """Return the prompts. Raises ValueError for a row without tokens."""
    empty = (~prompts.mask.any(-1)).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(f"{name} row {empty[0]} has no tokens; every row needs one at least")
    return prompts


def _healed(
    model: Any, ids: torch.Tensor, mask: torch.Tensor | None, tokenizer: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return ids with their last tokens replaced by longer ones if possible, by transformers'
    method.

    It makes the ids from text again. A mask that no longer fits them is dropped.
    """
    if tokenizer is None:
        raise ValueError("token_healing needs the tokenizer: pass tokenizer=...")
    from transformers import GenerationMixin

    healed = GenerationMixin.heal_tokens(model, ids, tokenizer)
    return healed, mask if mask is not None and mask.shape == healed.shape else None


def _no_ids(found: Any, many: str) -> ValueError:
    """Return the error for prompts that are no token ids: text, messages, several tensors."""
    remedy = "use the checkpoint's tokenizer to make them from text"
    if isinstance(found, Mapping):
        remedy = "use the tokenizer's apply_chat_template to make them from messages"
    elif isinstance(found, torch.Tensor):
        remedy = "stack tensors of one length, or pass their tolist()"
    kind = type(found).__name__
    return ValueError(
        f"input_ids must be token ids (a tensor, or lists), got {many}{kind}; {remedy}"
    )


def _left_padded(
    rows: Sequence[Sequence[int]], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        if row:
            ids[i, -len(row) :] = torch.tensor(list(row), dtype=torch.int64)
            mask[i, -len(row) :] = 1
    return ids, mask


def _inferred_mask(ids: torch.Tensor, asked: GenerationArgs) -> torch.Tensor:
    """Infer a mask as Hugging Face does: the pad token is padding unless it is an end token."""
    if not asked.pad_is_named or asked.pad_token_id in asked.eos_token_id:
        return unpadded(ids, None)
    try:
        return unpadded(ids, ids != asked.pad_token_id)
    except ValueError as error:
        raise ValueError(
            f"{error}; it was taken for a mask that pad_token_id={asked.pad_token_id} is padding "
            "wherever it stands: pass attention_mask"
        ) from None
