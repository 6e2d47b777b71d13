"""Frequencies of rotary embedding, with RoPE scaling as in transformers' Lfm2 class."""

from __future__ import annotations

import torch

from lfm2_fast.cache.batch import Batch, widest_float
from lfm2_fast.config import ORIGINAL, Config
from lfm2_fast.config_values import CheckpointError


class RopeFrequencies:
    """Frequencies of a config's rotary embedding, for activations of ``dtype`` on ``device``.

    ``inv_freq [D/2]`` are those of a short context, in float32 or wider: positions reach 128,000,
    which 16 bits cannot count. ``scale`` multiplies the cosines and sines. With the types "dynamic"
    and "longrope", a row's frequencies depend on the length of its context. They do not depend on
    other rows or earlier calls.

    Imports transformers if the config has RoPE scaling. Raises CheckpointError for scaling with
    numbers that give no frequencies.
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        scaling = dict(config.rope_scaling)
        self.kind: str = scaling.get("rope_type", "default")
        self.follows_length = config.rope_follows_length
        self.scale = 1.0
        dim = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
        shares = dim / config.head_dim
        inv_freq = 1.0 / config.rope_theta**shares
        if self.kind != "default":
            inv_freq, self.scale = _scaled(config)
        self.inv_freq = inv_freq.to(device, wide)
        if self.kind == "longrope":
            self.original: int = scaling[ORIGINAL]
            self.long = _scaled(config, self.original + 1)[0].to(device, wide)
        if self.kind == "dynamic":
            self.original = config.max_position_embeddings
            self.theta, self.factor = config.rope_theta, scaling["factor"]
            self.shares = shares.to(device)
            # One power for each pair of row and frequency, though all rows are the same. With one
            # power a row, rounding would depend on the row's place: vector instructions and the
            # scalar remainder round differently. In float64, because the rounding of a float32
            # exponent shows in a long context.
            growth = config.head_dim / (config.head_dim - 2)
            self.growth = torch.full_like(self.shares, growth, dtype=widest_float(device))

    def of(self, batch: Batch) -> torch.Tensor:
        """Return ``inv_freq [D/2]``, or ``[T, D/2]`` if they depend on the context's length.

        All tokens of a row have the frequencies of the context at the end of the call, as if the
        whole call ran at once. The host does not wait for the device.
        """
        if not self.follows_length:
            return self.inv_freq
        lengths = batch.lengths if batch.final_lengths is None else batch.final_lengths
        rows = self.of_lengths(lengths)
        if batch.max_query == 1:
            return rows
        tokens = torch.arange(len(batch.positions), dtype=torch.int32, device=rows.device)
        row = torch.searchsorted(batch.cu_seqlens[1:], tokens, right=True)
        # Padding comes after the last row, and gets that row's frequencies.
        return rows[row.clamp(max=len(rows) - 1)]

    def of_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return ``inv_freq [B, D/2]`` of contexts of ``lengths [B]`` int32, on the device."""
        column = lengths[:, None].float()
        if self.kind == "longrope":
            longer = self.long
        else:
            # In float32 and in this order, as in transformers' function, which waits for the
            # device.
            stretch = self.factor * column / self.original - (self.factor - 1)
            base = self.theta * (stretch**self.growth).float()
            longer = (1.0 / base**self.shares).to(self.inv_freq.dtype)
        return torch.where(column > self.original, longer, self.inv_freq)


def _scaled(config: Config, length: int | None = None) -> tuple[torch.Tensor, float]:
    """Return transformers' frequencies ``[D/2]`` for contexts of ``length``, and the scale."""
    from transformers import Lfm2Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    asked = config.rope_parameters
    try:
        theirs = Lfm2Config(**config.to_dict())
        make = ROPE_INIT_FUNCTIONS[asked["rope_type"]]
        inv_freq, scale = make(theirs, torch.device("cpu"), seq_len=length)
        usable = bool(inv_freq.isfinite().all()) and 0 < float(scale) < float("inf")
    except (ArithmeticError, ValueError) as error:
        raise CheckpointError(
            f"rope_parameters {asked} give no frequencies ({error}); correct the config"
        ) from error
    if not usable:
        raise CheckpointError(
            f"rope_parameters {asked} give no frequencies that are finite; correct the config"
        )
    return inv_freq, float(scale)
