"""The part of Hugging Face's model classes that all of them share: weights, config and caches."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.config import Config
from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.ops.base import Ops
from lfm2_fast.weights import checkpoint
from lfm2_fast.weights.fusion import fusion_table, num_parameters


class Lfm2PreTrainedModel(nn.Module):
    """An LFM2 checkpoint, ready to run: ``model`` is the network.

    ``weights`` are the fused tensors that ``checkpoint.load_weights`` returns; they are taken over,
    not copied. ``backend`` is one of ``ops.select.BACKENDS``. ``max_length`` bounds the context
    that a cache of this model may grow to (default: the model's own limit).
    """

    def __init__(
        self,
        config: Config,
        weights: dict[str, torch.Tensor],
        *,
        backend: str = "auto",
        max_length: int | None = None,
        generation_config: dict[str, Any] | None = None,
        name_or_path: str = "",
    ) -> None:
        super().__init__()
        self.config = config
        self._generation: Any = generation_config or {}
        self.name_or_path = name_or_path
        limit = config.max_position_embeddings
        self.max_length = min(max_length or limit, limit)
        self.model = Lfm2(config, weights, backend=backend)
        self.eval()
        # Caches that wait for the next call, with the graphs captured on them.
        self._idle: list[Cache] = []

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> Lfm2PreTrainedModel:
        super()._apply(fn, recurse)
        # Captured graphs point at the weights as they were.
        self._idle = []
        return self

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations and of the cache; quantized weights have their own."""
        return self.model.dtype

    @property
    def ops(self) -> Ops:
        """The operations that the network runs on."""
        return self.model.ops

    @property
    def generation_config(self) -> Any:
        """The checkpoint's generation parameters, as transformers' GenerationConfig."""
        if isinstance(self._generation, dict):
            from transformers import GenerationConfig

            self._generation = GenerationConfig.from_dict(self._generation)
        return self._generation

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self._generation = {} if value is None else value

    def generation_defaults(self) -> dict[str, Any]:
        """Return the generation parameters as a mapping, without a need for transformers."""
        found = self._generation
        return found if isinstance(found, dict) else found.to_dict()

    def num_parameters(self) -> int:
        """Return the number of parameters, a tied head counted once."""
        return num_parameters(self.config)

    def new_cache(self, slots: int, max_length: int | None = None, *, spare: int = 1) -> Cache:
        """Return an empty cache for ``slots`` sequences of at most ``max_length`` tokens each.

        ``spare`` is how many tokens ``rollback`` must be able to take back. Where steps are
        captured, the cache has two things more: a dummy slot, if sequences run together, and a
        conv row for the step that is under way when a text ends.
        """
        captures = self.ops.captures
        return Cache(
            self.config,
            slots,
            min(max_length or self.max_length, self.max_length),
            device=self.device,
            dtype=self.dtype,
            spare=spare + captures,
            dummy_slot=captures and slots > 1,
        )

    def borrow_cache(self, slots: int) -> Cache:
        """Return a cache for one call: the one that was given back, if it fits, else a new one."""
        with suppress(IndexError):
            # One thread gets it; another that comes at once finds none.
            cache = self._idle.pop()
            if cache.slots == slots and cache.max_length == self.max_length:
                return cache
        return self.new_cache(slots)

    def give_back(self, cache: Cache) -> None:
        """Keep a borrowed cache for the next call, where that saves capturing steps anew."""
        if self.ops.captures:
            cache.reset()
            self._idle = [cache]

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write a checkpoint that Hugging Face loads, equal tensor for tensor."""
        state = self.model.state_dict()
        checkpoint.save(
            Path(save_directory),
            self.config,
            {name: state[name] for name in fusion_table(self.config)},
            generation_config=self.generation_defaults(),
        )
