"""The C++ bodies of attention for many tokens: of every dtype, and bfloat16 with AVX512_BF16."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lfm2_fast
from lfm2_fast.cache.batch import Batch
from lfm2_fast.cache.kv_cache import KVPages
from lfm2_fast.engine.model_runner import run_batch
from lfm2_fast.ops import native_library, reference
from lfm2_fast.ops import reference as ref
from lfm2_fast.ops.native_ops import NativeOps
from tests.batches import batch_of, whole_pages

CPU = torch.device("cpu")
NAN = float("nan")
BODIES = torch.ops.lfm2_fast

_lacking = native_library.why_not(CPU)
pytestmark = [
    pytest.mark.usefixtures("threads"),
    pytest.mark.skipif(_lacking is not None, reason=str(_lacking)),
]


def a_batch(starts: Sequence[int], counts: Sequence[int]) -> Batch:
    """Some tokens after each of ``starts``, in slots of another order; two more slots are empty."""
    slots = torch.randperm(len(starts) + 2).tolist()
    return Batch.prepare(counts, starts, slots[: len(starts)], CPU)


class Case:
    """Random queries, keys and values for ``batch``, whose slots hold its tokens already."""

    def __init__(
        self, batch: Batch, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        self.batch, slots = batch, len(batch.slots) + 2
        self.lengths = [0] * slots
        for slot, length in zip(batch.required_host.slots, batch.lengths.tolist(), strict=True):
            self.lengths[slot] = length
        self.q = torch.randn(len(batch.positions), heads, head_dim).to(dtype)
        longest = max(self.lengths)
        self.k, self.v = torch.randn(2, slots, kv_heads, longest, head_dim).to(dtype)

    def reference(self, dtype: torch.dtype) -> torch.Tensor:
        given = (t.to(dtype) for t in (self.q, self.k, self.v))
        return ref.attention_ref(*given, whole_pages(self.k), self.batch)

    def whole(self) -> KVPages:
        """A page as long as its sequence for every slot."""
        return KVPages(self.k, self.v, whole_pages(self.k))

    def alone(self, i: int) -> Case:
        """The same without the other sequences."""
        made, batch = object.__new__(Case), self.batch
        first, last = batch.cu_seqlens[i : i + 2].tolist()
        host = batch.required_host
        made.batch = Batch.prepare([last - first], [host.starts[i]], [host.slots[i]], CPU)
        made.q, made.k, made.v, made.lengths = self.q[first:last], self.k, self.v, self.lengths
        return made


def attend(
    case: Case, pages: KVPages, place: Callable[[torch.Tensor], torch.Tensor] = torch.clone
) -> torch.Tensor:
    """The body's result, where ``place`` says how q, the pages and the result lie in memory."""
    q, k, v = place(case.q.flatten(1)).view_as(case.q), place(pages.k), place(pages.v)
    out = place(torch.full_like(case.q.flatten(1), NAN))
    batch = case.batch
    places = pages.table, batch.cu_seqlens, batch.slots, batch.lengths
    BODIES.flash_prefill_native(q, k, v, *places, out)
    return out


def test_any_batch(dtype, framed, intact, paged, same_bits, within_budget) -> None:
    """Sequences of any lengths; the bits are those of each alone, on any threads and pages.

    The largest of a few errors is a matter of luck, so the budget is that of all examples together.
    """
    found: list[tuple[torch.Tensor, ...]] = []

    @settings(max_examples=60, deadline=None)
    @given(
        chunks=st.lists(
            st.tuples(
                st.sampled_from([0, 0, 1, 31, 63, 64, 65, 130]),
                st.one_of(st.integers(1, 9), st.integers(10, 140)),
            ),
            min_size=1,
            max_size=4,
        ),
        kv_heads=st.integers(1, 3),
        group=st.sampled_from([1, 2, 3, 4, 7, 70]),
        head_dim=st.sampled_from([2, 6, 24, 34, 64, 80, 128, 256]),
        page_size=st.sampled_from([1, 5, 16, 64, 100, 1000]),
        place=st.sampled_from([framed, torch.clone]),
        seed=st.integers(0, 99),
    )
    def check(chunks, kv_heads, group, head_dim, page_size, place, seed) -> None:
        torch.manual_seed(seed)
        batch = a_batch(*zip(*chunks, strict=True))
        case = Case(batch, kv_heads * group, kv_heads, head_dim, dtype)
        pages = paged(case.k, case.v, case.lengths, page_size)
        out = attend(case, pages, place)
        assert place is not framed or intact(out)
        exact = case.reference(torch.float64)
        assert (out - exact).abs().max() <= 2**-5 * case.v.abs().max()
        found.append(tuple(t.flatten() for t in (out, exact, case.reference(dtype))))
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert same_bits(attend(case, case.whole()), out)
        torch.set_num_threads(3)
        alone = [attend(case.alone(i), pages) for i in range(len(chunks))]
        assert same_bits(torch.cat(alone), out)

    check()
    within_budget(*map(torch.cat, zip(*found, strict=True)))


def test_a_prompt_may_be_cut_anywhere(dtype, same_bits) -> None:
    """Two steps give the bits of one, although other tokens share a token's tile."""
    torch.manual_seed(0)
    case = Case(a_batch([0], [150]), 6, 2, 16, dtype)
    (slot,), pages = case.batch.required_host.slots, case.whole()
    whole = attend(case, pages)
    for cut in range(1, 150):
        parts = []
        for first, last in ((0, cut), (cut, 150)):
            part = case.alone(0)
            lengths = [first] * 3
            part.q, part.batch = (
                case.q[first:last],
                batch_of(lengths, [last - first], [slot], CPU),
            )
            parts.append(attend(part, pages))
        assert same_bits(torch.cat(parts), whole), cut


@pytest.mark.parametrize("size", [1.0, 6.0, 60.0])
@pytest.mark.parametrize(("start", "count"), [(0, 300), (1000, 70)])
def test_scores_of_any_size(dtype, size: float, start: int, count: int, within_budget) -> None:
    """With the largest ones few keys have all the weight, and exp underflows for the others."""
    torch.manual_seed(0)
    case = Case(a_batch([start], [count]), 16, 8, 64, dtype)
    case.q = (size * case.q).to(dtype)
    plain = case.reference(dtype)
    within_budget(attend(case, case.whole()), case.reference(torch.float64), plain)


@pytest.mark.parametrize("rising", [True, False])
def test_the_largest_score_comes_last_or_first(dtype, rising: bool, within_budget) -> None:
    """Sums are scaled down with every block of keys, or never."""
    torch.manual_seed(0)
    case = Case(a_batch([0], [400]), 2, 1, 32, dtype)
    slope = torch.linspace(0, 8, 400)[:, None]
    case.q = case.q.abs()
    case.k = ((slope if rising else slope.flip(0)) * torch.ones_like(case.k)).to(dtype)
    plain = case.reference(dtype)
    within_budget(attend(case, case.whole()), case.reference(torch.float64), plain)


@pytest.mark.parametrize("poison", [NAN, float("inf"), "largest"])
def test_nan_and_infinity_stay_in_their_sequence(dtype, poison: float | str, same_bits) -> None:
    torch.manual_seed(0)
    case = Case(a_batch([40, 7, 0], [3, 90, 21]), 4, 2, 64, dtype)
    value = torch.finfo(dtype).max if poison == "largest" else poison
    clean = [attend(case.alone(i), case.whole()) for i in range(3)]
    first, last = case.batch.cu_seqlens[1:3].tolist()
    case.q[first:last] = value
    for pages in (case.k, case.v):
        pages[case.batch.required_host.slots[1]] = value
    out = attend(case, case.whole())
    assert same_bits(out[:first], clean[0]) and same_bits(out[last:], clean[2])
    finite = out[first:last].isfinite()
    # Products of the largest halves are floats.
    assert finite.all() if value == torch.finfo(torch.float16).max else not finite.any()


def test_nan_of_a_seen_key_or_value_is_not_hidden(dtype) -> None:
    torch.manual_seed(0)
    for tensor in ("k", "v"):
        case = Case(a_batch([0], [20]), 2, 1, 16, dtype)
        getattr(case, tensor)[case.batch.required_host.slots[0], 0, 5, 3] = NAN
        out = attend(case, case.whole()).unflatten(1, (2, 16))
        hit = out[5:] if tensor == "k" else out[5:, :, 3]
        assert hit.isnan().all()


def test_other_heads_are_refused() -> None:
    case = Case(a_batch([0], [5]), 2, 1, 8, torch.bfloat16)
    odd = KVPages(case.k[..., :7], case.v[..., :7], case.whole().table)
    case.q = case.q[..., :7]
    with pytest.raises(RuntimeError, match="a head of size 7 has no pairs"):
        attend(case, odd)
    case = Case(a_batch([0], [5]), 5, 2, 8, torch.bfloat16)
    with pytest.raises(RuntimeError, match="5 heads cannot share 2"):
        attend(case, case.whole())
    case = Case(a_batch([0], [5]), 2, 1, 8, torch.bfloat16)
    apart = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    batch, pages = case.batch, case.whole()
    places = pages.table, batch.cu_seqlens, batch.slots, batch.lengths
    with pytest.raises(RuntimeError, match="side by side"):
        BODIES.flash_prefill_native(apart, pages.k, pages.v, *places, case.q.flatten(1))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("table", [[0], [1], [5]], "page 5 must be from 0 to 2"),
        ("table", [[0], [1], [-1]], "page -1"),
        ("slots", [3], "slot 3 must be from 0 to 2"),
        ("slots", [-1], "slot -1"),
        ("lengths", [13], "too few for 13 tokens"),
        ("lengths", [4], "context of 4 cannot end in 5 tokens"),
        ("cu_seqlens", [0, 4], "from 0 to 5"),
        ("cu_seqlens", [1, 5], "from 0 to 5"),
    ],
)
def test_places_that_are_not_there_are_refused(name: str, values: list, message: str) -> None:
    k, v = torch.randn(2, 3, 1, 12, 8).bfloat16()
    given = {
        "q": torch.randn(5, 2, 8).bfloat16(), "k_pages": k, "v_pages": v,
        "table": torch.tensor([[0], [1], [2]], dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, 5], dtype=torch.int32), "slots": torch.tensor([2]),
        "lengths": torch.tensor([12], dtype=torch.int32), "out": torch.zeros(5, 16).bfloat16(),
    }  # fmt: skip
    BODIES.flash_prefill_native(**given)
    given[name] = torch.tensor(values, dtype=given[name].dtype)
    with pytest.raises(RuntimeError, match=message):
        BODIES.flash_prefill_native(**given)


def test_prompts_of_every_dtype_are_its(dtype, random_checkpoint, monkeypatch) -> None:
    """Prompts of one token and of more, alone and together: plain PyTorch runs none of them."""
    monkeypatch.setattr(reference, "attention_ref", None)
    model = lfm2_fast.load(random_checkpoint(), device="cpu", dtype=dtype)
    assert isinstance(model.ops, NativeOps)
    cache = model.new_cache(2)
    for counts in ([9], [1, 40], [1]):
        batch = cache.next_batch(counts, range(len(counts)), CPU)
        run_batch(model.network, torch.randint(8, 307, (sum(counts),)), batch, cache)
