"""Tilings of the products of a few tokens: rows and columns of a tile, warps, programs.

Full memory speed needs enough bytes in flight. On an H100 that is about 23 kB on each
multiprocessor (SM): bandwidth times latency. The gap between two kernels needs more. So a thread
has 128 bytes of a tile in registers, and the next tile loads meanwhile. The programs of an SM have
up to 32 kB of tiles, and a grid is at most one resident wave. Two programs of four warps mostly do,
which leave room for the next kernel's. Where a weight has few rows, one program of eight warps
takes twice the columns instead.
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
# The rows of a weight that a tensor core takes at once, of 16-bit tokens.
LEAST_ROWS = 8
# Most rows of a tile: more would save little, and have more sums to exchange.
MOST_ROWS = 32
# Most columns of a warp: its threads have those of 16 tokens in registers, too, and twice as many
# numbers while they are normed.
MOST_COLUMNS = 256
# A program alone on its processor leaves it idle at each barrier, and more than eight warps leave
# no room for the next kernel's. Both are guesses until a GPU has run this (`make tune-gpu`).
ALONE, CROWDED = 1.1, 1.05
# To read 16 tokens from the nearest cache, beside what reading the weight from memory takes.
TOKENS_SHARE = 0.125


@dataclass(frozen=True)
class Tiling:
    """Division of the outputs: tiles of ``block_n`` rows for ``programs`` with ``warps`` each.

    They go through the columns of a tile's rows ``block_k`` at a time.
    """

    block_n: int
    block_k: int
    warps: int
    programs: int


def choose_tiling(operation: str, weight: torch.Tensor, *, parts: int = 1) -> Tiling:
    """Tiling for a weight ``[N, K]`` of ``parts`` stacked matrices.

    It does not depend on the number of tokens, so the bits of a result do not either. ``block_k``
    columns are loaded at a time.
    """
    name, processors = chip(weight.device)
    rows, columns = len(weight) // parts, weight.shape[1]
    item = weight.element_size()
    if processors == 0:  # in the interpreter every tile takes the same time, of any size
        block_k = max(triton.next_power_of_2(columns), 64 // item)
        most = tl.TRITON_MAX_TENSOR_NUMEL // (4 * block_k)
        block_n = max(LEAST_ROWS, min(triton.next_power_of_2(rows), most))
        return Tiling(block_n, block_k, 1, 1)
    # What is best for numbers of 16 bits, which the table has, is not for others.
    if item == 2 and (tuned := TUNED.get(name, {}).get((operation, *weight.shape))):
        return Tiling(*tuned)
    return default_tiling(rows, columns, parts, item, processors, normed=operation != "linear_add")


@lru_cache
def chip(device: torch.device) -> tuple[str, int]:
    """Return a GPU's name and its number of SMs, which is 0 in Triton's interpreter."""
    if device.type == "cpu":
        return "interpreter", 0
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


def candidates(
    rows: int, columns: int, parts: int, item: int, processors: int, *, normed: bool
) -> Iterator[tuple[float, Tiling]]:
    """Yield the tilings that fit, each with the time that its busiest processor should take.

    The time grows with a processor's rows, padded columns included, and with the lack of bytes in
    flight if there are too few. Tokens are read again for each tile, so larger tiles take less.
    """
    stacked = triton.next_power_of_2(parts)
    most_k = MOST_COLUMNS // (2 if normed else 1)
    # Beside eight warps' sums of three parts, what a convolution remembers would spill.
    widths = (4, 8) if parts < 3 else (4,)
    for each, warps, exponent in itertools.product((1, 2, 3, 4), widths, range(6)):
        block_n = max(LEAST_ROWS // stacked, 1) * 2**exponent
        least_k = 64 // item * warps
        block_k = THREAD_BYTES * 32 * warps // (block_n * stacked * item)
        block_k = min(block_k, triton.next_power_of_2(columns), most_k * warps)
        if block_k < least_k and exponent > 0:
            continue
        block_k = max(block_k, least_k)
        tile = block_n * parts * block_k * item
        if each * tile > PROCESSOR_BYTES or each * warps > MOST_WARPS:
            continue
        if block_n * stacked > MOST_ROWS:
            continue
        tiles = triton.cdiv(rows, block_n)
        rounds = triton.cdiv(tiles, each * processors)
        programs = triton.cdiv(tiles, rounds)
        busiest = triton.cdiv(programs, processors) * rounds * block_n
        padded = triton.cdiv(columns, block_k) * block_k / columns
        under_way = min(programs * tile / processors, PROCESSOR_BYTES)
        reads = 1 + TOKENS_SHARE * 32 / (block_n * parts * item)
        cost = busiest * padded * reads / under_way
        cost *= ALONE if programs <= processors else 1
        cost *= CROWDED if each * warps > MOST_WARPS // 2 else 1
        yield cost, Tiling(block_n, block_k, warps, programs)


@lru_cache
def default_tiling(
    rows: int, columns: int, parts: int, item: int, processors: int, *, normed: bool
) -> Tiling:
    """Tiling whose busiest processor should be done first, of equals that with fewest warps."""
    found = candidates(rows, columns, parts, item, processors, normed=normed)
    return min(found, key=lambda each: (each[0], each[1].warps * each[1].programs))[1]
