"""The kernel of attention for any number of tokens per sequence, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_fast.cache.batch import Batch
from lfm2_fast.cache.kv_cache import KVPages
from lfm2_fast.kernels.flash_prefill import flash_prefill_triton
from lfm2_fast.ops import reference as ref
from tests.batches import batch_of, whole_pages

pytestmark = pytest.mark.usefixtures("grid_order")

NAN = float("nan")


class Case:
    """Random queries, keys and values for ``batch``, whose slots hold its tokens already."""

    def __init__(
        self, batch: Batch, slots: int, group: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        self.batch, tokens = batch, sum(batch.required_host.query_lengths)
        self.lengths = [0] * slots
        for slot, start, n in batch.required_host:
            self.lengths[slot] = start + n

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape).to(dtype).to(batch.positions.device)

        self.q = random(tokens, group * kv_heads, head_dim)
        longest = max(self.lengths, default=1)
        self.k, self.v = (random(slots, kv_heads, longest, head_dim) for _ in "kv")

    def reference(self, dtype: torch.dtype) -> torch.Tensor:
        given = (t.to(dtype) for t in (self.q, self.k, self.v))
        return ref.attention_ref(*given, whole_pages(self.k), self.batch)

    def arguments(self, pages: KVPages, place: Callable[..., Any]) -> dict[str, Any]:
        """Arguments of the launcher, with the result NaN."""
        tokens, heads, head_dim = self.q.shape
        return {
            "q": place(self.q.flatten(1)).unflatten(1, (heads, head_dim)),
            "k_pages": pages.k,
            "v_pages": pages.v,
            "table": pages.table,
            "cu_seqlens": self.batch.cu_seqlens,
            "slots": self.batch.slots,
            "lengths": self.batch.lengths,
            "out": place(torch.full((tokens, heads * head_dim), NAN).to(self.q)),
            "most_tokens": self.batch.max_query,
        }


@pytest.fixture(scope="module")
def compare(framed, intact, traced, paged, within_budget):
    """Runs the kernel on a case; the result is within the budget.

    ``place`` and ``place_pages`` say how inputs, result and pages lie in memory.
    """

    def compare(
        case: Case,
        page_size: int,
        place: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
        place_pages: Callable[[torch.Tensor], torch.Tensor] | None = None,
        order: list[int] | None = None,
    ) -> None:
        pages = paged(case.k, case.v, case.lengths, page_size, order)
        pages.k, pages.v = map(place_pages or place, (pages.k, pages.v))
        given = case.arguments(pages, place)
        reads = [value for value in given.values() if isinstance(value, torch.Tensor)]
        with traced(reads, [given["out"]]):
            flash_prefill_triton(**given)
        if place is framed:
            assert intact(given["out"])
        within_budget(given["out"], case.reference(torch.float64), case.reference(case.q.dtype))

    return compare


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def a_batch(starts: list[int], counts: list[int], device: torch.device) -> Batch:
    """Some tokens after each of ``starts``, in slots of another order; two more slots are empty."""
    slots = torch.randperm(len(starts) + 2).tolist()
    return Batch.prepare(counts, starts, slots[: len(starts)], device)


@pytest.mark.parametrize("most", [1, 5, 90], ids=lambda most: f"up_to_{most}_tokens")
def test_any_batch(most, kernel_device, kernel_dtype, framed, compare) -> None:
    @settings(max_examples=8, deadline=None)
    @given(
        chunks=st.lists(
            st.tuples(st.integers(0, 200), st.integers(1, most)), min_size=1, max_size=3
        ),
        kv_heads=st.integers(1, 2),
        group=st.sampled_from([1, 2, 3, 4, 8]),
        head_dim=st.sampled_from([8, 32, 48, 64, 80, 128]),
        page_size=st.sampled_from([16, 24, 64, 256, 290, 1000]),
        place=st.sampled_from([framed, torch.clone]),
        seed=st.integers(0, 99),
    )
    def check(chunks, kv_heads, group, head_dim, page_size, place, seed) -> None:
        torch.manual_seed(seed)
        starts, counts = map(list, zip(*chunks, strict=True))
        batch = a_batch(starts, counts, kernel_device)
        case = Case(batch, len(starts) + 2, group, kv_heads, head_dim, kernel_dtype)
        compare(case, page_size, place)

    check()


@pytest.mark.parametrize("page_size", [16, 64, 1201])
def test_one_token_and_many_on_short_and_long_prefixes(
    page_size, kernel_device, kernel_dtype, compare
) -> None:
    """Chunks that end at, before and after the ends of tiles, blocks and pages, in one batch."""
    starts = [0, 1000, 63, 0, 15, 64, 1, 31, 1200]
    counts = [64, 1, 1, 65, 33, 1, 63, 130, 1]
    batch = a_batch(starts, counts, kernel_device)
    compare(Case(batch, len(starts) + 2, 2, 1, 32, kernel_dtype), page_size)


@pytest.mark.parametrize(
    ("slots", "page_size", "order"),
    [(3, 73, [4, 0, 1, 2, 3]), (2, 64, [1, 4, 0, 2, 3, 5]), (2, 64, [4, 1, 0, 2, 3, 5])],
    ids=["whole", "second_page", "first_page"],
)
def test_pages_beyond_32_bits(slots, page_size, order, kernel_device, far_apart, compare) -> None:
    lengths = [70] * slots
    batch = batch_of(lengths, [3], [0], kernel_device)
    case = Case(batch, slots, 2, 1, 32, torch.float16)
    compare(case, page_size, place_pages=far_apart, order=order)


def test_no_tokens(kernel_device, kernel_dtype, compare) -> None:
    compare(Case(a_batch([], [], kernel_device), 2, 2, 1, 64, kernel_dtype), 16)


def test_wrong_layouts_are_refused(kernel_device, paged) -> None:
    case = Case(a_batch([9], [3], kernel_device), 3, 2, 2, 16, torch.float32)
    given = case.arguments(paged(case.k, case.v, case.lengths, 16), torch.clone)
    flash_prefill_triton(**given)
    for name, wrong in {
        "q": given["q"].transpose(0, 1).contiguous().transpose(0, 1),
        "k_pages": given["k_pages"].half(),
        "v_pages": given["v_pages"].transpose(1, 2).contiguous().transpose(1, 2),
        "table": given["table"].long(),
        "lengths": given["lengths"][:0],
        "out": given["out"][:, :-1],
    }.items():
        with pytest.raises(AssertionError):
            flash_prefill_triton(**{**given, name: wrong})
