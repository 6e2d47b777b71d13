"""The kernel of attention for one token per sequence, against the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_fast.cache.batch import Batch, HostBatch
from lfm2_fast.cache.kv_cache import KVPages
from lfm2_fast.kernels import flash_decode
from lfm2_fast.kernels.rope import rope_triton
from lfm2_fast.ops import reference as ref
from tests.batches import batch_of, whole_pages

pytestmark = pytest.mark.usefixtures("grid_order")

Place = Callable[[torch.Tensor], torch.Tensor]

EPS = 1e-5
NAN = float("nan")


class Case:
    """Random inputs for one more token in each of ``batch``'s slots, with any content."""

    def __init__(
        self, batch: Batch, slots: int, group: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        device = batch.positions.device
        self.batch, self.shape = batch, (group * kv_heads, kv_heads, head_dim)
        longest = max(batch.required_host.starts, default=0) + 1

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape).to(dtype).to(device)

        self.qkv = random(len(batch.required_host.starts), (group + 2) * kv_heads * head_dim)
        self.weights = [random(head_dim) for _ in range(2)]
        self.inv_freq = 1e6 ** (-torch.arange(head_dim // 2, device=device) * 2 / head_dim)
        self.k, self.v = (random(slots, kv_heads, longest, head_dim) for _ in "kv")
        self.lengths = [0] * slots
        for slot, start in zip(batch.required_host.slots, batch.required_host.starts, strict=True):
            self.lengths[slot] = start

    def reference(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The result, and the tokens' own k and v ``[S, kv_heads, D]``."""
        batch = self.batch
        k, v = self.k.to(dtype, copy=True), self.v.to(dtype, copy=True)
        q_weight, k_weight = (weight.to(dtype) for weight in self.weights)
        frequencies = self.inv_freq.to(torch.promote_types(dtype, torch.float32))
        rope = ref.rope_ref(batch.positions, frequencies, dtype)
        qkv = self.qkv.to(dtype)
        q = ref.qk_norm_rope_ref(qkv, q_weight, k_weight, EPS, rope, k, v, whole_pages(k), batch)
        here = batch.slots, slice(None), batch.positions
        return ref.attention_ref(q, k, v, whole_pages(k), batch), k[here], v[here]

    def arguments(self, pages: KVPages, place: Place, place_pages: Place) -> dict[str, Any]:
        """Arguments of the launcher: outputs and buffers NaN, counters zero."""
        (heads, kv_heads, head_dim), page_size = self.shape, pages.k.shape[2]
        sequences, device = self.qkv.shape[0], self.qkv.device
        splits = flash_decode.most_splits(pages.table.shape[1] * page_size)
        shape = (sequences, kv_heads, splits, heads // kv_heads)
        cos = torch.empty(sequences, head_dim // 2, device=device)
        sin = torch.empty_like(cos)
        rope_triton(self.batch.positions, self.inv_freq, cos, sin)
        return {
            "qkv": place(self.qkv),
            "q_weight": self.weights[0],
            "k_weight": self.weights[1],
            "eps": EPS,
            "cos": cos,
            "sin": sin,
            "slots": self.batch.slots,
            "lengths": self.batch.lengths,
            "table": pages.table,
            "k_pages": place_pages(pages.k),
            "v_pages": place_pages(pages.v),
            "out": place(torch.full((sequences, heads * head_dim), NAN).to(self.qkv)),
            "partials": torch.full((*shape, head_dim), NAN, device=device),
            "logsums": torch.full(shape, NAN, device=device),
            "arrivals": torch.zeros(len(pages.table), kv_heads, dtype=torch.int32, device=device),
        }


@pytest.fixture(scope="module")
def run(framed, intact, traced, paged, same_bits):
    """Runs the kernel on a case; gives the result, and what it wrote to the pages as k and v.

    ``place`` says how pages, inputs and results lie in memory.
    """

    def run(
        case: Case,
        page_size: int,
        place: Place = torch.clone,
        place_pages: Place | None = None,
        order: list[int] | None = None,
        trace: bool = False,
        launches: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pages = paged(case.k, case.v, case.lengths, page_size, order)
        given = case.arguments(pages, place, place_pages or place)
        writes = [given[name] for name in ("out", "k_pages", "v_pages", "arrivals")]
        exchanged = [given["partials"], given["logsums"]]
        reads = [value for value in given.values() if isinstance(value, torch.Tensor)]
        following = traced(reads, writes, exchanged)
        with following if trace else contextlib.nullcontext():
            for _ in range(launches):
                flash_decode.flash_decode_triton(**given)
                assert not given["arrivals"].any()
        out, k, v, _ = writes
        if place is framed:
            assert intact(k) and intact(v) and intact(out)
        page = pages.table[case.batch.slots, case.batch.positions // page_size].long()
        here = page, slice(None), case.batch.positions % page_size
        new_k, new_v = k[here], v[here]
        k[here], v[here] = pages.k[here], pages.v[here]
        assert same_bits(k, pages.k) and same_bits(v, pages.v)
        return out, new_k, new_v

    return run


@pytest.fixture(scope="module")
def compare(run, same_bits, within_budget):
    """Runs a case: result and k within the budget, v to the bit."""

    def compare(case: Case, page_size: int, **how: Any) -> None:
        exact, exact_k, _ = case.reference(torch.float64)
        plain, plain_k, plain_v = case.reference(case.qkv.dtype)
        out, k, v = run(case, page_size, **how)
        within_budget(out, exact, plain)
        within_budget(k, exact_k, plain_k)
        assert same_bits(v, plain_v)

    return compare


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def a_batch(starts: list[int], device: torch.device, spare: int = 2) -> Batch:
    """One token after each of ``starts``, in slots of another order, with ``spare`` more slots."""
    slots = torch.randperm(len(starts) + spare).tolist()
    return Batch.prepare([1] * len(starts), starts, slots[: len(starts)], device)


@pytest.fixture
def programs(monkeypatch) -> Callable[[int], None]:
    """Sets how many programs share out the splits of a row."""

    def set_to(count: int) -> None:
        monkeypatch.setattr(flash_decode, "_programs", lambda rows, splits: count)

    return set_to


def test_any_batch(kernel_device, kernel_dtype, programs, framed, compare) -> None:
    """Three sequences at least: PyTorch's error on a single one, which is the budget, is luck.

    A sequence alone has the bits that it has in a batch, as the test of the bits says.
    """

    @settings(max_examples=12, deadline=None)
    @given(
        starts=st.lists(st.integers(0, 300), min_size=3, max_size=4),
        kv_heads=st.integers(1, 2),
        group=st.sampled_from([1, 2, 3, 4, 8]),
        head_dim=st.sampled_from([8, 32, 48, 64, 80, 128]),
        page_size=st.sampled_from([16, 24, 64, 256, 301, 1000]),
        count=st.integers(1, 3),
        place=st.sampled_from([framed, torch.clone]),
        seed=st.integers(0, 99),
    )
    def check(starts, kv_heads, group, head_dim, page_size, count, place, seed) -> None:
        torch.manual_seed(seed)
        programs(count)
        batch = a_batch(starts, kernel_device)
        case = Case(batch, len(starts) + 2, group, kv_heads, head_dim, kernel_dtype)
        compare(case, page_size, place=place, trace=True)

    check()


@pytest.mark.parametrize(("page_size", "longest"), [(16, 1501), (9000, 64 * 128 + 1)])
def test_long_and_short_contexts_in_one_batch(
    page_size, longest, kernel_device, kernel_dtype, compare
) -> None:
    """At every edge of a block, of a split, and of what 64 of the shortest splits hold."""
    starts = [0, 1, 63, 64, 65, 127, 128, 129, 256, longest]
    batch = a_batch(starts, kernel_device)
    compare(Case(batch, len(starts) + 2, 2, 1, 32, kernel_dtype), page_size)


def test_bits_depend_on_neither_grid_nor_batch(
    kernel_device, kernel_dtype, programs, run, same_bits
) -> None:
    case = Case(a_batch([400, 3, 700], kernel_device, spare=0), 3, 3, 1, 64, kernel_dtype)
    whole, _, _ = run(case, 64)
    for count in (1, 2, 9):
        programs(count)
        assert same_bits(run(case, 64)[0], whole)
    qkv, slots = case.qkv, case.batch.required_host.slots
    lengths = case.lengths
    for i, slot in enumerate(slots):
        case.batch, case.qkv = batch_of(lengths, [1], [slot], kernel_device), qkv[i : i + 1]
        assert same_bits(run(case, 64)[0], whole[i : i + 1])


def test_buffers_serve_again_as_a_launch_left_them(kernel_device, kernel_dtype, compare) -> None:
    case = Case(a_batch([300, 5], kernel_device), 4, 2, 2, 32, kernel_dtype)
    compare(case, 64, launches=3)


@pytest.mark.parametrize("chosen", [0, 127, 128, 299, 300])
def test_one_key_above_all(chosen, kernel_device, kernel_dtype, run, same_bits) -> None:
    """The key's value is bit-identical, also if all other scores are far below zero."""
    batch = a_batch([300], kernel_device, spare=0)
    case = Case(batch, 1, 1, 1, 64, kernel_dtype)
    case.weights[1] = case.weights[0]
    if chosen == 300:  # the token's own key equals its query
        case.qkv[:, 64:128] = case.qkv[:, :64]
    pages = torch.empty_like(case.k), torch.empty_like(case.v)
    rope = ref.rope_ref(batch.positions, case.inv_freq, kernel_dtype)
    places = *pages, whole_pages(case.k), batch
    q = ref.qk_norm_rope_ref(case.qkv, *case.weights, EPS, rope, *places)
    case.k[:] = -30 * q
    case.k[:, :, chosen] = 4 * q
    case.v[:, :, 300] = case.qkv[:, 128:]
    out, _, _ = run(case, 64)
    assert same_bits(out, case.v[0, :, chosen])


@pytest.mark.parametrize(
    ("slots", "page_size", "order"),
    [(3, 71, [4, 0, 1, 2, 3]), (2, 64, [1, 4, 0, 2, 3, 5]), (2, 64, [4, 1, 0, 2, 3, 5])],
    ids=["whole", "written", "read"],
)
def test_pages_beyond_32_bits(slots, page_size, order, kernel_device, far_apart, compare) -> None:
    lengths = [70] * slots
    batch = batch_of(lengths, [1], [0], kernel_device)
    case = Case(batch, slots, 2, 1, 32, torch.float16)
    compare(case, page_size, place_pages=far_apart, order=order)


def test_first_tokens_may_share_a_slot(kernel_device, kernel_dtype, run, same_bits) -> None:
    """Finished rows share a slot that no row owns."""
    positions = torch.zeros(3, dtype=torch.int64, device=kernel_device)
    batch = Batch(
        positions=positions,
        cu_seqlens=torch.arange(4, dtype=torch.int32, device=kernel_device),
        slots=positions + 1,
        lengths=(positions + 1).int(),
        max_query=1,
        host=HostBatch((1, 1, 1), (0, 0, 0), (1, 1, 1)),
    )
    case = Case(batch, 2, 3, 1, 32, kernel_dtype)
    out, _, _ = run(case, 16)
    assert same_bits(out, case.qkv[:, -32:].repeat(1, 3))


def test_no_tokens(kernel_device, kernel_dtype, run) -> None:
    out, _, _ = run(Case(a_batch([], kernel_device), 2, 2, 1, 64, kernel_dtype), 16)
    assert out.shape == (0, 128)


def test_wrong_layouts_are_refused(kernel_device, paged) -> None:
    case = Case(a_batch([200], kernel_device, spare=0), 1, 2, 2, 16, torch.float32)
    pages = paged(case.k, case.v, case.lengths, 201)
    given = case.arguments(pages, torch.clone, torch.clone)
    flash_decode.flash_decode_triton(**given)
    for name, wrong in {
        "qkv": given["qkv"][:, 1:],
        "q_weight": given["q_weight"].repeat(2)[::2],
        "cos": given["cos"].double(),
        "k_pages": given["k_pages"].transpose(2, 3).contiguous().transpose(2, 3),
        "v_pages": given["v_pages"][:, :, :-1],
        "out": given["out"].half(),
        "partials": given["partials"][:, :, :1],
        "logsums": given["logsums"].transpose(1, 2),
        "arrivals": given["arrivals"].long(),
    }.items():
        with pytest.raises(AssertionError):
            flash_decode.flash_decode_triton(**{**given, name: wrong})
