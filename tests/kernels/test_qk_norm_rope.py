"""The kernel of QK-norm, RoPE and the write to pages, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_fast.cache.batch import Batch
from lfm2_fast.kernels.qk_norm_rope import qk_norm_rope_triton
from lfm2_fast.kernels.rope import rope_triton
from lfm2_fast.ops import reference as ref
from tests.batches import batch_of, whole_pages

pytestmark = pytest.mark.usefixtures("grid_order")

EPS = 1e-5
SLOTS, LONGEST = 5, 120
WHOLE = 128  # one page holds a whole sequence


class Case:
    """Random inputs for ``batch``, and where its pages lie: in any order, more than are needed."""

    def __init__(
        self,
        batch: Batch,
        heads: int,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: torch.dtype,
    ) -> None:
        device, tokens = batch.positions.device, sum(batch.required_host.query_lengths)
        self.batch, self.shape = batch, (heads, kv_heads, head_dim)
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim)
        qkv[::2] *= 50
        self.qkv = qkv.to(dtype).to(device)
        self.weights = [torch.randn(head_dim).to(dtype).to(device) for _ in range(2)]
        self.inv_freq = 1e6 ** (-torch.arange(head_dim // 2, device=device) * 2 / head_dim)
        per_slot = -(-LONGEST // page_size)
        order = torch.randperm(SLOTS * per_slot + 2, dtype=torch.int32)
        self.table = order[: SLOTS * per_slot].view(SLOTS, per_slot).to(device)
        self.pages = torch.full((len(order), kv_heads, page_size, head_dim), float("nan"))
        self.pages = self.pages.to(dtype).to(device)

    def reference(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, and k and v in pages of one sequence each, NaN where nothing was written."""
        _, kv_heads, head_dim = self.shape
        k, v = self.qkv.new_full((2, SLOTS, kv_heads, WHOLE, head_dim), float("nan"), dtype=dtype)
        q_weight, k_weight = (weight.to(dtype) for weight in self.weights)
        frequencies = self.inv_freq.to(torch.promote_types(dtype, torch.float32))
        rope = ref.rope_ref(self.batch.positions, frequencies, dtype)
        qkv = self.qkv.to(dtype)
        places = k, v, whole_pages(k), self.batch
        q = ref.qk_norm_rope_ref(qkv, q_weight, k_weight, EPS, rope, *places)
        return q, k, v

    def gathered(self, pages: torch.Tensor) -> torch.Tensor:
        """``pages`` as the reference has them."""
        rows = pages[self.table.long()].transpose(1, 2).flatten(2, 3)
        beyond = rows.new_full((*rows.shape[:2], WHOLE, rows.shape[3]), float("nan"))
        length = min(WHOLE, rows.shape[2])
        beyond[:, :, :length] = rows[:, :, :length]
        return beyond


@pytest.fixture(scope="module")
def run(framed, intact, traced):
    """Runs the kernel on a case; gives q, the k pages and the v pages, which stood in frames."""

    def run(case: Case, sliced: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, (heads, _, head_dim) = case.batch, case.shape
        tokens = len(case.qkv)
        qkv = framed(case.qkv) if sliced else case.qkv
        q = torch.full((tokens, heads, head_dim), float("nan")).to(qkv)
        k, v = framed(case.pages), framed(case.pages)
        cos = torch.empty(tokens, head_dim // 2, device=qkv.device)
        sin = torch.empty_like(cos)
        rope_triton(batch.positions, case.inv_freq, cos, sin)
        places = (batch.positions, batch.cu_seqlens, batch.slots, batch.write_from, case.table)
        read = [each for each in places if each is not None]
        with traced([qkv, *case.weights, cos, sin, *read], [q, k, v]):
            qk_norm_rope_triton(qkv, *case.weights, EPS, cos, sin, *places, q, k, v)
        assert intact(k) and intact(v)
        return q, k, v

    return run


def compare(case: Case, run, same_bits, within_budget, sliced: bool) -> None:
    """q and k within the budget, v to the bit, and NaN left where no token is."""
    exact_q, exact_k, _ = case.reference(torch.float64)
    plain_q, plain_k, plain_v = case.reference(case.qkv.dtype)
    q, k_pages, v_pages = run(case, sliced)
    within_budget(q, exact_q, plain_q)
    k, v = case.gathered(k_pages), case.gathered(v_pages)
    assert same_bits(v, plain_v)
    written = ~exact_k.isnan()
    assert torch.equal(~k.isnan(), written)
    within_budget(k[written], exact_k[written], plain_k[written])
    unused = torch.ones(len(k_pages), dtype=torch.bool, device=k_pages.device)
    unused[case.table.flatten().long()] = False
    assert k_pages[unused].isnan().all() and v_pages[unused].isnan().all()


def test_any_batch(kernel_dtype, draw_batch, run, same_bits, within_budget) -> None:
    @settings(max_examples=15, deadline=None)
    @given(
        data=st.data(),
        kv_heads=st.integers(1, 3),
        group=st.integers(1, 4),
        head_dim=st.sampled_from([8, 24, 64, 128]),
        page_size=st.sampled_from([16, 24, 64, 256, WHOLE]),
    )
    def check(
        data: st.DataObject, kv_heads: int, group: int, head_dim: int, page_size: int
    ) -> None:
        torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
        batch = draw_batch(data, data.draw(st.sampled_from([1, 3, 40]), "most"))
        case = Case(batch, kv_heads * group, kv_heads, head_dim, page_size, kernel_dtype)
        compare(case, run, same_bits, within_budget, data.draw(st.booleans(), "sliced"))

    check()


@pytest.mark.parametrize("page_size", [16, WHOLE])
def test_across_page_ends(
    page_size, kernel_device, kernel_dtype, run, same_bits, within_budget
) -> None:
    """One token as the last of a page, the first of the next, and a chunk over three of them."""
    lengths = [15, 16, 14, 0, 111]
    for counts in ([1] * 5, [1, 1, 34, 16, 9]):
        batch = batch_of(lengths, counts, [2, 0, 1, 4, 3], kernel_device)
        case = Case(batch, 4, 2, 64, page_size, kernel_dtype)
        compare(case, run, same_bits, within_budget, sliced=False)


@pytest.mark.parametrize("counts", [[3], [1, 1], [30, 1, 7]])
def test_tokens_after_the_last_sequence_touch_nothing(
    counts, kernel_device, kernel_dtype, run, same_bits
) -> None:
    """A captured prompt is padded to a fixed size: no page gets its content."""
    torch.manual_seed(0)
    lengths = [15, 16, 14, 0, 63]
    batch = batch_of(lengths, counts, [4, 0, 1][: len(counts)], kernel_device)
    case = Case(batch, 4, 2, 64, 16, kernel_dtype)
    alone = run(case)
    beyond = torch.tensor([0, 7, 15, 2**40, -1], device=kernel_device)
    case.batch = replace(batch, positions=torch.cat([batch.positions, beyond]))
    case.qkv = torch.cat([case.qkv, case.qkv.new_full((5, case.qkv.shape[1]), float("nan"))])
    q, k, v = run(case)
    assert same_bits(q[: len(alone[0])], alone[0]) and q[len(alone[0]) :].isnan().all()
    assert same_bits(k, alone[1]) and same_bits(v, alone[2])


def test_no_tokens(kernel_device, kernel_dtype, run) -> None:
    batch = Batch.prepare([], [], [], kernel_device)
    q, k, v = run(Case(batch, 2, 1, 64, 16, kernel_dtype))
    assert q.shape == (0, 2, 64) and k.isnan().all() and v.isnan().all()
