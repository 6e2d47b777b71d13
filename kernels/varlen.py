"""Positions of programs and tokens among sequences that are packed end to end."""

import triton
import triton.language as tl


@triton.jit
def sequence_of_token(cu_seqlens_ptr, token, sequences):
    """Return the sequence of the packed ``token``, a scalar or a vector of them.

    Every sequence has a token, so equal numbers of both need no search. A token after the last
    sequence gets the last one.
    """
    return _last_start(cu_seqlens_ptr, token, sequences, None)


@triton.jit
def sequence_of_tile(cu_seqlens_ptr, tile, sequences, BLOCK_T: tl.constexpr):
    """Return the sequence of ``tile``. Sequence i begins at tile ``tile_of_sequence``."""
    return _last_start(cu_seqlens_ptr, tile, sequences, BLOCK_T)


@triton.jit
def _last_start(cu_seqlens_ptr, place, sequences, BLOCK_T: tl.constexpr):
    """Return the last sequence that starts at ``place`` or before: a tile, or a token if None."""
    found = place * 0
    width = sequences
    while width > 1:
        half = width // 2
        if BLOCK_T is None:
            starts = tl.load(cu_seqlens_ptr + found + half)
        else:
            starts = tile_of_sequence(cu_seqlens_ptr, found + half, BLOCK_T)
        found = tl.where(starts <= place, found + half, found)
        width -= half
    return found


@triton.jit
def tile_of_sequence(cu_seqlens_ptr, sequence, BLOCK_T: tl.constexpr):
    """Return the first tile of ``sequence``. A tile has BLOCK_T tokens of one sequence.

    The sum of the earlier lengths, each rounded up, would need a scan. This bound does not. It
    gives every sequence its tiles and at most one more. ``tiles`` is the total.
    """
    return tl.load(cu_seqlens_ptr + sequence) // BLOCK_T + sequence


def tiles(tokens: int, sequences: int, block_t: int) -> int:
    """Number of tiles for ``tokens`` of ``sequences``, empty ones included."""
    return tokens // block_t + sequences
