"""Few-token operations that are tuned: shapes, launches, and the gate before a timing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from bench.gate import wrong_operation
from lfm2_fast import Config
from lfm2_fast.kernels.gemv import MOST_TOKENS
from lfm2_fast.kernels.head_argmax import argmax_advance_triton, head_argmax_triton
from lfm2_fast.kernels.linear_add import linear_add_triton
from lfm2_fast.kernels.norm_conv import norm_conv_triton
from lfm2_fast.kernels.norm_linear import norm_linear_triton
from lfm2_fast.kernels.norm_swiglu import norm_swiglu_triton
from lfm2_fast.kernels.tiling import Tiling, candidates, default_tiling
from lfm2_fast.ops import reference as ref

EPS = 1e-5
# Rows of the weight that a program takes for one output.
ROWS_PER_OUTPUT = {"norm_conv": 3, "norm_swiglu": 2}
# Tilings of a key that are measured: those that the rule holds for the fastest.
MOST_TRIED = 16


@dataclass(frozen=True)
class Key:
    """Operation and the ``[N, K]`` of its weight, as in ``kernels/tuned.py``."""

    operation: str
    rows: int
    columns: int

    @property
    def parts(self) -> int:
        return ROWS_PER_OUTPUT.get(self.operation, 1)

    @property
    def outputs(self) -> int:
        return self.rows // self.parts

    @property
    def normed(self) -> bool:
        return self.operation != "linear_add"

    def default(self, processors: int, bits: int) -> Tiling:
        shape = (self.outputs, self.columns, self.parts, bits, processors)
        return default_tiling(*shape, normed=self.normed)

    def candidates(self, processors: int, bits: int) -> list[Tiling]:
        """Rule's tiling, then others in the order in which it would take them."""
        shape = (self.outputs, self.columns, self.parts, bits, processors)
        found = candidates(*shape, normed=self.normed)
        order = sorted(found, key=lambda each: each[0])
        tilings = dict.fromkeys([self.default(processors, bits), *(tiling for _, tiling in order)])
        return list(tilings)[:MOST_TRIED]


def keys(configs: Iterable[Config]) -> list[Key]:
    """Return every key of these models, ordered by the bytes that it reads in a step."""
    read: dict[Key, int] = {}
    for config in configs:
        hidden, inner = config.hidden_size, config.intermediate_size
        attended = config.num_attention_heads * config.head_dim
        qkv = attended + 2 * config.num_key_value_heads * config.head_dim
        layers = len(config.layer_types)
        attention = config.layer_types.count("full_attention")
        for key, count in (
            (Key("norm_swiglu", 2 * inner, hidden), layers),
            (Key("linear_add", hidden, inner), layers),
            (Key("norm_conv", 3 * hidden, hidden), layers - attention),
            (Key("head_argmax", config.vocab_size, hidden), 1),
            (Key("linear_add", hidden, hidden), layers - attention),
            (Key("linear_add", hidden, attended), attention),
            (Key("norm_linear", qkv, hidden), attention),
            # The head, where logits are asked for: in steps that draw.
            (Key("norm_linear", config.vocab_size, hidden), 1),
        ):
            read[key] = max(read.get(key, 0), count * key.rows * key.columns)
    return sorted(read, key=lambda key: -read[key])


class OneTokenRun:
    """One token through a key's operation, with ``copies`` of its weight to take in turns."""

    def __init__(self, key: Key, dtype: torch.dtype, device: torch.device, copies: int) -> None:
        self.key, self.device = key, device
        generator = torch.Generator(device).manual_seed(0)

        def some(*shape: int) -> torch.Tensor:
            made = torch.empty(shape, dtype=torch.float32, device=device)
            return made.normal_(generator=generator).to(dtype)

        outputs = key.outputs
        self.x, self.norm, self.residual = some(1, key.columns), some(key.columns), some(1, outputs)
        scale = key.columns**-0.5
        self.weights = [some(key.rows, key.columns).mul_(scale) for _ in range(copies)]
        self.taps, self.window = some(outputs, 3), some(1, 4, outputs)
        self.positions = torch.full((1,), 5, device=device)
        self.slots = torch.zeros_like(self.positions)
        self.out = torch.empty(1, outputs, dtype=dtype, device=device)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        # As many rows as the tiling with the most programs has.
        self.best = torch.empty(outputs, MOST_TOKENS, dtype=torch.int64, device=device)

    def launch(self, weight: torch.Tensor, tiling: Tiling, pdl: bool) -> None:
        """Launch the operation once; the head has two launches, of which the large one runs."""
        operation, normed = self.key.operation, (self.x, self.norm, EPS)
        more: dict[str, Any] = {"pdl": pdl, "tiling": tiling}
        if operation == "norm_linear":
            norm_linear_triton(*normed, weight, None, None, self.out, **more)
        elif operation == "norm_swiglu":
            norm_swiglu_triton(*normed, weight, None, None, self.out, **more)
        elif operation == "linear_add":
            linear_add_triton(self.x, weight, None, None, self.residual, self.out, **more)
        elif operation == "norm_conv":
            places = (self.window, self.positions, self.slots)
            norm_conv_triton(
                *normed, weight, None, None, self.taps, None, *places, self.out, **more
            )
        else:
            best = self.best[: tiling.programs]
            head_argmax_triton(*normed, weight, None, None, best, **more)

    def launch_all(self, tiling: Tiling, pdl: bool) -> None:
        for weight in self.weights:
            self.launch(weight, tiling, pdl)

    def wrong(self, tiling: Tiling) -> str | None:
        """Return why a tiling's result is not the operation's, or None."""
        self.out.fill_(float("nan"))
        self.launch(self.weights[0], tiling, False)
        exact, plain = (self.meaning(dtype) for dtype in (torch.float64, self.x.dtype))
        if self.key.operation != "head_argmax":
            return wrong_operation(self.out, exact, plain)
        best, inputs = self.best[: tiling.programs], [self.token.clone() for _ in range(3)]
        lengths = self.token.int()
        argmax_advance_triton(
            best, self.token[:, None], None, *inputs, lengths, lengths.bool(), self.token
        )
        # If two logits differ only by rounding, either may be the larger.
        chosen, largest = exact[0, int(self.token)], exact.max()
        step = torch.finfo(self.x.dtype).eps * largest.abs()
        off = 2 * (plain.double() - exact).abs().max() + step
        return None if bool(chosen >= largest - off) else "it is wrong: not the largest logit"

    def meaning(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the result of the first weight, in plain PyTorch."""
        x, norm, weight = (t.to(dtype) for t in (self.x, self.norm, self.weights[0]))
        operation = self.key.operation
        if operation == "linear_add":
            return self.residual.to(dtype) + ref.linear_ref(x, weight, None)
        out = ref.linear_ref(ref.rms_norm_ref(x, norm, EPS), weight, None)
        if operation == "norm_swiglu":
            return ref.swiglu_ref(out)
        if operation == "norm_conv":
            window, taps = self.window.to(dtype, copy=True), self.taps.to(dtype)
            places: Any = SimpleNamespace(positions=self.positions, slots=self.slots)
            return ref.gated_conv_step_ref(out, taps, None, window, places)
        return out
