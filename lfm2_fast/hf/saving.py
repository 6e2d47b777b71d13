"""Network written as a checkpoint that Hugging Face loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.weights import checkpoint
from lfm2_fast.weights.adapter import holds_adapter
from lfm2_fast.weights.fusion import unfused


def save(
    folder: Path,
    network: Lfm2,
    settings: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor] | None,
    *,
    variant: str | None,
    max_shard_size: int | str,
) -> None:
    """Write a checkpoint whose config has ``settings`` beside the network's sizes.

    ``state_dict`` replaces the weights, by Hugging Face's names. Raises ValueError for a name that
    the network does not have, and for a folder that holds an adapter.
    """
    if holds_adapter(folder):
        raise ValueError(
            f"{folder} holds an adapter, which would be added to these weights when the folder is "
            "loaded: save into another folder"
        )
    config = network.config
    named = unfused(config, network.state_dict())
    if state_dict is not None:
        unknown = sorted(set(state_dict) - set(named) - {"lm_head.weight"})
        if unknown:
            raise ValueError(f"state_dict has {unknown[0]!r}, which this model does not have")
        named = {name: state_dict.get(name, tensor) for name, tensor in named.items()}
    checkpoint.save(
        folder,
        {**config.to_dict(), **settings},
        named,
        format=config.quantization,
        dtype=network.dtype,
        generation_config=dict(generation_config),
        variant=variant,
        max_shard_size=max_shard_size,
    )
