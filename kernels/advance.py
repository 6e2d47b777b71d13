"""Inputs of the next decode step, from this step's inputs and the chosen tokens.

With S sequences: ``chosen, tokens, slots, positions, written [S]`` int64, ``lengths [S]`` int32,
``finished [S]`` bool, ``eos [S, E]`` int64. A sequence moves one position on. It is finished if it
chose one of its ``eos``, or a negative token, which means none. A finished sequence moves to
position 0 of ``dummy_slot``. If that is negative, it stays where it is. ``written`` gets the chosen
tokens unchanged. ``tokens`` gets 0 in place of a negative token. Least bytes: a few per sequence;
one launch instead of ten.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.pdl import pdl_options, pdl_wait


@triton.jit
def advance_row(
    row,
    chosen,
    eos_ptr,
    tokens_ptr,
    slots_ptr,
    positions_ptr,
    lengths_ptr,
    finished_ptr,
    written_ptr,
    dummy_slot,
    ends,
    BLOCK_E: tl.constexpr,
):
    """Advance one sequence, which chose ``chosen``."""
    offs_e = tl.arange(0, BLOCK_E)
    eos = tl.load(eos_ptr + row * ends + offs_e, mask=offs_e < ends, other=-1)
    ended = tl.max((eos == chosen).to(tl.int32), axis=0) != 0
    finished = tl.load(finished_ptr + row) != 0
    position = tl.load(positions_ptr + row)
    position += tl.where(finished, 0, 1)
    finished = finished | ended | (chosen < 0)
    leaves = finished & (dummy_slot >= 0)
    position = tl.where(leaves, 0, position)
    tl.store(written_ptr + row, chosen)
    tl.store(tokens_ptr + row, tl.maximum(chosen, 0))
    tl.store(finished_ptr + row, finished.to(tl.uint8))
    tl.store(positions_ptr + row, position)
    tl.store(lengths_ptr + row, (position + 1).to(tl.int32))
    tl.store(slots_ptr + row, dummy_slot, mask=leaves)


@triton.jit(do_not_specialize=["ends", "dummy_slot"])
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
    ends,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    pdl_wait(PDL)
    advance_row(
        row, tl.load(chosen_ptr + row), eos_ptr, tokens_ptr, slots_ptr, positions_ptr, lengths_ptr,
        finished_ptr, written_ptr, dummy_slot, ends, BLOCK_E,
    )  # fmt: skip


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
    assert chosen.shape == tokens.shape and chosen.dtype == torch.int64 and chosen.is_contiguous()
    given = advance_arguments(eos, dummy_slot, tokens, slots, positions, lengths, finished, written)
    if len(chosen) == 0:
        return
    with torch.cuda.device_of(chosen):
        _advance_kernel[(len(chosen),)](chosen, **given, num_warps=1, **pdl_options(pdl))


def advance_arguments(
    eos: torch.Tensor,
    dummy_slot: int | None,
    tokens: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    finished: torch.Tensor,
    written: torch.Tensor,
) -> dict[str, Any]:
    """Return the arguments of a kernel that calls ``advance_row``, checked."""
    assert eos.dim() == 2 and len(eos) == len(tokens) and eos.is_contiguous()
    for each in (tokens, slots, positions, lengths, finished, written):
        assert each.shape == eos.shape[:1] and each.is_contiguous()
    for each in (tokens, slots, positions, written, eos):
        assert each.dtype == torch.int64
    assert lengths.dtype == torch.int32 and finished.dtype == torch.bool
    return {
        "eos_ptr": eos,
        "tokens_ptr": tokens,
        "slots_ptr": slots,
        "positions_ptr": positions,
        "lengths_ptr": lengths,
        # Triton stores bytes, not bits.
        "finished_ptr": finished.view(torch.uint8),
        "written_ptr": written,
        "dummy_slot": -1 if dummy_slot is None else dummy_slot,
        "ends": eos.shape[1],
        "BLOCK_E": triton.next_power_of_2(max(eos.shape[1], 1)),
    }
