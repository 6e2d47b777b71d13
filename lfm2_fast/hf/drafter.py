"""Drafter of a model: loaded and unloaded."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from lfm2_fast.models.dspark import DSpark
from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.weights.adapter_hub import OPTIONS
from lfm2_fast.weights.drafter import DrafterConfig, find_drafter, load_weights


class DrafterMethods(nn.Module):
    """Methods of a model whose ``network`` may have a DSpark drafter."""

    network: Lfm2

    def load_drafter(self, path: str | os.PathLike[str], **hub_options: Any) -> None:
        """Let new engines and calls draft with the DSpark drafter in the folder or hub id ``path``.

        Drafts change no text. The drafter's matrices are in the model's format. Engines that exist
        already go on without it, until they are reset or asleep. ``hub_options`` are those of
        ``load`` that say where on the hub it is. Raises ValueError for a model on a GPU, TypeError
        for another option, and CheckpointError, naming the field or tensor, for a drafter of
        another model or kind.
        """
        if unknown := sorted(hub_options.keys() - set(OPTIONS)):
            raise TypeError(
                f"load_drafter() takes no {unknown[0]}=; it takes path, and of the hub "
                + ", ".join(OPTIONS)
            )
        network = self.network
        if network.ops.captures:
            raise ValueError(
                f"load_drafter() needs the backends eager or native: {network.ops.name} on "
                f"{network.device} does not run drafters yet; load the model with device='cpu'"
            )
        folder = find_drafter(path, **hub_options)
        config = DrafterConfig.from_file(folder / "config.json")
        config.check(network.config, folder / "config.json")
        like = network.embedding_norm.weight
        weights = load_weights(folder, config, network.config, like=like)
        network.attach_drafter(DSpark(config, weights, network))

    def unload_drafter(self) -> None:
        """Forget the drafter, if there is one. Engines that have it draft no more with it."""
        self.network.attach_drafter(None)
