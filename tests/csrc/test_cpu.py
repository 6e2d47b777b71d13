"""The small C++ bodies and attention of one token on the CPU, against the reference."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_fast.cache.batch import Batch
from lfm2_fast.cache.kv_cache import KVPages
from lfm2_fast.ops import native_library
from lfm2_fast.ops import reference as ref
from lfm2_fast.ops.native_ops import NativeOps
from lfm2_fast.weights.formats import INT8
from tests.batches import batch_of, whole_pages

CPU = torch.device("cpu")
EPS = 1e-5
NAN = float("nan")
BODIES = torch.ops.lfm2_fast

_lacking = native_library.why_not(CPU)
pytestmark = [
    pytest.mark.skipif(_lacking is not None, reason=str(_lacking)),
    pytest.mark.usefixtures("threads"),
]


def a_batch(data: st.DataObject, tokens: int, slots: int = 5) -> Batch:
    """Hypothesis' choice of sequences, at most ``tokens`` of each."""
    live = data.draw(st.permutations(range(slots)))[: data.draw(st.integers(1, slots))]
    counts = [data.draw(st.integers(1, tokens)) for _ in live]
    held = [data.draw(st.sampled_from([0, 1, 2, 7, 15, 16, 17, 40])) for _ in range(slots)]
    return batch_of(held, counts, live, CPU)


def fold_table(slots: int, per_slot: int) -> torch.Tensor:
    """Return a page table: pages in any order, two more than are needed."""
    order = torch.randperm(slots * per_slot + 2, dtype=torch.int32)
    return order[: slots * per_slot].view(slots, per_slot)


def unfolded(pages: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """``pages`` as the reference has them: one as long as a sequence for every slot."""
    return pages[table.long()].transpose(1, 2).flatten(2, 3).contiguous()


@pytest.mark.parametrize("tokens", [1, 3, 90])
@pytest.mark.parametrize("hidden", [1, 7, 16, 100, 1024])
@pytest.mark.parametrize("sliced", [False, True], ids=["dense", "sliced"])
def test_rms_norm(tokens, hidden, sliced, dtype, framed, intact, within_budget) -> None:
    torch.manual_seed(0)
    x = (torch.randn(tokens, hidden) * torch.logspace(-3, 3, tokens)[:, None]).to(dtype)
    x[1:][-1:] = 0
    weight = torch.randn(hidden).to(dtype)
    exact = ref.rms_norm_ref(x.double(), weight.double(), EPS)
    out = framed(torch.full_like(x, NAN))
    BODIES.rms_norm_native(framed(x) if sliced else x, weight, EPS, out)
    assert intact(out)
    within_budget(out, exact, ref.rms_norm_ref(x, weight, EPS), by_row=True)


@pytest.mark.parametrize("place", ["apart", "x", "delta"])
def test_add_rms_norm(place, dtype, framed, intact, same_bits, within_budget) -> None:
    """The sum may be written over either of its terms, and is equal to the bit."""
    torch.manual_seed(0)
    x, delta = torch.randn(2, 40, 100).to(dtype).unbind()
    weight, sums = torch.randn(100).to(dtype), x + delta
    exact = ref.rms_norm_ref(sums.double(), weight.double(), EPS)
    x, delta, apart, out = map(framed, (x, delta, *[torch.full_like(x, NAN)] * 2))
    total = {"apart": apart, "x": x, "delta": delta}[place]
    BODIES.add_rms_norm_native(x, delta, weight, EPS, total, out)
    assert same_bits(total, sums) and intact(total) and intact(out)
    within_budget(out, exact, ref.rms_norm_ref(sums, weight, EPS), by_row=True)


@pytest.mark.parametrize("width", [1, 37, 1024])
@pytest.mark.parametrize("int8", [False, True], ids=["dense", "int8"])
@pytest.mark.parametrize("tokens", [[36], [0, 36, 5, 5, 17], list(range(36, 0, -1)) * 4], ids=len)
def test_embed(width, int8, tokens, dtype, framed, intact, same_bits) -> None:
    """Rows are bit-identical. A token may repeat, and the weight may have gaps between rows."""
    torch.manual_seed(0)
    weight, scale = torch.randn(37, width).to(dtype), None
    if int8:
        weight, scale = INT8.quantize(weight)
    weight = torch.cat([weight, weight], 1)[:, :width]
    at = torch.tensor(tokens)
    out = framed(torch.full((len(tokens), width), NAN, dtype=dtype))
    BODIES.embed_native(at, weight, scale, out)
    rows = weight[at] if scale is None else INT8.dequantize((weight[at], scale[at]), dtype)
    assert same_bits(out, rows) and intact(out)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4608), (3, 150), (60, 200)], ids=str)
@pytest.mark.parametrize("sliced", [False, True], ids=["dense", "sliced"])
def test_swiglu(shape, sliced, dtype, framed, intact, within_budget) -> None:
    torch.manual_seed(0)
    gate_up = (4 * torch.randn(shape[0], 2 * shape[1])).to(dtype)
    exact, plain = ref.swiglu_ref(gate_up.double()), ref.swiglu_ref(gate_up)
    out = framed(torch.full_like(plain, NAN))
    BODIES.swiglu_native(framed(gate_up) if sliced else gate_up, out)
    assert intact(out)
    within_budget(out, exact, plain)


@pytest.mark.parametrize("gate", [-1e4, -104.0, -88.7, -17.0, -1e-3, 0.0, 1e-3, 17.0, 1e4])
def test_swiglu_extremes(gate: float, dtype, within_budget) -> None:
    """Overflow and underflow of exp do not show."""
    gate_up = torch.tensor([[gate, -gate, 0.75, -1.5]]).to(dtype)
    out = torch.full((1, 2), NAN, dtype=dtype)
    BODIES.swiglu_native(gate_up, out)
    within_budget(out, ref.swiglu_ref(gate_up.double()), ref.swiglu_ref(gate_up))


def test_every_number_is_widened_and_rounded_as_torch_does(dtype, same_bits) -> None:
    """The window takes B * x: every 16-bit number times one, and times a random number."""
    if dtype == torch.float32:
        numbers = torch.randn(1 << 16) * torch.logspace(-30, 30, 1 << 16)
    else:
        numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
        numbers = numbers[~numbers.isnan()]
    torch.manual_seed(0)
    for factor in (torch.ones_like(numbers), (torch.randn(len(numbers)) * 30).to(dtype)):
        bcx = torch.cat([numbers, torch.ones_like(numbers), factor])[None]
        window = torch.full((1, 2, len(numbers)), NAN, dtype=dtype)
        taps = torch.tensor([0.0, 1.0]).to(dtype).expand(len(numbers), 2).contiguous()
        out = torch.empty_like(numbers)[None]
        first = torch.zeros(1, dtype=torch.int64)
        BODIES.gated_conv_step_native(bcx, taps, None, window, first, first, out)
        expected = numbers * factor
        known = ~expected.isnan()
        assert same_bits(window[0, 0, known], expected[known])
        assert window[0, 0, ~known].isnan().all()


@pytest.mark.parametrize("pairs", [1, 12, 32])
@pytest.mark.parametrize("positions", [[0], [1, 7, 100, 127_999], list(range(70))], ids=len)
def test_rope(pairs, positions, dtype, within_budget) -> None:
    at = torch.tensor(positions)
    inv_freq = 1e6 ** (-torch.arange(pairs) / pairs)
    out = torch.full((2, len(positions), 1, 2 * pairs), NAN, dtype=dtype)
    BODIES.rope_native(at, inv_freq, *out)
    exact = ref.rope_ref(at, inv_freq.double(), torch.float64)
    for ours, a, b in zip(out, exact, ref.rope_ref(at, inv_freq, dtype), strict=True):
        within_budget(ours, a, b)


@pytest.mark.parametrize("pairs", [1, 12, 32])
def test_rope_with_frequencies_of_each_token(pairs, dtype, same_bits, threads) -> None:
    """Each token has the same bits as alone. There are enough tokens for several threads."""
    at = torch.arange(0, 300_000, 1001)
    inv_freq = 1e6 ** (-torch.arange(pairs) / pairs) / torch.arange(1, 301)[:, None]
    out = torch.full((2, 300, 1, 2 * pairs), NAN, dtype=dtype)
    BODIES.rope_native(at, inv_freq, *out)
    alone = torch.full((2, 1, 1, 2 * pairs), NAN, dtype=dtype)
    for token in range(300):
        BODIES.rope_native(at[token, None], inv_freq[token], *alone)
        assert same_bits(out[:, token], alone[:, 0])


def test_qk_norm_rope(dtype, framed, intact, same_bits, within_budget) -> None:
    """Any batch: q and k within the budget, v to the bit, nothing else of the pages touched."""

    @settings(max_examples=40, deadline=None)
    @given(
        data=st.data(),
        kv_heads=st.integers(1, 3),
        group=st.integers(1, 4),
        head_dim=st.sampled_from([2, 24, 64, 100]),
        page_size=st.sampled_from([1, 16, 24, 128]),
    )
    def check(data, kv_heads: int, group: int, head_dim: int, page_size: int) -> None:
        torch.manual_seed(data.draw(st.integers(0, 99)))
        batch = a_batch(data, data.draw(st.sampled_from([1, 3, 40])))
        tokens, heads = len(batch.positions), kv_heads * group
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim)
        qkv[::2] *= 50
        qkv, weights = qkv.to(dtype), [torch.randn(head_dim).to(dtype) for _ in range(2)]
        table = fold_table(5, -(-80 // page_size))
        empty = torch.full((table.numel() + 2, kv_heads, page_size, head_dim), NAN, dtype=dtype)
        inv_freq = 1e6 ** (-torch.arange(head_dim // 2) * 2 / head_dim)

        def reference(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
            k, v = unfolded(empty, table).to(dtype).repeat(2, 1, 1, 1, 1).chunk(2)
            cos_sin = ref.rope_ref(
                batch.positions, inv_freq.to(max(dtype, torch.float32, key=bits)), dtype
            )
            wide = [w.to(dtype) for w in weights]
            places = k[0], v[0], whole_pages(k[0]), batch
            q = ref.qk_norm_rope_ref(qkv.to(dtype), *wide, EPS, cos_sin, *places)
            return q, k[0], v[0]

        q = torch.full((tokens, heads, head_dim), NAN, dtype=dtype)
        k, v = framed(empty), framed(empty)
        cos_sin = ref.rope_ref(batch.positions, inv_freq, dtype)
        given = framed(qkv) if data.draw(st.booleans()) else qkv
        runs = table, batch.cu_seqlens, batch.slots, batch.lengths, batch.write_from
        BODIES.qk_norm_rope_native(given, *weights, EPS, *cos_sin, k, v, *runs, q)
        assert intact(k) and intact(v)
        exact_q, exact_k, _ = reference(torch.float64)
        plain_q, plain_k, plain_v = reference(dtype)
        within_budget(q, exact_q, plain_q)
        assert same_bits(unfolded(v, table), plain_v)
        written = ~exact_k.isnan()
        ours_k = unfolded(k, table)
        assert torch.equal(~ours_k.isnan(), written)
        within_budget(ours_k[written], exact_k[written], plain_k[written])

    def bits(dtype: torch.dtype) -> int:
        return torch.finfo(dtype).bits

    check()


def test_streams_are_kept_at_their_slots_and_positions(dtype, framed) -> None:
    """Rows may have gaps; positions are counted around the ring."""
    streams = [framed(torch.randn(4, 24).to(dtype)) for _ in range(3)]
    slots, positions = torch.tensor([2, 0, 2, 3]), torch.tensor([0, 13, 6, 1000])
    ours, plain = (torch.full((4, 7, 72), NAN, dtype=dtype) for _ in range(2))
    NativeOps().keep_streams(streams, slots, positions, ours)
    ref.keep_streams_ref(streams, slots, positions, plain)
    assert (~ours.isnan()).any(-1).sum() == 4
    assert torch.equal(ours.nan_to_num(9.0), plain.nan_to_num(9.0))


def a_context(data, dtype: torch.dtype, lengths: list[int]) -> SimpleNamespace:
    """One query per sequence. Pages are NaN where nothing may be read."""
    kv_heads = data.draw(st.integers(1, 3))
    head_dim = data.draw(st.sampled_from([2, 16, 24, 64, 96, 100, 128]))
    page_size = data.draw(st.sampled_from([1, 5, 64, 100, 2048]))
    heads, count = kv_heads * data.draw(st.integers(1, 5)), len(lengths)
    slots = torch.randperm(count + 2)[:count]
    table = fold_table(count + 2, -(-max(lengths) // page_size))
    pages = torch.full((2, table.numel() + 2, kv_heads, page_size, head_dim), NAN)
    for slot, length in zip(slots.tolist(), lengths, strict=True):
        for position in range(length):
            page = table[slot, position // page_size]
            pages[:, page, :, position % page_size] = torch.randn(2, kv_heads, head_dim)
    q = torch.randn(count, heads, head_dim)
    return SimpleNamespace(
        q=q.to(dtype), k=pages[0].to(dtype), v=pages[1].to(dtype), table=table, slots=slots,
        lengths=torch.tensor(lengths, dtype=torch.int32),
    )  # fmt: skip


def decode(case: SimpleNamespace, rows: slice = slice(None)) -> torch.Tensor:
    q = case.q[rows]
    out = torch.full((len(q), q[0].numel()), NAN, dtype=q.dtype)
    places = case.table, case.slots[rows], case.lengths[rows]
    BODIES.flash_decode_native(q, case.k, case.v, *places, out)
    return out


def test_flash_decode(dtype, framed, within_budget, same_bits) -> None:
    """Contexts of any lengths together; a row gives the same bits alone and on one thread.

    The largest of a few errors is a matter of luck, so the budget is that of all examples together.
    """
    found: list[tuple[torch.Tensor, ...]] = []

    @settings(max_examples=60, deadline=None)
    @given(
        data=st.data(),
        lengths=st.lists(
            st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 513, 1100])),
            min_size=1,
            max_size=4,
        ),
    )
    def check(data, lengths: list[int]) -> None:
        torch.manual_seed(data.draw(st.integers(0, 99)))
        case = a_context(data, dtype, lengths)
        out = decode(case)
        for row, length in enumerate(lengths):
            slot, q = int(case.slots[row]), case.q[row : row + 1]
            k, v = (unfolded(pages, case.table)[slot, :, :length] for pages in (case.k, case.v))
            plain = ref._attend_one(q, k, v, length - 1).flatten()
            exact = ref._attend_one(q.double(), k.double(), v.double(), length - 1).flatten()
            assert (out[row] - exact).abs().max() <= 8 * torch.finfo(dtype).eps * v.abs().max()
            found.append((out[row], exact, plain))
            assert same_bits(decode(case, slice(row, row + 1))[0], out[row])
        torch.set_num_threads(1)
        assert same_bits(decode(case), out)
        torch.set_num_threads(3)
        case.k, case.v = framed(case.k), framed(case.v)
        case.q = torch.cat([case.q, torch.full_like(case.q, NAN)], 1)[:, : case.q.shape[1]]
        assert same_bits(decode(case), out)

    check()
    within_budget(*map(torch.cat, zip(*found, strict=True)))


@pytest.mark.parametrize("size", [6.0, 60.0])
def test_flash_decode_of_sharp_scores(size: float, dtype, within_budget) -> None:
    """A few keys have all the weight, and exp underflows for the others."""
    torch.manual_seed(0)
    q, lengths = size * torch.randn(40, 6, 64), torch.arange(500, 540, dtype=torch.int32)
    k, v = torch.randn(2, 40, 3, 540, 64).to(dtype)
    slots = torch.arange(40)
    case = SimpleNamespace(
        q=q.to(dtype), k=k, v=v, table=slots.int()[:, None], slots=slots, lengths=lengths
    )
    exact, plain = (
        torch.cat(
            [
                ref._attend_one(q[None], k[:, :n], v[:, :n], n - 1).flatten(1)
                for q, k, v, n in zip(
                    case.q.to(kind), k.to(kind), v.to(kind), lengths.tolist(), strict=True
                )
            ]
        )
        for kind in (torch.float64, dtype)
    )
    within_budget(decode(case), exact, plain)


def test_pages_of_one_slot_are_enough() -> None:
    """The bodies find a sequence by its table, not by its slot."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 3, 1, 8, 16)
    pages = KVPages(k, v, torch.tensor([[2, 0]], dtype=torch.int32))
    lengths = [11]
    batch = batch_of(lengths, [1], [0], CPU)
    q = torch.randn(1, 2, 16)
    whole = [torch.cat([each[2:], each[:1]], 2) for each in (k, v)]
    expected = ref.attention_ref(q, *whole, whole_pages(whole[0]), batch)
    torch.testing.assert_close(NativeOps().attention(q, pages, batch), expected)
