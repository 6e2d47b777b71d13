"""Results of ``forward``, with access by name, key or index, as Hugging Face's outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from lfm2_fast.cache.kv_cache import Cache


@dataclass(eq=False)
class ModelOutput(Mapping[Any, Any]):
    """Mapping of the fields that are not None, which are also its tuple, in order."""

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are not None, in order."""
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


@dataclass(eq=False)
class BaseModelOutput(ModelOutput):
    """``last_hidden_state [B, T, H]`` after the last norm, and every layer's if wanted.

    ``hidden_states`` has the embedding first, then each layer's output ``[B, T, H]``; the last of
    them is ``last_hidden_state``.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: None = None


@dataclass(eq=False)
class CausalLMOutput(ModelOutput):
    """``logits [B, T, V]``, with the ``loss`` if there were labels."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: None = None
