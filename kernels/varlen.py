"""Finding one's place among sequences that are packed end to end."""

import triton
import triton.language as tl


@triton.jit
def sequence_of_token(cu_seqlens_ptr, token, sequences):
    """The sequence that holds the packed ``token``, a scalar or a vector of them.

    Every sequence has a token; so there is nothing to search where there are as many of both. For
    a token after the last sequence it is the last.
    """
    found = token * 0
    width = sequences
    while width > 1:
        half = width // 2
        starts = tl.load(cu_seqlens_ptr + found + half)
        found = tl.where(starts <= token, found + half, found)
        width -= half
    return found


@triton.jit
def sequence_of_tile(cu_seqlens_ptr, tile, sequences, BLOCK_T: tl.constexpr):
    """The sequence that ``tile`` works on, where sequence i begins at tile ``tile_of_sequence``."""
    found = tile * 0
    width = sequences
    while width > 1:
        half = width // 2
        starts = tile_of_sequence(cu_seqlens_ptr, found + half, BLOCK_T)
        found = tl.where(starts <= tile, found + half, found)
        width -= half
    return found


@triton.jit
def tile_of_sequence(cu_seqlens_ptr, sequence, BLOCK_T: tl.constexpr):
    """The first tile of ``sequence``, each tile being BLOCK_T tokens of one sequence.

    A sum over the earlier sequences' lengths rounded up would need a scan; this bound does not,
    leaves every sequence its tiles, and at most one more. ``tiles`` counts all.
    """
    return tl.load(cu_seqlens_ptr + sequence) // BLOCK_T + sequence


def tiles(tokens: int, sequences: int, block_t: int) -> int:
    """Tiles that ``tokens`` of ``sequences`` take, empty ones included."""
    return tokens // block_t + sequences
