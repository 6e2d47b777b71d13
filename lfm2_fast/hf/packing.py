"""From Hugging Face's padded or packed inputs to packed tokens, and back.

A row ``[T]`` of ``[B, T]`` is one sequence with padding on its left or right. Without a mask and a
cache it may have several sequences end to end, as in transformers' flash attention. Restarting
``position_ids``, or ``cu_seq_lens_q``, mark their beginnings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lfm2_fast.cache.batch import Batch
from lfm2_fast.cache.kv_cache import Cache, signature
from lfm2_fast.hf.pretrained import Lfm2PreTrainedModel


@dataclass
class Packed:
    """Packed tokens of a call. ``mask [B, T]`` is true at columns with a token.

    ``cache`` holds the sequences of ``batch``. ``is_split`` is True if rows have several sequences,
    so that the cache cannot be used further.
    """

    mask: torch.Tensor
    batch: Batch
    cache: Cache
    is_split: bool

    def places(self, columns: torch.Tensor) -> torch.Tensor:
        """Return the packed indices of the tokens in these columns, row by row."""
        packed = self.mask.flatten().cumsum(0).view_as(self.mask) - 1
        return packed[:, columns][self.mask[:, columns]]

    def unpack(self, values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Return ``values [R, N]`` of the tokens in these columns as ``[B, C, N]``, padding 0."""
        shown = self.mask[:, columns]
        if bool(shown.all()):
            return values.view(*shown.shape, values.shape[-1])
        full = values.new_zeros(*shown.shape, values.shape[-1])
        full[shown] = values
        return full


def pack(
    model: Lfm2PreTrainedModel,
    like: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    cu_seq_lens: torch.Tensor | None,
) -> Packed:
    """Pack the tokens of ``like [B, T]`` for one forward pass.

    Raises ValueError, which names the argument, for a mask with holes, for other positions, and for
    a cache that does not fit.
    """
    mask = unpadded(like, attention_mask)
    rows, width = mask.shape
    starts = None
    if cu_seq_lens is not None:
        starts = _starts_of_lengths(cu_seq_lens, rows, width)
    elif position_ids is not None:
        position_ids = _checked_shape(position_ids, rows, width)
        if attention_mask is None and cache is None:
            starts = _restarts(position_ids)
    is_split = starts is not None and sum(map(len, starts)) > rows
    if is_split:
        assert starts is not None
        if attention_mask is not None and not bool(mask.all()) or cache is not None:
            raise ValueError(
                "packed rows (position_ids that restart, cu_seq_lens_q) take neither "
                "attention_mask nor past_key_values"
            )
        counts = [end - s for row in starts for s, end in _pairs(row, width)]
    else:
        counts = mask.sum(-1).tolist()
    held = cache
    if cache is None:
        held = cache = model.new_cache(len(counts))
    check_cache(model, cache, len(counts))
    batch = cache.next_batch(counts, range(len(counts)), model.device)
    if position_ids is not None and not is_split:
        _check_positions(position_ids, mask, cache.lengths)
    assert held is not None
    return Packed(mask, batch, cache, is_split)


def _pairs(starts: Sequence[int], width: int) -> list[tuple[int, int]]:
    return list(zip(starts, [*starts[1:], width], strict=True))


def _checked_shape(position_ids: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    found = position_ids[None] if position_ids.dim() == 1 else position_ids
    if found.dim() != 2 or found.shape[0] not in (1, rows) or found.shape[1] != width:
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}, the ids {(rows, width)}; it must "
            "have the same columns, and the same rows or one"
        )
    return found.cpu().expand(rows, width)


def _restarts(position_ids: torch.Tensor) -> list[list[int]] | None:
    """Return where sequences begin in each row, or None if a row is not made of 0, 1, 2, ..."""
    steps = position_ids[:, 1:] - position_ids[:, :-1]
    restarts = position_ids[:, 1:] == 0
    if position_ids.shape[1] == 0 or (position_ids[:, 0] != 0).any():
        return None
    if ((steps != 1) & ~restarts).any():
        return None
    return [[0, *(row.nonzero()[:, 0] + 1).tolist()] for row in restarts]


def _starts_of_lengths(cu_seq_lens: torch.Tensor, rows: int, width: int) -> list[list[int]]:
    bounds = cu_seq_lens.tolist()
    if rows != 1 or bounds[:1] != [0] or bounds[-1] != width or bounds != sorted(set(bounds)):
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to the {width} tokens of a single row, got {bounds} "
            f"for {rows} rows"
        )
    return [bounds[:-1]]


def _check_positions(position_ids: torch.Tensor, mask: torch.Tensor, held: Sequence[int]) -> None:
    """Raise ValueError unless tokens have consecutive positions from the end of the cache on.

    Rotary embedding and the convolution use only differences of positions. So Hugging Face's two
    ways, with left padding counted or not, give the same answer. Frequencies that depend on a
    context's length use its number of tokens.
    """
    mask = mask.cpu()
    for row, (positions, tokens) in enumerate(zip(position_ids, mask, strict=True)):
        found = positions[tokens]
        if not len(found):
            continue
        begins = {held[row], held[row] + int(tokens.nonzero()[0])}
        if int(found[0]) not in begins or (found[1:] - found[:-1] != 1).any():
            raise ValueError(
                f"position_ids row {row} is {found[:8].tolist()}...; lfm2_fast takes the positions "
                f"that attention_mask implies, which go on from {held[row]}: leave position_ids out"
            )


def check_cache(model: Lfm2PreTrainedModel, cache: Any, rows: int) -> None:
    """Raise TypeError unless a caller's cache is ours, ValueError unless it fits the model.

    It must have ``rows`` slots.
    """
    if not isinstance(cache, Cache):
        raise TypeError(
            f"past_key_values must be a cache of model.new_cache(), not {type(cache).__name__}: "
            f"give model.new_cache({rows}), which is filled in its place, or leave it out"
        )
    if cache.slots != rows:
        raise ValueError(
            f"past_key_values holds {cache.slots} sequences, but {rows} rows are to be run"
        )
    if cache.signature != signature(model.network.config, model.dtype, model.device):
        raise ValueError(
            "past_key_values is of another model, dtype or device; make a cache with new_cache() "
            "of the model that is called, and a new one after the model is moved"
        )


def text_before(
    cache: Cache, width: int, attention_mask: torch.Tensor, copies: int
) -> list[list[int]]:
    """Return the tokens that a filled cache holds before the ids of each row.

    They exist if the mask has more columns than the ids' ``width``: the ids are then only the new
    tokens. Row i is in slot ``i * copies``. Raises ValueError if the mask counts other tokens than
    the cache holds, or if the cache does not know its token ids.
    """
    found = []
    for row, mask in enumerate(attention_mask[:, : attention_mask.shape[1] - width]):
        slot, count = row * copies, int((mask != 0).sum())
        held = cache.lengths[slot]
        if count and count != held:
            raise ValueError(
                f"attention_mask row {row} has {count} tokens before those of input_ids, but "
                f"past_key_values holds {held}; pass the whole text as input_ids, of which only "
                "what the cache does not hold is run"
            )
        known = cache.history[slot][:count]
        if len(known) < count:
            raise ValueError(
                f"past_key_values does not know the ids of the {count} tokens before input_ids row "
                f"{row}: it was filled from inputs_embeds; pass the whole text as input_ids"
            )
        found.append(known)
    return found


def unpadded(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, *, holes: bool = False
) -> torch.Tensor:
    """Return a mask ``[B, T]`` bool that is true at tokens.

    Raises ValueError for a mask that does not fit and, unless ``holes`` are allowed, for one with
    zeros between tokens.
    """
    count, width = input_ids.shape[:2]
    if attention_mask is None:
        return torch.ones(count, width, dtype=torch.bool, device=input_ids.device)
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
    if not holes and (edges > 1).any():
        row = int((edges > 1).nonzero()[0])
        raise ValueError(
            f"attention_mask row {row} has zeros between tokens; padding may stand on the left or "
            "on the right of a row, not inside it"
        )
    return mask
