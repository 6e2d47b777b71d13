"""Network whose vocabulary has another size."""

from __future__ import annotations

from dataclasses import replace

import torch

from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.weights.fusion import EMBEDDING, HEAD


def resized(network: Lfm2, size: int | None, multiple: int | None, *, mean: bool) -> Lfm2:
    """Return ``network`` with ``size`` tokens, rounded up to a ``multiple``; None keeps the size.

    New rows of embedding and head are the mean of the old ones, or random without ``mean``. Raises
    ValueError for quantized weights.
    """
    config = network.config
    if config.quantization is not None:
        raise ValueError(
            f"resize_token_embeddings() needs dense weights, not {config.quantization}: load the "
            "unquantized checkpoint, without quantization="
        )
    size = config.vocab_size if size is None else size
    if multiple:
        size = -(-size // multiple) * multiple
    weights = dict(network.state_dict())
    for name in (EMBEDDING, HEAD):
        if name == HEAD and config.tie_word_embeddings:
            weights.pop(name)
            continue
        old = weights[name]
        rows = old.new_empty(max(size - len(old), 0), old.shape[1])
        if mean:
            rows[:] = old.float().mean(0).to(old.dtype)
        else:
            rows.normal_(std=config.initializer_range)
        weights[name] = torch.cat([old[:size], rows])
    return Lfm2(replace(config, vocab_size=size), weights, backend=network.backend)
