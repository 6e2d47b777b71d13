"""Adapters beside a model's weights: loaded, chosen and unloaded by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from lfm2_fast.hf.adapter_lookup import adapter_options
from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.weights.adapter_hub import ADAPTER_OPTIONS, find_adapter


class AdapterMethods(nn.Module):
    """Methods of a model whose ``network`` may have LoRA adapters beside its weights."""

    network: Lfm2

    def load_adapter(
        self,
        path: str | os.PathLike[str],
        name: str = "default",
        *,
        adapter_kwargs: Mapping[str, Any] | None = None,
        **hub_options: Any,
    ) -> None:
        """Load the adapter in the folder or hub id ``path`` as ``name``, and make it active.

        ``hub_options`` are those of ``load`` that say where on the hub it is, ``subfolder`` also
        where in a folder. ``adapter_kwargs`` is Hugging Face's mapping of them, and replaces them.
        Raises ValueError for a name that is taken, TypeError for another option, and
        CheckpointError, naming the tensor or the field, for what cannot be applied.
        """
        if unknown := sorted(hub_options.keys() - set(ADAPTER_OPTIONS)):
            raise TypeError(
                f"load_adapter() takes no {unknown[0]}=; it takes path, name, and of the hub "
                + ", ".join(ADAPTER_OPTIONS)
            )
        folder = find_adapter(path, **{**hub_options, **adapter_options(adapter_kwargs)})
        network = self.network
        made = network.adapters.load(folder, name, network.embedding_norm.weight)
        network.adapters.active = made

    def set_adapter(self, name: str | None) -> None:
        """Let forward passes and requests that name no adapter run with ``name``, None for none.

        What a cache holds already stays as it is. Raises ValueError for a name that is not loaded,
        and TypeError for several.
        """
        if name is not None and not isinstance(name, str):
            raise TypeError(
                f"set_adapter() takes one name or None, not {name!r}; rows of an engine "
                "may have different adapters, each one"
            )
        adapters = self.network.adapters
        adapters.active = None if name is None else adapters.find(name)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Requests that run with it end with it.

        Raises ValueError for a name that is not loaded.
        """
        self.network.adapters.unload(name)

    def adapters(self) -> list[str]:
        """Return the names of the loaded adapters, in the order in which they were loaded."""
        return self.network.adapters.names

    @property
    def active_adapter(self) -> str | None:
        """Name of the active adapter, or None."""
        active = self.network.adapters.active
        return None if active is None else active.name

    def named_modules(self, *args: Any, **options: Any) -> Any:
        """Return the modules with their names, as torch does.

        Raises TypeError for PEFT, which asks for them before it changes a model. It would find
        fused matrices, or none of the names that an adapter has.
        """
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] == "peft":
            raise TypeError(
                "PEFT cannot change this model, whose matrices are fused: call "
                "model.load_adapter(folder_or_hub_id, name) for an adapter that PEFT saved; train "
                "with transformers' class"
            )
        return super().named_modules(*args, **options)
