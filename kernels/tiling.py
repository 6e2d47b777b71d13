"""Tilings of the products of a few tokens: rows a tile, programs, warps.

Memory is kept busy by bytes under way: on an H100 about 23 kB on each of its processors to cover
the latency (the bandwidth times it), more to cover the gap between two kernels. So a tile has up to
16 kB, the next one is loaded meanwhile, and the programs of a processor, two to four, have up to
32 kB of tiles: a grid is at most one resident wave. Of 16-bit weights two programs mostly do, which
leave room for the next kernel's. A tile is widened to float32 in registers: of int8 it has 4 kB,
since from 8 kB on registers spill, so there are three or four, and a next kernel must wait for some
to end.
"""

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.tuned import TUNED

TILE_BYTES = 16384
INT8_TILE_BYTES = 4096
PROCESSOR_BYTES = 32768
# With four warps, two programs take half of a processor's registers.
REGISTERS = 128


@dataclass(frozen=True)
class Tiling:
    """``programs`` share out tiles of ``block_n`` rows of outputs, with ``warps`` each."""

    block_n: int
    warps: int
    programs: int


def choose_tiling(
    operation: str, rows: int, weight: torch.Tensor, block_k: int, *, together: int = 1
) -> Tiling:
    """The tiling for ``rows`` outputs, of ``together`` rows of ``weight``, ``block_k`` at a time.

    It does not depend on how many tokens there are, so neither do the bits of a result.
    """
    name, processors = chip(weight.device)
    if processors == 0:  # the interpreter takes its time for every tile, whatever its size
        return Tiling(
            min(triton.next_power_of_2(rows), tl.TRITON_MAX_TENSOR_NUMEL // block_k), 4, 1
        )
    int8 = weight.dtype == torch.int8
    # What is best for wider numbers, which the table has, would spill.
    if not int8 and (tuned := TUNED.get(name, {}).get((operation, *weight.shape))):
        return Tiling(*tuned)
    row_bytes = together * block_k * weight.element_size()
    return default_tiling(rows, row_bytes, processors, INT8_TILE_BYTES if int8 else TILE_BYTES)


@lru_cache
def chip(device: torch.device) -> tuple[str, int]:
    """A GPU's name and how many streaming multiprocessors it has: none where Triton interprets."""
    if device.type == "cpu":
        return "interpreter", 0
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


@lru_cache
def default_tiling(rows: int, row_bytes: int, processors: int, most: int = TILE_BYTES) -> Tiling:
    """The tiling whose busiest processor should be done first, of equals that with fewest programs.

    Its time is taken to grow with its rows, and where too few bytes are under way, with the lack.
    A tile of several rows has at most ``most`` bytes.
    """
    found = []
    for each, exponent in itertools.product(range(2, 5), range(most.bit_length())):
        block_n = 2**exponent
        tile = block_n * row_bytes
        if (block_n > 1 and tile > most) or (each > 2 and each * tile > PROCESSOR_BYTES):
            continue
        tiles = triton.cdiv(rows, block_n)
        rounds = triton.cdiv(tiles, each * processors)
        programs = triton.cdiv(tiles, rounds)
        busiest = triton.cdiv(programs, processors) * rounds * block_n
        under_way = min(programs * tile / processors, PROCESSOR_BYTES)
        found.append((busiest / under_way, programs, block_n))
    _, programs, block_n = min(found)
    return Tiling(block_n, 4 if row_bytes <= TILE_BYTES else 8, programs)
