"""The noise of a row's tokens, against the reference's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lfm2_fast.kernels.gumbel import LEAST_NOISE, MOST_NOISE, gumbel
from lfm2_fast.ops import sampling

TOKENS = 2048


@triton.jit
def _noise_kernel(seeds_ptr, rows_ptr, positions_ptr, noise_ptr, first, BLOCK_V: tl.constexpr):
    row = tl.program_id(0)
    seed, number = tl.load(seeds_ptr + row), tl.load(rows_ptr + row)
    noise = gumbel(seed, number, tl.load(positions_ptr + row), first, BLOCK_V)
    tl.store(noise_ptr + row * BLOCK_V + tl.arange(0, BLOCK_V), noise)


def test_noise_is_the_references(kernel_device: torch.device) -> None:
    """Error below 1.2e-6: half a last place below 32, and two of the logarithm's argument.

    Seeds, rows and positions have more bits than the counter.
    """
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(2**62, (3, 20), generator=generator)
    places[0, 0] = -7
    given = [each.contiguous().to(kernel_device) for each in (*places, torch.empty(20, TOKENS))]
    _noise_kernel[(20,)](*given, TOKENS, TOKENS)
    noise = given[3].cpu().double()
    expected = sampling.gumbel(*places, 2 * TOKENS)[:, TOKENS:]
    assert (noise - expected).abs().max() < 1.2e-6
    assert LEAST_NOISE.value < noise.min() and noise.max() < MOST_NOISE.value
