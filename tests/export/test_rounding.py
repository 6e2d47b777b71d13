from __future__ import annotations

import pytest
import torch

from lfm2_fast.export.rounding import rounded


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32), (4, 48)])
def test_each_weight_is_the_nearest_of_few_levels(bits: int, group: int | None) -> None:
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(0)).double()
    weight[2] = 0
    made = rounded(weight, bits, group)
    for old, new in zip(weight.split(group or 96, 1), made.split(group or 96, 1), strict=True):
        largest = old.gather(1, old.abs().argmax(1, keepdim=True))
        step = largest.abs() / 2 ** (bits - 1)
        # Past the last level, on the side of the smaller numbers, a whole step is lost.
        assert ((new - old).abs() <= step * (1 + 1e-9)).all()
        inside = old * largest.sign() >= -step * (2 ** (bits - 1) - 1.5)
        assert ((new - old).abs()[inside] <= (step / 2 * (1 + 1e-9)).expand_as(old)[inside]).all()
        levels = (new / step).nan_to_num()
        assert torch.allclose(levels, levels.round())
        assert (new.gather(1, old.abs().argmax(1, keepdim=True)) == largest).all()


def test_sixteen_bits_are_float16() -> None:
    weight = torch.tensor([[1 + 2**-12, 2.0**-30]])
    assert rounded(weight, 16, None).tolist() == [[1.0, 0.0]]
