"""norm_conv, the gated convolution in its projection's epilogue, against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_fast.cache.batch import Batch
from lfm2_fast.kernels.gemv import MOST_TOKENS
from lfm2_fast.kernels.norm_conv import norm_conv_triton
from lfm2_fast.kernels.tiling import Tiling
from lfm2_fast.ops import reference as ref
from lfm2_fast.weights.formats import INT8
from tests.batches import batch_of

EPS = 1e-5
NAN = float("nan")


class Case:
    """Random inputs for a step of ``batch``; of the windows only what may be read is not NaN.

    B, C and x have one magnitude. Otherwise one large product would dominate, and the chance error
    of plain PyTorch in it would be the budget.
    """

    def __init__(
        self,
        batch: Batch,
        size: int,
        width: int,
        ring: int,
        biases: tuple[bool, bool],
        dtype: torch.dtype,
        int8: bool = False,
    ) -> None:
        device = batch.positions.device
        tokens, k = len(batch.positions), size // 2 * 2 + 4

        def some(*shape: int) -> torch.Tensor:
            return torch.randn(shape).to(dtype).to(device)

        self.batch = batch
        self.h, self.norm = some(tokens, k).abs(), some(k).abs()
        self.weight, self.scale = some(3 * size, k).abs() / k, None
        if int8:
            self.weight, self.scale = INT8.quantize(self.weight)
        self.in_bias = some(3 * size) if biases[0] else None
        self.taps, self.bias = some(size, width), some(size) if biases[1] else None
        slots = max([0, *batch.required_host.slots]) + 1
        self.window = torch.full((slots, ring, size), NAN, dtype=dtype, device=device)
        for slot, start in zip(batch.required_host.slots, batch.required_host.starts, strict=True):
            for position in range(max(0, start - width + 1), start):
                self.window[slot, position % ring] = some(size)

    def meaning(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and window."""

        def wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(dtype, copy=True)

        normed = ref.rms_norm_ref(wide(self.h), wide(self.norm), EPS)
        weight = self.weight.to(dtype)
        if self.scale is not None:
            weight = INT8.dequantize((self.weight, self.scale), dtype)
        bcx = ref.linear_ref(normed, weight, wide(self.in_bias))
        window = wide(self.window)
        step = ref.gated_conv_step_ref
        return step(bcx, wide(self.taps), wide(self.bias), window, self.batch), window

    def new_rows(self, window: torch.Tensor) -> torch.Tensor:
        return window[self.batch.slots, self.batch.positions % window.shape[1]]


@pytest.fixture(scope="module")
def run(framed, intact, traced):
    """Launches a case; gives output and window, both of which stood in a frame."""

    def run(case: Case, tiling: Tiling | None) -> tuple[torch.Tensor, torch.Tensor]:
        h, window = framed(case.h), framed(case.window)
        out = framed(torch.full((len(h), len(case.taps)), NAN).to(h))
        weights = (case.weight, case.in_bias, case.scale, case.taps, case.bias)
        places = (case.batch.positions, case.batch.slots)
        reads = [h, case.norm, *(w for w in weights if w is not None), *places]
        with traced(reads, [window, out]):
            norm_conv_triton(h, case.norm, EPS, *weights, window, *places, out, tiling=tiling)
        assert intact(window) and intact(out)
        return out, window

    return run


@pytest.mark.usefixtures("grid_order")
def test_any_batch(kernel_dtype, draw_batch, run, same_bits, within_budget) -> None:
    """Output and new rows within the budget; of the windows nothing else has changed."""

    # Always the same batches: of a single small one, PyTorch's error can be nearly none by luck,
    # and the budget goes by that.
    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(data=st.data(), width=st.integers(2, 8), spare=st.sampled_from([1, 2, 40]))
    def check(data: st.DataObject, width: int, spare: int) -> None:
        torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
        batch = draw_batch(data, 1)
        size = data.draw(st.sampled_from([24, 40, 75]), "size")
        biases = data.draw(st.tuples(st.booleans(), st.booleans()), "biases")
        case = Case(batch, size, width, width - 1 + spare, biases, kernel_dtype)
        exact, exact_window = case.meaning(torch.float64)
        plain, plain_window = case.meaning(kernel_dtype)
        tiling = Tiling(data.draw(st.sampled_from([2, 8]), "rows"), 64, 1, 3)
        out, window = run(case, tiling)
        within_budget(out, exact, plain)
        new = case.new_rows(window)
        within_budget(new, case.new_rows(exact_window), case.new_rows(plain_window))
        old = case.window.clone()
        old[batch.slots, batch.positions % old.shape[1]] = new
        assert same_bits(window, old)

    check()


def test_a_row_does_not_depend_on_the_other_rows(
    kernel_device, kernel_dtype, run, same_bits
) -> None:
    """Alone, among sixteen in slots of any order, and beside a row that is NaN."""
    torch.manual_seed(0)
    slots = torch.randperm(MOST_TOKENS).tolist()
    lengths = list(range(MOST_TOKENS))
    batch = batch_of(lengths, [1] * MOST_TOKENS, slots, kernel_device)
    case = Case(batch, 40, 3, 3, (True, True), kernel_dtype)
    case.h[3] = NAN
    out, window = run(case, Tiling(8, 64, 1, 2))
    assert out[3].isnan().all() and not out[torch.arange(MOST_TOKENS) != 3].isnan().any()
    h = case.h
    for token in (0, 9, MOST_TOKENS - 1):
        case.h = h[token : token + 1]
        case.batch = batch_of(lengths, [1], slots[token : token + 1], kernel_device)
        alone, alone_window = run(case, Tiling(8, 64, 1, 2))
        assert same_bits(alone, out[token : token + 1])
        assert same_bits(alone_window[slots[token]], window[slots[token]])


def test_no_tokens(kernel_device, kernel_dtype, run, same_bits) -> None:
    batch = Batch.prepare([], [], [], kernel_device)
    case = Case(batch, 16, 3, 3, (False, False), kernel_dtype)
    out, window = run(case, None)
    assert out.shape == (0, 16) and same_bits(window, case.window)


def test_wrong_layouts_are_refused(kernel_device) -> None:
    batch = Batch.prepare([1, 1], [0, 4], [0, 1], kernel_device)
    names = ("weight", "in_bias", "scale", "taps", "bias", "window")

    def launch(**changed: torch.Tensor) -> None:
        case = Case(batch, 16, 3, 3, (True, True), torch.float32)
        given = {name: changed.get(name, getattr(case, name)) for name in names}
        h, out = changed.get("h", case.h), torch.empty(2, 16, device=kernel_device)
        norm_conv_triton(h, case.norm, EPS, *given.values(), *places, out)

    places = (batch.positions, batch.slots)
    launch()
    zeros = torch.zeros(48, 48, device=kernel_device)
    for changed in (
        {"h": zeros[:20, :2].t()},
        {"weight": zeros[:20].t()},
        {"in_bias": zeros[0, :16]},
        {"scale": zeros[0]},
        {"weight": zeros[:, :20].contiguous().char()},
        {"taps": zeros[:3, :16].t()},
        {"bias": zeros[0, :32:2]},
        {"window": zeros[None, :2, :16]},
        {"window": zeros[None, :3, :16].half()},
    ):
        with pytest.raises(AssertionError):
            launch(**changed)


def test_one_channel(kernel_device, kernel_dtype, run, within_budget) -> None:
    torch.manual_seed(0)
    lengths = [7, 0, 1, 2, 30]
    batch = batch_of(lengths, [1] * 5, [2, 0, 4, 1, 3], kernel_device)
    case = Case(batch, 1, 3, 3, (True, True), kernel_dtype)
    out, _ = run(case, Tiling(2, 64, 1, 1))
    within_budget(out, case.meaning(torch.float64)[0], case.meaning(kernel_dtype)[0])


def test_int8_against_the_widened_matrix(kernel_device, kernel_dtype, run, within_budget) -> None:
    torch.manual_seed(0)
    lengths = [7, 0, 1, 2, 30]
    batch = batch_of(lengths, [1] * 5, [2, 0, 4, 1, 3], kernel_device)
    case = Case(batch, 40, 3, 4, (True, True), kernel_dtype, int8=True)
    exact, exact_window = case.meaning(torch.float64)
    plain, plain_window = case.meaning(kernel_dtype)
    out, window = run(case, Tiling(8, 64, 1, 3))
    within_budget(out, exact, plain)
    within_budget(case.new_rows(window), case.new_rows(exact_window), case.new_rows(plain_window))
