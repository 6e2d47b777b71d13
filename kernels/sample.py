"""Choosing tokens: penalty, temperature, top-k, top-p, min-p, and a draw or the best.

With S rows and V tokens: ``logits [S, V]``; ``seen [S, V]`` bool or None; ``do_sample [S]`` bool,
``top_k [S]`` int64, ``temperature, top_p, min_p, repetition_penalty [S]`` float64; ``seeds, rows,
positions [S]`` int64; ``tokens [S]`` int64 is filled, ``seen`` is marked, ``positions`` advance. A
row whose best score is NaN or infinite has the token -1.

Two to four launches, without a wait for the host. The first makes scores and a key for every block
of 128. In a key the best score's rank among all floats is above the token, so the largest key is
the first of the best tokens. If a row has a top-k or top-p, the second launch finds the cut
(``sample_cut.py``). If a row draws, the third finds the best sum of score and noise in every tile.
The last finds the best of all (``sample_draw.py``).

Scores are float32 with IEEE division. The masses of top-p are float64, so that the order of
summation does not change a token. Least bytes: SV elements.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.pdl import pdl_options, pdl_wait
from lfm2_fast.kernels.sample_cut import BLOCK, NO_KEY, _sample_cut_kernel, place_of
from lfm2_fast.kernels.sample_draw import _sample_draw_kernel, _sample_last_kernel

TILE = 2048


class Scratch(NamedTuple):
    """Tensors between the launches, with any content before."""

    keys: torch.Tensor  # [S, blocks] int64
    scores: torch.Tensor  # [S, V] float32
    few: torch.Tensor  # [S, V] int64: ranks that may become the cut, each above its token
    few_masses: torch.Tensor  # [S, V] float64: their masses
    picked: torch.Tensor  # [S, blocks] int32: the blocks that hold them
    cuts: torch.Tensor  # [S] int32: the rank of the smallest kept score
    firsts: torch.Tensor  # [S] int32: the first kept token with this score
    sums: torch.Tensor  # [S, tiles] int64: as keys, of the sum of score and noise

    @classmethod
    def empty(cls, logits: torch.Tensor, *, draws: bool, cuts: bool) -> "Scratch":
        """Allocate scratch for one choice. Only draws and cuts need more than keys."""
        rows, vocab = logits.shape
        blocks, tiles = triton.cdiv(vocab, BLOCK.value), triton.cdiv(vocab, TILE)
        keys = torch.empty(rows, blocks, dtype=torch.int64, device=logits.device)
        cut = rows if cuts else 0
        rows = rows if draws else 0

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=logits.device)

        return cls(
            keys=keys,
            scores=empty(rows, vocab, dtype=torch.float32),
            few=empty(cut, vocab, dtype=torch.int64),
            few_masses=empty(cut, vocab, dtype=torch.float64),
            picked=empty(cut, blocks),
            cuts=empty(cut),
            firsts=empty(cut),
            sums=empty(rows, tiles, dtype=torch.int64),
        )

    def check(self, logits: torch.Tensor, *, draws: bool, cuts: bool) -> None:
        """Assert that the tensors fit one choice from ``logits``."""
        rows, vocab = logits.shape
        assert self.keys.shape == (rows, triton.cdiv(vocab, BLOCK.value))
        assert not draws or self.scores.shape == logits.shape
        assert not (draws and cuts) or self.few.shape == self.few_masses.shape == logits.shape
        assert not draws or self.sums.shape == (rows, triton.cdiv(vocab, TILE))
        assert all(each.is_contiguous() for each in self)


@triton.jit
def _sample_scores_kernel(
    logits_ptr,
    seen_ptr,
    penalty_ptr,
    do_sample_ptr,
    temperature_ptr,
    scores_ptr,
    keys_ptr,
    vocab,
    blocks,
    stride_logits_s,
    stride_seen_s,
    DRAWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    offs_b = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    offs_v = offs_b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = offs_v < vocab
    # A row's parameters may have been written just before the step, so they are read below the
    # wait.
    pdl_wait(PDL)
    logits_ptr += row * stride_logits_s
    score = tl.load(logits_ptr + offs_v, mask=mask, other=0).to(tl.float32)
    if seen_ptr is not None:
        penalty = tl.load(penalty_ptr + row).to(tl.float32)
        seen = tl.load(seen_ptr + row * stride_seen_s + offs_v, mask=mask, other=0)
        penalty = tl.where(seen != 0, penalty, 1.0)
        score = tl.where(score < 0, score * penalty, tl.div_rn(score, penalty))
    if DRAWS:
        drawn = tl.load(do_sample_ptr + row) != 0
        temperature = tl.where(drawn, tl.load(temperature_ptr + row).to(tl.float32), 1.0)
        score = tl.div_rn(score, temperature + tl.zeros_like(score))
        tl.store(scores_ptr + row * vocab + offs_v, score, mask=mask)
    # Of equal scores the first has the greatest key.
    key = (place_of(score).to(tl.int64) << 32) | (0x7FFFFFFF - offs_v)
    best = tl.max(tl.where(mask, key, NO_KEY), axis=1)
    tl.store(keys_ptr + row * blocks + offs_b, best, mask=offs_b < blocks)


def sample_triton(
    logits: torch.Tensor,
    seen: torch.Tensor | None,
    repetition_penalty: torch.Tensor,
    do_sample: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    tokens: torch.Tensor,
    scratch: Scratch,
    *,
    draws: bool,
    cuts: bool,
    pdl: bool = False,
) -> None:
    """Fill ``tokens``, mark ``seen``, advance ``positions``; ``logits`` may have gaps between rows.

    ``draws`` is True if a row samples, ``cuts`` if a row has a top-k or top-p. Otherwise these
    parameters are not read. ``pdl``: as in norm_linear.py.
    """
    sequences, vocab = logits.shape
    blocks, tiles = triton.cdiv(vocab, BLOCK.value), triton.cdiv(vocab, TILE)
    assert vocab > 0 and logits.stride(1) == 1 and logits.dtype != torch.float64
    assert seen is None or (seen.shape == logits.shape and seen.stride(1) == 1)
    assert seen is None or seen.dtype == torch.bool
    wide, whole = (repetition_penalty, temperature, top_p, min_p), (top_k, seeds, rows, positions)
    assert all(each.dtype == torch.float64 for each in wide)
    assert all(each.dtype == torch.int64 for each in (*whole, tokens))
    assert do_sample.dtype == torch.bool
    for each in (*wide, *whole, tokens, do_sample):
        assert each.shape == (sequences,) and each.is_contiguous()
    scratch.check(logits, draws=draws, cuts=cuts)
    if sequences == 0:
        return
    # Triton stores bytes, not bits.
    marks = None if seen is None else seen.view(torch.uint8)
    sampled = do_sample.view(torch.uint8)
    stride_seen = 0 if seen is None else seen.stride(0)
    block_b = triton.next_power_of_2(blocks)
    with torch.cuda.device_of(logits):
        _sample_scores_kernel[(tiles, sequences)](
            logits, marks, repetition_penalty, sampled, temperature,
            scratch.scores, scratch.keys, vocab, blocks, logits.stride(0), stride_seen,
            DRAWS=draws,
            BLOCKS=TILE // BLOCK.value,
            **pdl_options(pdl),
        )  # fmt: skip
        if draws and cuts:
            _sample_cut_kernel[(sequences,)](
                scratch.scores, scratch.keys, sampled, top_k, top_p, scratch.cuts,
                scratch.firsts, scratch.picked, scratch.few, scratch.few_masses,
                vocab, blocks, math.log(vocab),
                BLOCK_B=block_b,
                BLOCK_C=16,
                num_warps=8,
                **pdl_options(pdl),
            )  # fmt: skip
        if draws:
            _sample_draw_kernel[(tiles, sequences)](
                scratch.scores, scratch.keys, sampled, min_p, scratch.cuts, scratch.firsts,
                seeds, rows, positions, scratch.sums, vocab, blocks,
                CUT=cuts,
                BLOCK_B=block_b,
                BLOCK_V=TILE,
                **pdl_options(pdl),
            )  # fmt: skip
        _sample_last_kernel[(sequences,)](
            scratch.keys, scratch.sums, sampled, positions, marks, tokens,
            blocks, tiles, stride_seen,
            DRAWS=draws,
            BLOCK_B=block_b,
            BLOCK_T=triton.next_power_of_2(tiles),
            **pdl_options(pdl),
        )  # fmt: skip
