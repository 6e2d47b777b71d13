"""Sampling: logits -> tokens, on the model's device, without waiting for it.

The order and the meaning of every filter are Hugging Face's. The draw is our own: of the tokens
that the filters leave, the one with the largest sum of score and Gumbel noise. The noise is a pure
function of (seed, row, position, token). So a row's text does not depend on the batch, or on how
the work was split. A small error of a score changes the draw only if the two largest sums are
close. So other implementations and narrower types mostly draw the same tokens.

The mass of top-p is summed in float64, so that the order of summation does not change the cut.
Noise is float64 too. Devices that may lack float64 compute both in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch

from lfm2_fast.cache.batch import Field, on_device, together_on_device, widest_float

MASK32 = 0xFFFFFFFF
# Marks a row without a token to choose.
NO_TOKEN = -1


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of the choice of a token. The defaults are greedy and do not change the logits."""

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
    [B]`` in the device's widest float are SamplingParams by row. ``seeds, rows, positions [B]``
    int64 decide the draws; the position is that of the next token. ``seen [B, V]`` bool marks the
    earlier tokens of each row, or is None if no row has a repetition penalty. ``sample`` updates
    both.

    ``active``, on the host, names the parameters that some row sets. So an implementation can leave
    out the others without waiting for the device.
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
        names = [field.name for field in fields(SamplingParams)]
        kinds = {"do_sample": torch.bool, "top_k": torch.int64}
        wide = widest_float(device)
        own: list[Field] = [
            ([getattr(row, name) for row in params], kinds.get(name, wide)) for name in names
        ]
        seeds = signed([seed] * count if isinstance(seed, int) else seed)
        *moved, self.seeds = together_on_device(device, *own, (seeds, torch.int64))
        for name, values in zip(names, moved, strict=True):
            setattr(self, name, values)
        self.rows = torch.arange(count, device=device) if rows is None else rows
        self.positions = torch.zeros_like(self.seeds) if positions is None else positions.clone()
        self.seen = seen
        self._plan()

    @classmethod
    def over(
        cls,
        params: Sequence[SamplingParams],
        tensors: Mapping[str, torch.Tensor],
        seen: torch.Tensor | None,
    ) -> SamplingState:
        """Return the state of rows whose ``tensors`` exist, by the names in ``TENSORS``."""
        made = object.__new__(cls)
        made.params, made.seen = tuple(params), seen
        for name in TENSORS:
            setattr(made, name, tensors[name])
        made._plan()
        return made

    do_sample: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    repetition_penalty: torch.Tensor

    def _plan(self) -> None:
        """Note on the host which parameters the rows set."""
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
        """Return True if every row takes the most likely token of the unchanged logits."""
        return not self.active

    def pick(self, places: Sequence[int]) -> SamplingState:
        """Return the state of some rows, in that order, as a copy."""
        at = on_device(places, torch.int64, self.seeds.device)
        return SamplingState.over(
            [self.params[place] for place in places],
            {name: getattr(self, name)[at] for name in TENSORS},
            None if self.seen is None else self.seen[at],
        )

    def first(self, count: int) -> SamplingState:
        """Return the state of the first rows, which shares their tensors."""
        return SamplingState.over(
            self.params[:count],
            {name: getattr(self, name)[:count] for name in TENSORS},
            None if self.seen is None else self.seen[:count],
        )

    def copy_rows(self, places: Sequence[int], other: SamplingState) -> None:
        """Copy the rows of ``other`` into ``places``."""
        at = on_device(places, torch.int64, self.seeds.device)
        for name in TENSORS:
            getattr(self, name)[at] = getattr(other, name)
        if self.seen is not None and other.seen is not None:
            self.seen[at] = other.seen
        self.note_params(places, other.params)

    def note_params(self, places: Sequence[int], params: Sequence[SamplingParams]) -> None:
        """Note on the host that rows ``places`` have other parameters."""
        own = list(self.params)
        for place, row in zip(places, params, strict=True):
            own[place] = row
        self.params = tuple(own)
        self._plan()

    def record(self, tokens: torch.Tensor) -> None:
        """Mark ``tokens [B]`` as seen and go on to the next position.

        A row with NO_TOKEN has ended: it marks token 0, and its marks are not read again.
        """
        if self.seen is not None:
            self.seen.scatter_(1, tokens.clamp(min=0)[:, None], True)
        self.positions += 1


def signed(seeds: Sequence[int]) -> list[int]:
    """Return seeds of 64 bits as int64 has them."""
    return [seed - 2**64 if seed >= 2**63 else seed for seed in seeds]


TENSORS = (*(field.name for field in fields(SamplingParams)), "seeds", "rows", "positions")


def sample_ref(logits: torch.Tensor, state: SamplingState) -> torch.Tensor:
    """Choose the next token of every row: ``logits [B, V]`` -> ``[B]`` int64; advances ``state``.

    A greedy row takes the first of its best tokens after the penalty. A row has NO_TOKEN if its
    best score, after penalty and temperature, is NaN or infinite.
    """
    scores = logits.float()
    if state.seen is not None:
        scores = penalize(scores, state.seen, state.repetition_penalty)
    if "do_sample" not in state.active:
        tokens = best_tokens(scores)
    else:
        tokens = draw(warp(scores, state), state)
        if not state.all_drawn:
            tokens = torch.where(state.do_sample, tokens, best_tokens(scores))
    state.record(tokens)
    return tokens


def best_tokens(scores: torch.Tensor) -> torch.Tensor:
    """Return the first of every row's best tokens, ``[B, V] -> [B]`` int64, or NO_TOKEN.

    A row has NO_TOKEN if its best score is NaN, which is larger than any number, or infinite.
    """
    best = scores.max(-1)
    return torch.where(best.values.abs() < math.inf, best.indices, NO_TOKEN)


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Divide positive and multiply negative ``logits [B, V]`` of the tokens in ``seen [B, V]``.

    The factor is ``penalty [B]``. (Keskar et al., 2019)
    """
    by = penalty.to(logits.dtype)[:, None]
    return torch.where(seen, torch.where(logits < 0, logits * by, logits / by), logits)


def warp(scores: torch.Tensor, state: SamplingState) -> torch.Tensor:
    """Temperature, top-k, top-p and min-p on ``scores [B, V]``. Dropped tokens become -inf.

    Top-k keeps every token that ties with the k-th. Top-p (Holtzman et al., 2019) keeps the
    smallest set of best tokens with the mass ``top_p``; of equal tokens it keeps the last ones.
    Min-p (Nguyen et al., 2024) keeps tokens that are at least ``min_p`` times as likely as the
    best. The best token always stays.
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
        mass = ascending.to(widest_float(scores.device)).softmax(-1).cumsum(-1).float()
        tail = (mass <= (1 - state.top_p).float()[:, None]) & (state.top_p < 1)[:, None]
        tail[:, -1] = False
        scores = scores.masked_fill(tail.scatter(1, order, tail), -math.inf)
    if "min_p" in state.active:
        best = scores.amax(-1, keepdim=True)
        least = best + state.min_p.log().to(scores.dtype)[:, None]
        scores = scores.masked_fill(scores < least, -math.inf)
    return scores


def draw(scores: torch.Tensor, state: SamplingState) -> torch.Tensor:
    """Draw a token of every row by its probability: ``scores [B, V]`` -> ``[B]`` int64.

    It is the first token with the largest sum of score and Gumbel noise. This draw has the
    probabilities of the scores' softmax (Gumbel, 1954). A token at -inf is never drawn. A row has
    NO_TOKEN if softmax is undefined: with NaN, infinity, or only -inf.
    """
    noise = gumbel(state.seeds, state.rows, state.positions, scores.shape[-1])
    return best_tokens(scores.to(noise.dtype) + noise)


def gumbel(
    seeds: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, count: int
) -> torch.Tensor:
    """Gumbel noise ``[B, count]`` of the first tokens of every row: ``-ln(-ln(1 - u))``.

    ``u`` is ``(word + 1/2) / 2^32``. The smallest ``u`` give the largest noise, and they have the
    finest steps. Still, a token of probability 1e-9 is drawn a quarter of a percent too rarely, and
    one of 1e-11 hardly ever. It is float64, or the widest float of the device.
    """
    words = philox(seeds, rows, positions, count)
    wide = widest_float(words.device)
    # In float32 the largest words would round up to u = 1, whose noise is not finite.
    less = words.to(wide).add_(0.5).mul_(-(2.0**-32)).clamp_(min=torch.finfo(wide).eps - 1)
    return less.log1p_().neg_().log_().neg_()


def philox(
    seeds: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, count: int
) -> torch.Tensor:
    """Random 32-bit words ``[B, count]`` int64 of int64 ``seeds, rows, positions [B]``.

    Column c has word c % 4 of Philox-4x32-10 (Salmon et al., 2011) with the seed's 64 bits as key
    and counter (position, row, c // 4, 0), as Triton's ``tl.philox`` computes it.
    """
    c0, c1 = positions[:, None], rows[:, None]
    c2 = torch.arange((count + 3) // 4, device=seeds.device)[None]
    c3 = torch.zeros_like(c0)
    k0, k1 = seeds[:, None], seeds[:, None] >> 32
    for _ in range(10):
        # Only the lower 32 bits of a word count. A product of two may wrap int64's sign; both
        # halves are still right.
        a, b = (c0 & MASK32) * 0xD2511F53, (c2 & MASK32) * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ (c1 ^ k0), b, (a >> 32) ^ (c3 ^ k1), a
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    words = torch.stack([c0, c1, c2, c3], -1)
    return words.bitwise_and_(MASK32).flatten(1)[:, :count]
