"""The C++ bodies on the CPU against the reference: values, hostile inputs, threads, models."""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lfm2_fast
from lfm2_fast import native, reference, sampling
from lfm2_fast import reference as ref
from lfm2_fast.batch import Batch
from lfm2_fast.cache import KVPages
from lfm2_fast.ops import BackendError, choose
from lfm2_fast.ops_native import NativeOps
from lfm2_fast.sampling import SamplingParams, SamplingState

CPU = torch.device("cpu")
EPS = 1e-5
NAN = float("nan")
BODIES = torch.ops.lfm2_fast

_lacking = native.why_not(CPU)
pytestmark = [
    pytest.mark.skipif(_lacking is not None, reason=str(_lacking)),
    pytest.mark.usefixtures("threads"),
]


def a_batch(data: st.DataObject, tokens: int, slots: int = 5) -> Batch:
    """Hypothesis' choice of sequences, at most ``tokens`` of each."""
    live = data.draw(st.permutations(range(slots)))[: data.draw(st.integers(1, slots))]
    counts = [data.draw(st.integers(1, tokens)) for _ in live]
    held = [data.draw(st.sampled_from([0, 1, 2, 7, 15, 16, 17, 40])) for _ in range(slots)]
    cache: Any = SimpleNamespace(slots=slots, lengths=held)
    return Batch.prepare(counts, live, cache, CPU)


def fold_table(slots: int, per_slot: int) -> torch.Tensor:
    """Which pages hold which slot: in any order, two more than are needed."""
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
    """Neither exp's overflow nor its underflow shows."""
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
            q = ref.qk_norm_rope_ref(
                qkv.to(dtype), *(w.to(dtype) for w in weights), EPS, cos_sin, k[0], v[0], batch
            )
            return q, k[0], v[0]

        q = torch.full((tokens, heads, head_dim), NAN, dtype=dtype)
        k, v = framed(empty), framed(empty)
        cos_sin = ref.rope_ref(batch.positions, inv_freq, dtype)
        given = framed(qkv) if data.draw(st.booleans()) else qkv
        runs = table, batch.cu_seqlens, batch.slots, batch.lengths
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


def a_context(data, dtype: torch.dtype, lengths: list[int]) -> SimpleNamespace:
    """One query per sequence over pages that are NaN wherever nothing may be read."""
    kv_heads = data.draw(st.integers(1, 3))
    head_dim = data.draw(st.sampled_from([2, 16, 24, 64, 100, 128]))
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
    """Where few keys have all the weight, and exp underflows for the others."""
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


def test_argmax(dtype) -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, 4000).to(dtype)
    rows[1, 77:] = rows[1].max()
    rows[2, 3999] = math.inf
    rows[3] = -math.inf
    rows[4, [9, 500]] = 99.0
    rows = torch.cat([rows, torch.tensor([-0.0, 0.0]).repeat(2000)[None].to(dtype)])
    out = torch.full((len(rows),), -1)
    BODIES.argmax_native(rows[:, :3999], out)
    expected = [(row == row.max()).nonzero()[0].item() for row in rows[:, :3999]]
    assert out.tolist() == expected
    rows[4, 700] = NAN
    BODIES.argmax_native(rows, out)
    assert out[4] == 700 and out[2] == 3999


PARAMS = {
    "nothing": {},
    "temperature": {"temperature": 0.6},
    "top_k_1": {"top_k": 1},
    "top_k": {"top_k": 50},
    "top_k_most": {"top_k": 900},
    "top_k_more_than_there_are": {"top_k": 9999},
    "top_p_0": {"top_p": 0.0},
    "top_p": {"top_p": 0.9},
    "top_p_most": {"top_p": 0.9999},
    "min_p": {"min_p": 0.1},
    "min_p_1": {"min_p": 1.0},
    "all": {"temperature": 0.8, "top_k": 300, "top_p": 0.9, "min_p": 0.02},
    "lfm2": {"temperature": 0.3, "min_p": 0.15},
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
@pytest.mark.parametrize("vocab", [1, 7, 1000, 5000])
def test_filters_and_draws_are_sampling_pys(params: dict, vocab: int, same_bits) -> None:
    """Token for token, for float32 scores without ties."""
    torch.manual_seed(1)
    by = SamplingState([SamplingParams(do_sample=True, **params)] * 40)
    logits = 4 * torch.randn(40, vocab)
    seen = torch.rand(40, vocab) < 0.3
    uniform = torch.rand(40, dtype=torch.float64)
    for penalty in (1.3, 0.7):
        each, out = torch.full((40,), penalty, dtype=torch.float64), torch.empty(40, vocab)
        BODIES.penalize_native(logits, seen, each, out)
        assert same_bits(out, sampling.penalize(logits, seen, each))
    expected, ours = sampling.warp(logits, by), warped(logits, by)
    assert same_bits(ours, expected)
    tokens = torch.full((40,), -1)
    BODIES.draw_native(ours, uniform, tokens)
    assert tokens.tolist() == sampling.draw(expected, uniform).tolist()


def warped(scores: torch.Tensor, by: SamplingState) -> torch.Tensor:
    out = torch.full_like(scores, NAN)
    BODIES.warp_native(scores, by.temperature, by.top_k, by.top_p, by.min_p, out)
    return out


def test_every_row_has_its_own_filters(same_bits) -> None:
    torch.manual_seed(0)
    rows = [SamplingParams(do_sample=True, **params) for params in PARAMS.values()]
    logits, by = 4 * torch.randn(len(rows), 700), SamplingState(rows)
    out = warped(logits, by)
    for row in range(len(rows)):
        assert same_bits(out[row : row + 1], sampling.warp(logits[row : row + 1], by.pick([row])))


def test_ties() -> None:
    """What ties with the k-th is kept; of ties where top-p cuts, the last ones are."""
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    kept = warped(scores, SamplingState([SamplingParams(do_sample=True, top_k=2)])).isfinite()
    assert kept.tolist() == [[False, True, True, True, True, False]]
    even, by = torch.zeros(1, 1000), SamplingState([SamplingParams(do_sample=True, top_p=0.25)])
    kept = warped(even, by).isfinite()
    assert not kept[0, :749].any() and kept[0, 751:].all()
    assert torch.equal(kept, sampling.warp(even, by).isfinite())


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_token_of_no_mass_is_never_drawn(data: st.DataObject) -> None:
    vocab = data.draw(st.integers(1, 300))
    scores = torch.full((1, vocab), -math.inf)
    for place in data.draw(st.sets(st.integers(0, vocab - 1), min_size=1, max_size=5)):
        scores[0, place] = data.draw(st.floats(-90, 90, width=32))
    edge = data.draw(st.sampled_from([0.5 / 2**32, 0.5, 1 - 0.5 / 2**32]))
    uniform, token = torch.tensor([edge], dtype=torch.float64), torch.tensor([-1])
    BODIES.draw_native(scores, uniform, token)
    assert scores.double().softmax(-1)[0, token] > 0


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_logits_that_are_no_numbers_stay_in_bounds(bad: float) -> None:
    by = SamplingState([SamplingParams(do_sample=True, top_k=5, top_p=0.5, min_p=0.1)] * 2)
    for places in (slice(3, 4), slice(None)):
        scores, tokens = torch.randn(2, 500), torch.full((2,), -1)
        scores[:, places] = bad
        best = scores.argmax(-1)
        BODIES.argmax_native(scores, tokens)
        assert tokens.tolist() == best.tolist()
        assert warped(scores, by).shape == scores.shape
        BODIES.draw_native(scores, torch.tensor([0.1, 0.9], dtype=torch.float64), tokens)
        if bad != -math.inf or places == slice(None):
            assert tokens.tolist() == best.tolist()
        else:
            assert 3 not in tokens.tolist() and 0 <= tokens.min() and tokens.max() < 500


def test_numbers_are_sampling_pys() -> None:
    torch.manual_seed(0)
    seeds, rows, positions = torch.randint(-(2**62), 2**62, (3, 200)).unbind()
    rows, positions = rows.abs() % 2**40, positions.abs() % 2**33
    out = torch.full((200,), NAN, dtype=torch.float64)
    BODIES.philox_native(seeds, rows, positions, out)
    assert torch.equal(out, sampling.philox(seeds, rows, positions))


def arguments() -> dict[str, dict[str, Any]]:
    """Small good arguments of every operation."""
    x, ints = torch.randn(3, 8), torch.arange(3)
    runs = {
        "cu_seqlens": torch.tensor([0, 1, 2, 3], dtype=torch.int32),
        "slots": ints,
        "lengths": torch.tensor([4, 5, 6], dtype=torch.int32),
    }
    pages = torch.zeros(6, 1, 4, 8)
    paged = {
        "k_pages": pages,
        "v_pages": pages.clone(),
        "table": torch.arange(6, dtype=torch.int32).view(3, 2),
    }
    conv = {
        "bcx": torch.randn(3, 24),
        "weight": torch.randn(8, 3),
        "bias": torch.randn(8),
        "window": torch.zeros(3, 4, 8),
    }
    bf16 = {name: tensor.bfloat16() for name, tensor in paged.items() if name != "table"}
    prefill = {
        "q": torch.randn(3, 2, 8).bfloat16(), **bf16, "table": paged["table"], **runs,
        "out": torch.zeros(3, 16).bfloat16(),
    }  # fmt: skip
    floats = torch.full((3,), 0.5, dtype=torch.float64)
    numbers = torch.randint(-127, 128, (6, 8), dtype=torch.int8)
    matrix = {"weight": numbers, "scales": torch.rand(6)}
    return {
        "rms_norm": {"x": x, "weight": torch.randn(8), "eps": EPS, "out": torch.zeros(3, 8)},
        "add_rms_norm": {
            "x": x, "delta": x.clone(), "weight": torch.randn(8), "eps": EPS,
            "total": torch.zeros(3, 8), "out": torch.zeros(3, 8),
        },
        "swiglu": {"gate_up": x, "out": torch.zeros(3, 4)},
        "gated_conv_step": {**conv, "positions": ints, "slots": ints, "out": torch.zeros(3, 8)},
        "gated_conv": {**conv, **runs, "out": torch.zeros(3, 8)},
        "rope": {
            "positions": ints, "inv_freq": torch.rand(4),
            "cos": torch.zeros(3, 1, 8), "sin": torch.zeros(3, 1, 8),
        },
        "qk_norm_rope": {
            "qkv": torch.randn(3, 32), "q_weight": torch.randn(8), "k_weight": torch.randn(8),
            "eps": EPS, "cos": torch.rand(3, 1, 8), "sin": torch.rand(3, 1, 8), **paged, **runs,
            "q": torch.zeros(3, 2, 8),
        },
        "flash_decode": {
            "q": torch.randn(3, 2, 8), **paged, "slots": ints, "lengths": runs["lengths"],
            "out": torch.zeros(3, 16),
        },
        **({"flash_prefill": prefill} if native.prefills(torch.bfloat16) else {}),
        "norm_linear": {
            "x": x, "norm": torch.randn(8), "eps": EPS, **matrix, "bias": torch.randn(6),
            "out": torch.zeros(3, 6),
        },
        "linear_add": {
            "y": x, **matrix, "bias": torch.randn(6), "residual": torch.randn(3, 6),
            "out": torch.zeros(3, 6),
        },
        "norm_swiglu": {
            "x": x, "norm": torch.randn(8), "eps": EPS, **matrix, "out": torch.zeros(3, 3),
        },
        "quantize": {
            "x": x, "out": torch.zeros(3, 8, dtype=torch.int8), "scales": torch.zeros(3),
        },
        "finish_products": {
            "products": torch.ones(3, 6, dtype=torch.int32), "token_scales": torch.rand(3),
            "row_scales": torch.rand(6), "bias": torch.randn(6), "out": torch.zeros(3, 6),
        },
        "argmax": {"logits": x, "out": torch.zeros(3, dtype=torch.int64)},
        "penalize": {"logits": x, "seen": x > 0, "penalty": floats, "out": torch.zeros(3, 8)},
        "warp": {
            "logits": x, "temperature": floats, "top_k": ints, "top_p": floats, "min_p": floats,
            "out": torch.zeros(3, 8),
        },
        "philox": {"seeds": ints, "rows": ints, "positions": ints, "out": floats.clone()},
        "draw": {"scores": x, "uniform": floats, "out": torch.zeros(3, dtype=torch.int64)},
    }  # fmt: skip


@pytest.mark.parametrize("name", arguments())
def test_schemas_say_what_is_written(name: str) -> None:
    body = getattr(BODIES, f"{name}_native").default
    torch.library.opcheck(body, tuple(arguments()[name].values()))


def hostile(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Tensors that cannot stand in for ``tensor``: another type, size, rank or layout."""
    wrong = [tensor.to(torch.complex64), tensor[None], tensor[..., 0], tensor.new_empty(0)]
    wrong.append(torch.stack([tensor, tensor], -1)[..., 0])
    wrong.append(tensor.half() if tensor.dtype == torch.float32 else tensor.float())
    wrong.append(torch.cat([tensor, tensor], 0))
    return wrong


# What an operation goes by is right by definition: its size, or its type.
GIVEN = {
    "table": "size", "inv_freq": "size", "window": "size", "k_pages": "size",
    "logits": "type", "quantize.x": "type", "finish_products.out": "type",
}  # fmt: skip


@pytest.mark.parametrize("name", arguments())
def test_wrong_arguments_are_refused(name: str) -> None:
    body = getattr(BODIES, f"{name}_native")
    body(**arguments()[name])
    for place, value in arguments()[name].items():
        by = GIVEN.get(place) or GIVEN.get(f"{name}.{place}")
        for wrong in hostile(value) if isinstance(value, torch.Tensor) else []:
            if by == "type" and wrong.dtype == torch.float16:
                continue
            if (
                by == "size"
                and wrong.dtype == value.dtype
                and wrong.dim() == value.dim()
                and wrong.is_contiguous()
            ):
                continue
            with pytest.raises(RuntimeError):
                body(**{**arguments()[name], place: wrong})


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("gated_conv_step", {"slots": [0, 1, 3]}, "slot 3 is none of 3"),
        ("gated_conv_step", {"slots": [0, 1, -1]}, "slot -1"),
        ("gated_conv_step", {"positions": [0, -1, 2]}, "position -1"),
        ("gated_conv", {"slots": [0, 1, 7]}, "slot 7"),
        ("gated_conv", {"cu_seqlens": [0, 2, 1, 3]}, "must not fall"),
        ("gated_conv", {"cu_seqlens": [0, 1, 2, 2]}, "from 0 to 3"),
        ("gated_conv", {"lengths": [4, 0, 6]}, "context of 0"),
        ("qk_norm_rope", {"lengths": [4, 9, 6]}, "too few for 9 tokens"),
        ("qk_norm_rope", {"table": [[0, 6], [2, 3], [4, 5]]}, None),
        ("qk_norm_rope", {"table": [[6, 1], [2, 3], [4, 5]]}, "page 6 is none of 6"),
        ("flash_decode", {"lengths": [4, 0, 6]}, "nothing to attend to"),
        ("flash_decode", {"lengths": [4, 9, 6]}, "too few for 9 tokens"),
        ("flash_decode", {"table": [[0, 1], [-1, 3], [4, 5]]}, "page -1"),
        ("flash_decode", {"slots": [0, 1, 3]}, "slot 3"),
    ],
)
def test_places_that_are_not_there_are_refused(name: str, changed: dict, message: str) -> None:
    given = arguments()[name]
    for place, values in changed.items():
        given[place] = torch.tensor(values, dtype=given[place].dtype)
    body = getattr(BODIES, f"{name}_native")
    if message is None:
        body(**given)
    else:
        with pytest.raises(RuntimeError, match=message):
            body(**given)


def test_no_tokens() -> None:
    kept = ("table", "window", "inv_freq", "weight", "q_weight", "k_weight", "bias")
    kept += ("k_pages", "v_pages", "norm", "scales", "row_scales")
    for name, some in arguments().items():
        none = {
            place: value
            if not isinstance(value, torch.Tensor) or (place in kept and name != "quantize")
            else value[:0]
            for place, value in some.items()
        }
        if "cu_seqlens" in none:
            none["cu_seqlens"] = torch.zeros(1, dtype=torch.int32)
        getattr(BODIES, f"{name}_native")(**none)


CHANGED = {
    "plain": {},
    "odd": {"conv_L_cache": 5, "conv_bias": True, "head_dim": 24, "num_key_value_heads": 3},
    "wide": {"conv_L_cache": 11, "num_attention_heads": 4, "num_key_value_heads": 4},
    "attention_first": {
        "conv_L_cache": 2,
        "tie_word_embeddings": False,
        "layer_types": ["full_attention", "conv", "full_attention", "full_attention", "conv"],
    },
}
# Tokens by slot: prompts; then a second turn, a chunk, a step and a new prompt in one batch; then
# a step of all.
STEPS = [{2: 35, 0: 1, 3: 5}, {3: 4, 2: 1, 1: 9, 0: 1}, {1: 1, 0: 1, 3: 1, 2: 1}]


def logits(
    model: lfm2_fast.Lfm2ForCausalLM, steps: list[dict[int, int]] = STEPS
) -> list[torch.Tensor]:
    cache = model.new_cache(4)
    generator = torch.Generator().manual_seed(1)
    found = []
    for step in steps:
        batch = Batch.prepare(list(step.values()), list(step), cache, CPU)
        tokens = torch.randint(8, 307, (sum(step.values()),), generator=generator)
        found.append(model.run(tokens, batch, cache))
    return found


@pytest.fixture
def poisoned(monkeypatch) -> None:
    """New tensors begin as NaN, so that what no body wrote shows."""
    new_empty = torch.Tensor.new_empty

    def poison(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = new_empty(*args, **kwargs)
        return made.fill_(NAN if made.is_floating_point() else -(2**40))

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)


@pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED.keys())
def test_models_equal_eager(random_checkpoint, poisoned, dtype, within_budget, changed) -> None:
    def load(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        model = lfm2_fast.load(
            random_checkpoint(**changed), device="cpu", dtype=dtype, backend=backend
        )
        assert model.ops.name == backend
        return logits(model)

    exact, plain = load("eager", torch.float64), load("eager", dtype)
    for ours, a, b in zip(load("native", dtype), exact, plain, strict=True):
        within_budget(ours, a, b)


SERVING = ("attention_ref", "linear_ref", "scaled_ref", "embed_ref")


def test_the_bodies_are_what_runs(random_checkpoint, monkeypatch) -> None:
    """Of the reference, only the projections and the attention of many tokens still serve."""
    model = lfm2_fast.load(random_checkpoint(), device="cpu")
    assert model.ops.name == "native"
    expected = logits(model)

    def refuse(*args: object) -> None:
        raise AssertionError("the reference ran")

    for name in dir(reference):
        if name.endswith("_ref") and name not in SERVING:
            monkeypatch.setattr(reference, name, refuse)
    for ours, same in zip(logits(model), expected, strict=True):
        assert torch.equal(ours, same)
    one = {slot: 1 for slot in range(4)}
    monkeypatch.setattr(reference, "attention_ref", refuse)
    monkeypatch.setattr(reference, "linear_ref", refuse)
    logits(model, [one, one])


def test_threads_do_not_meet(random_checkpoint) -> None:
    """One model, two Python threads with a cache each: what each alone gives."""
    model = lfm2_fast.load(random_checkpoint(), device="cpu")
    steps = [{0: 30, 1: 3}] + [{0: 1, 1: 1, 2: 1}] * 12
    expected = logits(model, steps)
    found: list[Any] = [None, None]

    def work(i: int) -> None:
        found[i] = [logits(model, steps) for _ in range(3)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for run in found[0] + found[1]:
        assert all(torch.equal(a, b) for a, b in zip(run, expected, strict=True))


def test_what_cannot_run_is_said() -> None:
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        assert choose("auto", CPU, kind).name == choose("native", CPU, kind).name == "native"
    assert choose("auto", CPU, torch.float64).name == "eager"
    with pytest.raises(BackendError, match="float64"):
        choose("native", CPU, torch.float64)
    with pytest.raises(BackendError, match="mps"):
        choose("native", torch.device("mps"), torch.float32)


@pytest.mark.skipif(native.prefills(torch.bfloat16), reason="test_native_prefill.py's part")
def test_prompts_need_avx512_bf16() -> None:
    """The body says so, and PyTorch's attention serves; the models above show that."""
    q = torch.randn(3, 2, 8).bfloat16()
    pages = torch.randn(1, 1, 4, 8).bfloat16()
    bounds, one = torch.tensor([0, 3], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    places = one, bounds, torch.zeros(1, dtype=torch.int64), bounds[1:]
    with pytest.raises(RuntimeError, match="no AVX512_BF16"):
        BODIES.flash_prefill_native(q, pages, pages, *places, q.flatten(1))


def test_pages_of_one_slot_are_enough() -> None:
    """The bodies find a sequence by its table, not by its slot."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 3, 1, 8, 16)
    pages = KVPages(k, v, torch.tensor([[2, 0]], dtype=torch.int32))
    cache: Any = SimpleNamespace(slots=1, lengths=[11])
    batch = Batch.prepare([1], [0], cache, CPU)
    q = torch.randn(1, 2, 16)
    whole = KVPages(torch.cat([k[2:], k[:1]], 2), torch.cat([v[2:], v[:1]], 2), pages.table)
    expected = ref.attention_ref(q, whole.k, whole.v, batch)
    torch.testing.assert_close(NativeOps().attention(q, pages, batch), expected)
