"""Sampling: logits -> tokens, on the model's device, without waiting for it.

The order and the meaning of every filter are Hugging Face's. The draw is ours: one uniform number
per token, a pure function of (seed, row, position), so that a row's text does not depend on what
else is in the batch or on how the work was split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

MASK32 = 0xFFFFFFFF
BLOCK = 128


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token; the defaults are greedy and leave the logits as they are."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divide positive and multiply negative logits ``[B, V]`` of the tokens in ``seen [B, V]``.

    (Keskar et al., 2019)
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def warp(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Temperature, top-k, top-p and min-p on ``scores [B, V]``; what is cut off becomes -inf.

    Top-k keeps every token that ties with the k-th; top-p (Holtzman et al., 2019) keeps the
    smallest set of best tokens that holds the mass ``top_p``; min-p (Nguyen et al., 2024) keeps
    what is at least ``min_p`` times as likely as the best. The best always stays.
    """
    if params.temperature != 1.0:
        scores = scores / params.temperature
    if params.top_k:
        kth = scores.topk(min(params.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -math.inf)
    if params.top_p < 1.0:
        ascending, order = scores.sort()
        tail = ascending.softmax(-1).cumsum(-1) <= 1 - params.top_p
        tail[:, -1] = False
        scores = scores.masked_fill(tail.scatter(1, order, tail), -math.inf)
    if params.min_p:
        best = scores.amax(-1, keepdim=True)
        scores = scores.masked_fill(scores < best + math.log(params.min_p), -math.inf)
    return scores


def draw(scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Token ids ``[B]``: the inverse of softmax's distribution function at ``uniform [B]``.

    Summed in float64 and in the vocabulary's order, so a token of probability 0 is never drawn.
    """
    mass = scores.double().softmax(-1).cumsum(-1)
    target = uniform[:, None] * mass[:, -1:]
    return torch.searchsorted(mass, target, right=True)[:, 0]


def philox(seed: int, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Uniform float64 numbers in (0, 1), a function of ``seed``, int64 ``rows`` and ``positions``.

    The first word of Philox-4x32-10 (Salmon et al., 2011) with key ``seed`` and counter
    (position, row, 0, 0), as Triton's ``tl.philox`` computes it.
    """
    rows, positions = torch.broadcast_tensors(rows, positions)
    c0, c1 = positions & MASK32, rows & MASK32
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(10):
        # A product of two 32-bit words may wrap int64's sign; both halves are right all the same.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (b >> 32 & MASK32) ^ c1 ^ k0,
            b & MASK32,
            (a >> 32 & MASK32) ^ c3 ^ k1,
            (a & MASK32),
        )
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return (c0.double() + 0.5) / 2**32


class Draws:
    """The uniform numbers of ``rows`` sequences, made a block of positions at a time."""

    def __init__(self, seed: int, rows: int, device: torch.device) -> None:
        self.seed = seed
        self.rows = torch.arange(rows, device=device)[:, None]
        self.block = torch.empty(rows, 0, dtype=torch.float64, device=device)
        self.steps = 0

    def next(self, starts: torch.Tensor) -> torch.Tensor:
        """``[rows]``: the numbers of the next step; ``starts [rows]`` are the first positions."""
        column = self.steps % BLOCK
        if column == 0:
            ahead = torch.arange(self.steps, self.steps + BLOCK, device=starts.device)
            self.block = philox(self.seed, self.rows, starts[:, None] + ahead)
        self.steps += 1
        return self.block[:, column]
