"""Tilings of the products of a few tokens: rows and columns of a tile, warps, programs.

Full memory speed needs enough bytes in flight. On an H100 that is about 23 kB on each
multiprocessor (SM): bandwidth times latency. The gap between two kernels needs more. So a thread
has 128 bytes of a tile in registers, and the next tile loads meanwhile. The programs of an SM have
up to 32 kB of tiles, and a grid is at most one resident wave. Mostly two programs of four warps are
enough, and leave room for those of the next kernel. If a weight has few rows, one program of eight
warps takes twice the columns instead.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.tuned import TUNED

THREAD_BYTES = 128
PROCESSOR_BYTES = 32768
# With four warps, two programs take half of an SM's registers.
REGISTERS = 128
MOST_WARPS = 16
# Rows of a weight that a tensor core multiplies at once by 16-bit tokens.
LEAST_ROWS = 8
# Most rows of a tile. More would save little, and there would be more sums to exchange.
MOST_ROWS = 32
# Most columns of a warp. Its threads also have these columns of 16 tokens in registers, and twice
# as many numbers while the tokens are normed.
MOST_COLUMNS = 256
# int4 has half of the bytes and columns, and more rows: scales take registers, and a tile has twice
# as many numbers.
INT4_THREAD_BYTES, INT4_MOST_COLUMNS, INT4_MOST_ROWS = 64, 128, 64
# Factors of a tiling's cost. A program alone on its SM leaves it idle at each barrier. More than
# eight warps leave no room for the next kernel. More tiles ahead take registers. All are guesses
# until a GPU has run this (`make tune-gpu`).
ALONE, CROWDED, DEEP = 1.1, 1.05, 1.1
# Time to read 16 tokens from the nearest cache, as a share of reading the weight from memory.
TOKENS_SHARE = 0.125


def bits_of(weight: torch.Tensor) -> int:
    """Return the bits of a weight's number; two of int4 are in a byte."""
    return 4 if weight.dtype == torch.uint8 else 8 * weight.element_size()


@triton.constexpr_function
def least_columns(bits: int) -> int:
    """Columns that a warp takes at once: 64 bytes of each row, and in int4 a group of 16."""
    return 32 if bits == 4 else 512 // bits


@dataclass(frozen=True)
class Tiling:
    """Division of the outputs: tiles of ``block_n`` rows for ``programs`` with ``warps`` each.

    They go through the columns of a tile's rows ``block_k`` at a time, and load ``depth`` tiles
    ahead.
    """

    block_n: int
    block_k: int
    warps: int
    programs: int
    depth: int = 1


def registers(bits: int, parts: int, tiling: Tiling, *, normed: bool, changed: bool = False) -> int:
    """Return the most registers of a thread, for a weight of ``parts`` stacked matrices.

    Compiled for sm_90, none spills in 16, 8 or 4 bits at any published size.
    """
    depth = tiling.depth
    # A program of eight warps is alone on its SM in int4. With three of four warps there are no
    # more than 168 for a thread.
    extra = {16: 8 * (normed and tiling.warps == 8), 8: 16, 4: 48 if tiling.warps == 8 else 40}
    conv = (32 if bits < 16 else 8) * (parts == 3)
    # What an adapter adds is held beside the tile that loads meanwhile.
    wanted = REGISTERS + extra.get(bits, 0) + conv + (32 + conv) * (depth - 1) + 56 * changed
    return min(wanted, 255)  # no GPU has more


def choose_tiling(operation: str, weight: torch.Tensor, *, parts: int = 1) -> Tiling:
    """Tiling for a weight ``[N, K]`` of ``parts`` stacked matrices.

    It does not depend on the number of tokens, so the bits of a result do not either. ``block_k``
    columns are loaded at a time.
    """
    name, processors = chip(weight.device)
    bits = bits_of(weight)
    rows, columns = len(weight) // parts, weight.shape[1] * 8 * weight.element_size() // bits
    if processors == 0:  # in the interpreter every tile takes the same time, of any size
        block_k = max(triton.next_power_of_2(columns), least_columns(bits))
        most = tl.TRITON_MAX_TENSOR_NUMEL // (4 * block_k)
        block_n = max(LEAST_ROWS, min(triton.next_power_of_2(rows), most))
        return Tiling(block_n, block_k, 1, 1)
    # The table is measured with 16-bit weights, and its tilings do not suit other widths.
    if bits == 16 and (tuned := TUNED.get(name, {}).get((operation, *weight.shape))):
        return Tiling(*tuned)
    return default_tiling(rows, columns, parts, bits, processors, normed=operation != "linear_add")


@lru_cache
def chip(device: torch.device) -> tuple[str, int]:
    """Return a GPU's name and its number of SMs, which is 0 in Triton's interpreter."""
    if device.type == "cpu":
        return "interpreter", 0
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


def candidates(
    rows: int, columns: int, parts: int, bits: int, processors: int, *, normed: bool
) -> Iterator[tuple[float, Tiling]]:
    """Yield the tilings that fit, each with the time that its busiest SM should take.

    The time grows with an SM's rows, padded columns included, and with a lack of bytes in flight.
    Tokens are read again for each tile, so larger tiles take less.
    """
    stacked = triton.next_power_of_2(parts)
    most_k = MOST_COLUMNS // (2 if normed else 1)
    thread_bytes, most_rows = THREAD_BYTES, MOST_ROWS
    most_warps = MOST_WARPS if parts < 3 else 12
    if bits < 16:
        # Their registers leave room for no more.
        most_warps = 8 if parts == 3 else 12
    if bits == 4:
        thread_bytes, most_rows = INT4_THREAD_BYTES, INT4_MOST_ROWS
        most_k = min(most_k, INT4_MOST_COLUMNS)
    least_n = LEAST_ROWS if bits == 4 else max(LEAST_ROWS // stacked, 1)
    depths = (1, 2, 3) if bits == 8 else (1, 2)
    shapes = itertools.product((1, 2, 3, 4), (4, 8), range(6), depths)
    for each, warps, exponent, depth in shapes:
        block_n = least_n * 2**exponent
        least_k = least_columns(bits) * warps
        # With a depth of two, three tiles are in a thread's registers in place of two.
        most_bytes = thread_bytes if parts == 3 else thread_bytes >> (depth - 1)
        block_k = most_bytes * 32 * warps * 8 // (block_n * stacked * bits)
        block_k = min(block_k, triton.next_power_of_2(columns), most_k * warps)
        if block_k < least_k and exponent > 0:
            continue
        block_k = max(block_k, least_k)
        tile = block_n * parts * block_k * bits // 8
        if each * tile * depth > PROCESSOR_BYTES or each * warps > most_warps:
            continue
        if block_n * stacked > most_rows:
            continue
        tiles = triton.cdiv(rows, block_n)
        rounds = triton.cdiv(tiles, each * processors)
        programs = triton.cdiv(tiles, rounds)
        busiest = triton.cdiv(programs, processors) * rounds * block_n
        padded = triton.cdiv(columns, block_k) * block_k / columns
        if depth > 1 and (each * warps > 8 or rounds * triton.cdiv(columns, block_k) < depth):
            continue
        if depth > 1 and normed and (parts < 3 or bits > 8):
            # Tiles of fewer rows would norm the tokens more often.
            continue
        in_flight = min(programs * tile * depth / processors, PROCESSOR_BYTES)
        reads = 1 + TOKENS_SHARE * 256 / (block_n * parts * bits)
        # The columns' masks take instructions in each step.
        cost = busiest * padded ** (2 if columns > block_k else 1) * reads / in_flight
        cost *= ALONE if programs <= processors else 1
        cost *= CROWDED if each * warps > MOST_WARPS // 2 else 1
        cost *= DEEP if depth > 1 else 1
        yield cost, Tiling(block_n, block_k, warps, programs, depth)


@lru_cache
def default_tiling(
    rows: int, columns: int, parts: int, bits: int, processors: int, *, normed: bool
) -> Tiling:
    """Return the tiling whose busiest SM should finish first, or the one with fewest warps."""
    found = candidates(rows, columns, parts, bits, processors, normed=normed)
    return min(found, key=lambda each: (each[0], each[1].warps * each[1].programs))[1]
