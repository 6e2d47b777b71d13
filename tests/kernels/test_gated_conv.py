"""The gated convolution, many tokens and one token a sequence: every body against the reference."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_fast.cache.batch import Batch
from lfm2_fast.kernels.gated_conv import gated_conv_triton
from lfm2_fast.kernels.gated_conv_step import gated_conv_step_triton
from lfm2_fast.ops import native_library
from lfm2_fast.ops import reference as ref
from tests.batches import batch_of

pytestmark = pytest.mark.usefixtures("grid_order")

NAN = float("nan")


class Case:
    """Random inputs for ``batch``; of the windows only what may be read is not NaN."""

    def __init__(
        self, batch: Batch, hidden: int, width: int, ring: int, bias: bool, dtype: torch.dtype
    ) -> None:
        tokens = sum(batch.required_host.query_lengths)
        self.batch = batch
        self.bcx = torch.randn(tokens, 3 * hidden).to(dtype)
        self.weight = torch.randn(hidden, width).to(dtype)
        self.bias = torch.randn(hidden).to(dtype) if bias else None
        self.window = torch.full((6, ring, hidden), NAN, dtype=dtype)
        for slot, start in zip(batch.required_host.slots, batch.required_host.starts, strict=True):
            for position in range(max(0, start - width + 1), start):
                self.window[slot, position % ring] = torch.randn(hidden).to(dtype)
        device = batch.positions.device
        self.bcx, self.weight = self.bcx.to(device), self.weight.to(device)
        self.window = self.window.to(device)
        self.bias = None if self.bias is None else self.bias.to(device)

    def reference(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and window."""
        window = self.window.to(dtype, copy=True)
        bias = None if self.bias is None else self.bias.to(dtype)
        out = ref.gated_conv_ref(
            self.bcx.to(dtype), self.weight.to(dtype), bias, window, self.batch
        )
        return out, window


def bodies() -> list[tuple[str, torch.dtype]]:
    """Each body with each dtype, but Triton's interpreter, whose bfloat16 is wrong, without it."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    exact = os.environ["TRITON_INTERPRET"] == "0"
    return [
        (name, dtype)
        for name in ("eager", "triton", "native")
        for dtype in dtypes
        if name != "triton" or dtype != torch.bfloat16 or exact
    ]


@pytest.fixture(
    scope="module",
    params=bodies(),
    ids=lambda pair: f"{pair[0]}-{str(pair[1]).removeprefix('torch.')}",
)
def body(request: pytest.FixtureRequest, kernel_device: torch.device) -> tuple[str, torch.dtype]:
    if request.param[0] == "native" and (lacking := native_library.why_not(kernel_device)):
        pytest.skip(lacking)
    return request.param


@pytest.fixture(scope="module")
def kernel_dtype(body: tuple[str, torch.dtype]) -> torch.dtype:
    return body[1]


@pytest.fixture(scope="module")
def run(body, kernel_device, framed, intact, traced):
    """Runs a body on a case; gives output and window, both of which stood in a frame."""
    name, _ = body
    kernels = {
        "triton": (gated_conv_triton, gated_conv_step_triton),
        "native": (
            torch.ops.lfm2_fast.gated_conv_native,
            torch.ops.lfm2_fast.gated_conv_step_native,
        ),
    }

    def run(case: Case, step: bool, sliced: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        batch, tokens, hidden = case.batch, *case.bcx.shape
        window = framed(case.window)
        out = framed(torch.full((tokens, hidden // 3), NAN).to(case.bcx))
        bcx = framed(case.bcx) if sliced else case.bcx
        weights = (case.weight,) if case.bias is None else (case.weight, case.bias)
        if name == "eager":
            meaning = ref.gated_conv_step_ref if step else ref.gated_conv_ref
            out.copy_(meaning(bcx, case.weight, case.bias, window, batch))
            return out, window
        if name == "native" and kernel_device.type == "cuda" and not step:
            pytest.skip("CUDA has the step alone")
        places = (batch.cu_seqlens, batch.slots, batch.lengths)
        if step:
            places = (batch.positions, batch.slots)
        with traced([bcx, *weights, *places], [window, out]):
            kernels[name][step](bcx, case.weight, case.bias, window, *places, out)
        assert intact(window) and intact(out)
        return out, window

    return run


@pytest.mark.parametrize("step", [False, True], ids=["many", "step"])
def test_any_batch(step, body, kernel_dtype, draw_batch, run, same_bits, within_budget) -> None:
    """Output within the budget; every bit of every window, neighbours included, as expected."""

    # The interpreter is slow, and has four of these tests.
    @settings(max_examples=12 if body[0] == "triton" else 30, deadline=None)
    @given(data=st.data(), width=st.integers(2, 8), spare=st.sampled_from([1, 2, 40]))
    def check(data: st.DataObject, width: int, spare: int) -> None:
        torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
        batch = draw_batch(data, 1 if step else data.draw(st.sampled_from([1, 4, 80]), "most"))
        hidden = data.draw(st.sampled_from([24, 64, 100, 130]), "hidden")
        case = Case(batch, hidden, width, width - 1 + spare, data.draw(st.booleans()), kernel_dtype)
        exact, _ = case.reference(torch.float64)
        plain, plain_window = case.reference(kernel_dtype)
        out, window = run(case, step, sliced=data.draw(st.booleans(), "sliced"))
        assert same_bits(window, plain_window)
        within_budget(out, exact, plain)

    check()


@pytest.mark.parametrize("step", [False, True], ids=["many", "step"])
def test_one_channel(step, kernel_device, kernel_dtype, run, same_bits, within_budget) -> None:
    torch.manual_seed(0)
    lengths = [7] * 6
    batch = batch_of(
        lengths, [1] * 5 if step else [40, 1, 3], range(5 if step else 3), kernel_device
    )
    case = Case(batch, 1, 3, 3, True, kernel_dtype)
    plain, plain_window = case.reference(kernel_dtype)
    out, window = run(case, step)
    assert same_bits(window, plain_window)
    within_budget(out, case.reference(torch.float64)[0], plain)


@pytest.mark.parametrize("step", [False, True], ids=["many", "step"])
def test_rounds_where_the_reference_does(step, kernel_device, kernel_dtype, run, same_bits) -> None:
    """Sums of short numbers are exact in any order, so all bits are the reference's."""
    torch.manual_seed(0)
    lengths = [7] * 6
    batch = batch_of(lengths, [1] * 3 if step else [40, 1, 3], [2, 0, 1], kernel_device)
    case = Case(batch, 100, 3, 3, True, kernel_dtype)
    for tensor in (case.bcx, case.weight, case.bias, case.window):
        tensor.copy_((12 * tensor).round() / 8)
    for ours, expected in zip(run(case, step), case.reference(kernel_dtype), strict=True):
        assert same_bits(ours, expected)


def test_step_and_many_give_the_same_bits(kernel_device, kernel_dtype, run, same_bits) -> None:
    lengths = [0, 1, 2, 3, 9, 40]
    batch = batch_of(lengths, [1] * 6, [4, 0, 5, 1, 3, 2], kernel_device)
    case = Case(batch, 130, 4, 5, True, kernel_dtype)
    for many, step in zip(run(case, step=False), run(case, step=True), strict=True):
        assert same_bits(many, step)


@pytest.mark.parametrize("split", [1, 2, 3, 31, 32, 33, 69])
def test_every_split_gives_the_same_bits(
    split, kernel_device, kernel_dtype, run, same_bits
) -> None:
    """A prompt of 70 tokens at once, or as two chunks of which the second may be a step."""
    lengths = [0] * 6
    case = Case(batch_of(lengths, [70], [3], kernel_device), 64, 5, 5, False, kernel_dtype)
    whole, end = run(case, step=False)
    bcx, outs = case.bcx, []
    for chunk in bcx.split([split, 70 - split]):
        case.batch, case.bcx = batch_of(lengths, [len(chunk)], [3], kernel_device), chunk
        out, window = run(case, step=len(chunk) == 1)
        outs.append(out)
        case.window = window.clone()
        lengths[3] += len(chunk)
    assert same_bits(torch.cat(outs), whole)
    assert same_bits(window, end)


@pytest.mark.parametrize("step", [False, True], ids=["many", "step"])
def test_no_tokens(step, kernel_device, kernel_dtype, run, same_bits) -> None:
    lengths = [0] * 6
    case = Case(batch_of(lengths, [], [], kernel_device), 64, 3, 3, False, kernel_dtype)
    out, window = run(case, step)
    assert out.shape == (0, 64) and same_bits(window, case.window)


def test_wrong_layouts_are_refused(kernel_device) -> None:
    lengths = [0] * 6
    batch = batch_of(lengths, [3], [0], kernel_device)

    def launch(**changed: torch.Tensor) -> None:
        case = Case(batch, 64, 4, 4, False, torch.float32)
        given = {"bcx": case.bcx, "weight": case.weight, "window": case.window, **changed}
        out = torch.empty(3, 64, device=kernel_device)
        places = {"cu_seqlens": batch.cu_seqlens, "slots": batch.slots, "lengths": batch.lengths}
        gated_conv_triton(**given, bias=None, **places, out=out)

    launch()
    zeros = torch.zeros(6, 64, 192, device=kernel_device)
    for changed in (
        {"bcx": zeros[0, :, :3].t()},
        {"weight": zeros[0, :4, :64].t()},
        {"window": zeros[:, :3, :64]},
        {"window": zeros[:, :4, :64].double()},
    ):
        with pytest.raises(AssertionError):
            launch(**changed)
