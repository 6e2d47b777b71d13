"""Inputs of the next decode step, from this step's inputs and the chosen tokens.

With S sequences: ``chosen, tokens, slots, positions, written [S]`` int64, ``lengths [S]`` int32,
``finished [S]`` bool, ``eos [S, E]`` int64. A sequence moves one position on. It is finished if it
chose one of its ``eos``, or a negative token, which means none. A finished sequence moves to
position 0 of ``dummy_slot``. If that is negative, it stays where it is. ``written`` gets the chosen
tokens unchanged. ``tokens`` gets 0 in place of a negative token. Least bytes: a few per sequence;
one launch instead of ten.
"""

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.pdl import pdl_options, pdl_wait


@triton.jit(do_not_specialize=["sequences", "ends", "dummy_slot"])
def _advance_kernel(
    chosen_ptr,
    eos_ptr,
    tokens_ptr,
    slots_ptr,
    positions_ptr,
    lengths_ptr,
    finished_ptr,
    written_ptr,
    dummy_slot,
    sequences,
    ends,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    offs_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = offs_s < sequences
    pdl_wait(PDL)
    chosen = tl.load(chosen_ptr + offs_s, mask=mask, other=0)
    finished = tl.load(finished_ptr + offs_s, mask=mask, other=0) != 0
    position = tl.load(positions_ptr + offs_s, mask=mask, other=0)
    position += tl.where(finished, 0, 1)
    finished |= chosen < 0
    for end in range(0, ends):
        finished |= chosen == tl.load(eos_ptr + offs_s * ends + end, mask=mask, other=-1)
    position = tl.where(finished & (dummy_slot >= 0), 0, position)
    tl.store(written_ptr + offs_s, chosen, mask=mask)
    tl.store(tokens_ptr + offs_s, tl.maximum(chosen, 0), mask=mask)
    tl.store(finished_ptr + offs_s, finished.to(tl.uint8), mask=mask)
    tl.store(positions_ptr + offs_s, position, mask=mask)
    tl.store(lengths_ptr + offs_s, (position + 1).to(tl.int32), mask=mask)
    leaves = tl.zeros_like(position) + dummy_slot
    tl.store(slots_ptr + offs_s, leaves, mask=mask & finished & (dummy_slot >= 0))


def advance_triton(
    chosen: torch.Tensor,
    eos: torch.Tensor,
    dummy_slot: int | None,
    tokens: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    finished: torch.Tensor,
    written: torch.Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Write ``tokens``, ``slots``, ``positions``, ``lengths``, ``finished`` and ``written``.

    ``pdl``: as in norm_linear.py.
    """
    (sequences,) = chosen.shape
    for each in (chosen, tokens, slots, positions, lengths, finished, written):
        assert each.dim() == 1 and each.is_contiguous()
    assert eos.dim() == 2 and len(eos) == sequences and eos.is_contiguous()
    for each in (tokens, slots, positions, lengths, finished, written):
        assert each.shape == chosen.shape
    for each in (chosen, tokens, slots, positions, written, eos):
        assert each.dtype == torch.int64
    assert lengths.dtype == torch.int32 and finished.dtype == torch.bool
    if sequences == 0:
        return
    block_s = 128
    with torch.cuda.device_of(chosen):
        _advance_kernel[(triton.cdiv(sequences, block_s),)](
            chosen,
            eos,
            tokens,
            slots,
            positions,
            lengths,
            finished.view(torch.uint8),
            written,
            -1 if dummy_slot is None else dummy_slot,
            sequences,
            eos.shape[1],
            BLOCK_S=block_s,
            num_warps=4,
            **pdl_options(pdl),
        )
