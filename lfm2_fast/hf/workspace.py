"""Workspace: caches, step buffers and graphs that stay between calls of ``generate``."""

from __future__ import annotations

from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.engine.decode import Chooser
from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.model_runner import new_cache
from lfm2_fast.engine.step_buffers import StepBuffers
from lfm2_fast.hf.transformers_weights import fused_weights
from lfm2_fast.models.lfm2 import Lfm2


class Workspace:
    """Step buffers of each cache while the cache exists, and one unused cache.

    Capturing a step takes longer than running it, so graphs are kept between calls. Those of a
    caller's cache exist as long as that cache. A call without a cache takes the cache of the last
    call without one. A copy of a workspace is empty, because graphs point at the tensors of one
    model.
    """

    def __init__(self) -> None:
        self._buffers: WeakKeyDictionary[Cache, StepBuffers] = WeakKeyDictionary()
        self._idle: list[Cache] = []
        # Transformers' model that drafted last, and the network that was made of it.
        self._assistant: tuple[Any, Lfm2] | None = None

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()

    def buffers(self, model: Lfm2, cache: Cache) -> StepBuffers:
        """Return the step buffers of a cache, made again if the operations have changed."""
        found = self._buffers.get(cache)
        if found is None or found.made_for != (model.ops, model.drafter):
            found = self._buffers[cache] = StepBuffers(model, cache)
        return found

    def engine(
        self,
        model: Lfm2,
        cache: Cache,
        *,
        chunk: int | None = None,
        chooser: Chooser | None = None,
        assistant: Lfm2 | None = None,
    ) -> Engine:
        """Return an engine on a cache, with the cache's step buffers."""
        return Engine(
            model,
            cache=cache,
            buffers=self.buffers(model, cache),
            chunk=chunk,
            chooser=chooser,
            assistant=assistant,
        )

    def assistant(self, model: Any) -> Lfm2:
        """Return the network of an assistant: of a model of ours, or made of transformers'.

        It is made once for a sequence of calls. Raises TypeError for other objects, and the
        exceptions of ``from_transformers``.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(
                "assistant_model must be a model of load() or of transformers, not "
                f"{type(model).__name__}"
            )
        network = getattr(model, "network", None)
        if isinstance(network, Lfm2):
            return network
        if self._assistant is None or self._assistant[0] is not model:
            config, weights = fused_weights(model)
            self._assistant = (model, Lfm2(config.to_internal(), weights))
        return self._assistant[1]

    def nbytes(self, cache: Cache) -> int:
        """Return the bytes of a cache's step buffers, 0 if there are none."""
        found = self._buffers.get(cache)
        return 0 if found is None else found.nbytes

    def take(self, model: Lfm2, slots: int, max_length: int, *, drafter: bool = True) -> Cache:
        """Return an empty cache: the kept one if it fits, else a new one.

        ``drafter`` is that of ``new_cache``.
        """
        with suppress(IndexError):
            # Only one thread gets it. Another one at the same time makes a new cache.
            cache = self._idle.pop()
            if (cache.slots, cache.max_length) == (slots, max_length):
                return cache
        return new_cache(model, slots, max_length, drafter=drafter)

    def give_back(self, model: Lfm2, cache: Cache) -> None:
        """Keep a cache for the next call, if that saves captures."""
        if model.ops.captures:
            cache.reset()
            self._idle = [cache]

    def __len__(self) -> int:
        """Return how many caches it holds itself."""
        return len(self._idle)
