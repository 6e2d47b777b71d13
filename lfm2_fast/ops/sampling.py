"""Sampling: logits -> tokens, on the model's device, without waiting for it.

The order and the meaning of every filter are Hugging Face's. The draw is ours: one uniform number
per token, a pure function of (seed, row, position), so that a row's text does not depend on what
else is in the batch or on how the work was split.

Masses are summed in float64, so that bodies which sum in another order choose the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from lfm2_fast.cache.batch import on_device

MASK32 = 0xFFFFFFFF
BLOCK = 128
# Stands where a row has no token to choose.
NO_TOKEN = -1


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of choosing a token; the defaults are greedy and leave the logits as they are."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


NEUTRAL = SamplingParams()


class SamplingState:
    """State of the choice of the next token of each of B rows, on the device.

    ``do_sample [B]`` bool, ``top_k [B]`` int64 and ``temperature, top_p, min_p, repetition_penalty
    [B]`` float64 are SamplingParams by row. ``seeds, rows, positions [B]`` int64 decide the draws;
    a position is the place that the next token will have. ``seen [B, V]`` bool marks what was
    written or read before, or is None where no row penalises that. ``sample`` marks and moves on.

    ``active`` names, on the host, the parameters that some row sets, so that a body can leave out
    what none asks for without waiting for the device.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        *,
        device: torch.device | str = "cpu",
        seed: int | Sequence[int] = 0,
        rows: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        seen: torch.Tensor | None = None,
    ) -> None:
        count = len(params)
        self.params = tuple(params)
        for field in fields(SamplingParams):
            values = [getattr(row, field.name) for row in params]
            kind = {"do_sample": torch.bool, "top_k": torch.int64}.get(field.name, torch.float64)
            setattr(self, field.name, on_device(values, kind, device))
        each = [seed] * count if isinstance(seed, int) else seed
        signed = [one - 2**64 if one >= 2**63 else one for one in each]
        self.seeds = on_device(signed, torch.int64, device)
        self.rows = torch.arange(count, device=device) if rows is None else rows
        self.positions = torch.zeros_like(self.seeds) if positions is None else positions.clone()
        self.seen = seen
        # Uniform numbers made ahead, from which step on, and how many steps there were.
        self._ahead = torch.empty(count, 0, dtype=torch.float64, device=device)
        self._first = self._steps = 0
        self._plan()

    do_sample: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    repetition_penalty: torch.Tensor

    def _plan(self) -> None:
        """Note on the host what the rows want."""
        drawn = [row for row in self.params if row.do_sample]
        self.all_drawn = len(drawn) == len(self.params)
        active = {
            field.name
            for field in fields(SamplingParams)
            for row in drawn
            if getattr(row, field.name) != getattr(NEUTRAL, field.name)
        }
        if self.seen is not None:
            active.add("repetition_penalty")
        self.active = frozenset(active)

    @property
    def greedy(self) -> bool:
        """Return True if every row takes the likeliest token of the logits as they are."""
        return not self.active

    def pick(self, places: Sequence[int]) -> SamplingState:
        """The state of some rows, in that order, as a copy."""
        picked = object.__new__(SamplingState)
        picked.params = tuple(self.params[place] for place in places)
        at = on_device(places, torch.int64, self.seeds.device)
        for name in TENSORS:
            setattr(picked, name, getattr(self, name)[at])
        picked.seen = None if self.seen is None else self.seen[at]
        picked._ahead, picked._first, picked._steps = self._ahead[at], self._first, self._steps
        picked._plan()
        return picked

    def first(self, count: int) -> SamplingState:
        """The state of the first rows, sharing their tensors."""
        shared = object.__new__(SamplingState)
        shared.params = self.params[:count]
        for name in TENSORS:
            setattr(shared, name, getattr(self, name)[:count])
        shared.seen = None if self.seen is None else self.seen[:count]
        shared._ahead, shared._first, shared._steps = self._ahead[:count], self._first, self._steps
        shared._plan()
        return shared

    def copy_rows(self, places: Sequence[int], other: SamplingState) -> None:
        """Copy the rows of ``other`` into ``places``."""
        at = on_device(places, torch.int64, self.seeds.device)
        params = list(self.params)
        for place, row in zip(places, other.params, strict=True):
            params[place] = row
        self.params = tuple(params)
        for name in TENSORS:
            getattr(self, name)[at] = getattr(other, name)
        if self.seen is not None and other.seen is not None:
            self.seen[at] = other.seen
        # Numbers made ahead are of those who were here before.
        self._ahead = self._ahead[:, :0]
        self._plan()

    def uniforms(self) -> torch.Tensor:
        """``[B]`` float64: the number of every row's next draw, made a block at a time."""
        if not 0 <= self._steps - self._first < self._ahead.shape[1]:
            ahead = self.positions[:, None] + torch.arange(BLOCK, device=self.positions.device)
            self._ahead = philox(self.seeds[:, None], self.rows[:, None], ahead)
            self._first = self._steps
        return self._ahead[:, self._steps - self._first]

    def record(self, tokens: torch.Tensor) -> None:
        """Mark ``tokens [B]`` as seen and go on to the next position.

        A row of NO_TOKEN is over: it marks token 0, and its marks are not read again.
        """
        if self.seen is not None:
            self.seen.scatter_(1, tokens.clamp(min=0)[:, None], True)
        self.positions += 1
        self.count_step()

    def count_step(self) -> None:
        """Note on the host that a body has done on the device what ``record`` does."""
        self._steps += 1


TENSORS = (*(field.name for field in fields(SamplingParams)), "seeds", "rows", "positions")


def sample_ref(logits: torch.Tensor, state: SamplingState) -> torch.Tensor:
    """The next token of every row: ``logits [B, V]`` -> ``[B]`` int64; advances ``state``.

    A row that does not sample takes the first of its best tokens after the penalty. A row has
    NO_TOKEN if its best score, as penalty and temperature leave it, is NaN or infinite.
    """
    scores = logits.float()
    if state.seen is not None:
        scores = penalize(scores, state.seen, state.repetition_penalty)
    if "do_sample" not in state.active:
        tokens = best_tokens(scores)
    else:
        tokens = draw(warp(scores, state), state.uniforms())
        if not state.all_drawn:
            tokens = torch.where(state.do_sample, tokens, best_tokens(scores))
    state.record(tokens)
    return tokens


def best_tokens(scores: torch.Tensor) -> torch.Tensor:
    """The first of the best tokens of every row, ``[B, V] -> [B]`` int64, or NO_TOKEN.

    A row has NO_TOKEN if its best score is NaN, which is larger than any number, or infinite.
    """
    best = scores.max(-1)
    return torch.where(best.values.abs() < math.inf, best.indices, NO_TOKEN)


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Divide positive and multiply negative logits ``[B, V]`` of the tokens in ``seen [B, V]``.

    By ``penalty [B]``. (Keskar et al., 2019)
    """
    by = penalty.to(logits.dtype)[:, None]
    return torch.where(seen, torch.where(logits < 0, logits * by, logits / by), logits)


def warp(scores: torch.Tensor, state: SamplingState) -> torch.Tensor:
    """Temperature, top-k, top-p and min-p on ``scores [B, V]``; what is cut off becomes -inf.

    Top-k keeps every token that ties with the k-th; top-p (Holtzman et al., 2019) keeps the
    smallest set of best tokens that holds the mass ``top_p``, of equal ones the last; min-p (Nguyen
    et al., 2024) keeps what is at least ``min_p`` times as likely as the best. The best always
    stays.
    """
    if "temperature" in state.active:
        scores = scores / state.temperature.to(scores.dtype)[:, None]
    if "top_k" in state.active:
        most = min(max(row.top_k for row in state.params), scores.shape[-1])
        best = scores.topk(most).values
        kth = best.gather(1, (state.top_k.clamp(1, most) - 1)[:, None])
        scores = scores.masked_fill((scores < kth) & (state.top_k > 0)[:, None], -math.inf)
    if "top_p" in state.active:
        ascending, order = scores.sort(stable=True)
        # Compared in float32, as Hugging Face does: of ten equal scores, 0.9 cuts one.
        mass = ascending.double().softmax(-1).cumsum(-1).float()
        tail = (mass <= (1 - state.top_p).float()[:, None]) & (state.top_p < 1)[:, None]
        tail[:, -1] = False
        scores = scores.masked_fill(tail.scatter(1, order, tail), -math.inf)
    if "min_p" in state.active:
        best = scores.amax(-1, keepdim=True)
        least = best + state.min_p.log().to(scores.dtype)[:, None]
        scores = scores.masked_fill(scores < least, -math.inf)
    return scores


def draw(scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Token ids ``[B]``: the inverse of softmax's distribution function at ``uniform [B]``.

    Summed in float64 and in the vocabulary's order, so a token of probability 0 is never drawn.
    A row has NO_TOKEN where softmax is undefined: among NaN, infinity or nothing but -inf.
    """
    mass = scores.double().softmax(-1).cumsum(-1)
    target = uniform[:, None] * mass[:, -1:]
    drawn = torch.searchsorted(mass, target, right=True)[:, 0]
    return torch.where(scores.amax(-1).abs() < math.inf, drawn, NO_TOKEN)


def philox(seeds: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Uniform float64 numbers in (0, 1), a function of int64 ``seeds, rows`` and ``positions``.

    The first word of Philox-4x32-10 (Salmon et al., 2011) with the seed's 64 bits as key and
    counter (position, row, 0, 0), as Triton's ``tl.philox`` computes it.
    """
    seeds, rows, positions = torch.broadcast_tensors(seeds, rows, positions)
    c0, c1 = positions & MASK32, rows & MASK32
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seeds & MASK32, seeds >> 32 & MASK32
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
