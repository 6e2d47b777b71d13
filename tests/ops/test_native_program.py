"""Programs of native calls: the same results in one call, and refusals of broken ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lfm2_fast.ops import native_library
from lfm2_fast.ops.native_program import TENSOR, ascii_tensor, joined

native = torch.ops.lfm2_fast
_lacking = native_library.why_not(torch.device("cpu"))
pytestmark = pytest.mark.skipif(_lacking is not None, reason=str(_lacking))


def advance(eos: torch.Tensor, dummy: int | None) -> dict[str, torch.Tensor | int | None]:
    """Arguments of ``advance_native`` for two rows."""
    ints = torch.tensor([3, 4])
    state = ("tokens", "slots", "positions", "written")
    found: dict[str, Any] = {name: ints.clone() for name in state}
    found["lengths"] = ints.to(torch.int32)
    found["finished"] = torch.zeros(2, dtype=torch.bool)
    return {"chosen": ints.clone(), "eos": eos, "dummy_slot": dummy} | found


@pytest.mark.parametrize("dummy", [None, 9])
def test_a_program_does_what_its_calls_do(dummy) -> None:
    """All kinds of arguments that operations have; one call is torch's, between native ones."""
    x, norm, weight = torch.randn(2, 8), torch.rand(8), torch.randn(4, 8)
    bias, eos = torch.randn(4), torch.tensor([[4], [4]])

    def recorded(kept: dict[str, Any]) -> list[Any]:
        out = kept["out"]
        return [
            (native.norm_linear_native.default, (x, norm, 1e-5, weight, None, bias, out), {}),
            (native.linear_add_native.default, (x, weight, None, None, out, out), {}),
            (torch.ops.aten.mul_.Tensor, (out, out), {}),
            (native.linear_add_native.default, (x, weight, None, bias, out), {"out": out}),
            (native.advance_native.default, (), kept["state"]),
        ]

    found = []
    for change in (list, joined):
        kept = {"out": torch.zeros(2, 4), "state": advance(eos, dummy)}
        calls = change(recorded(kept))
        for _ in range(2):
            for operation, arguments, named in calls:
                operation(*arguments, **named)
        found.append([kept["out"], *kept["state"].values()])
    assert len(calls) == 3, "native calls in a row are one"
    assert found[0][0].abs().sum() > 0
    for plain, program in zip(*found, strict=True):
        same = torch.equal(plain, program) if isinstance(plain, torch.Tensor) else plain == program
        assert same


def test_an_operations_refusal_comes_through() -> None:
    x, out = torch.randn(2, 8), torch.zeros(2, 4)
    weight = torch.randn(4, 9)
    wrong = (native.linear_add_native.default, (x, weight, None, None, out, out), {})
    ((replay, arguments, _),) = joined([wrong])
    with pytest.raises(RuntimeError) as plain:
        wrong[0](*wrong[1])
    with pytest.raises(RuntimeError) as refused:
        replay(*arguments)
    assert str(refused.value).splitlines()[0] == str(plain.value).splitlines()[0]


@pytest.mark.parametrize(
    ("numbers", "names", "message"),
    [
        ([0], "swiglu_native", "ends in the middle"),
        ([0, 2, TENSOR, 0, TENSOR], "swiglu_native", "ends in the middle"),
        ([1, 0], "swiglu_native", "number 1 of 1 operations"),
        ([-1, 0], "swiglu_native", "number -1 of 1 operations"),
        ([0, 1, TENSOR, 2], "swiglu_native", "number 2 of 2 tensors"),
        ([0, 1, 99, 0], "swiglu_native", "argument of kind 99"),
        ([0, -1], "swiglu_native", "-1 arguments"),
        ([0, 0], "nothing_native", "no operation nothing_native"),
        ([0, 1, TENSOR, 0], "swiglu_native", "has 1 args"),
    ],
)
def test_a_broken_program_is_refused(numbers: list[int], names: str, message: str) -> None:
    tensors = [torch.randn(2, 8), torch.zeros(2, 4)]
    with pytest.raises(RuntimeError, match=message):
        native.replay_native(tensors, torch.tensor(numbers), ascii_tensor(names))
