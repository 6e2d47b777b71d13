"""The engine: any schedule gives each request what it gets alone, and pages add up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import lfm2_fast
from lfm2_fast.cache.page_memory import PAGE_SIZE, PageMemory
from lfm2_fast.engine.engine import Engine, QueueFull
from lfm2_fast.engine.request import Event, Request
from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.ops.sampling import SamplingParams
from tests.batches import fill, text, with_nan
from tests.engine.capturing import Capturing

DRAWN = SamplingParams(do_sample=True, temperature=1.3, top_k=40)


@pytest.fixture(scope="module")
def exact(tiny) -> Lfm2:
    """The trained checkpoint in float64, where only the text decides a token."""
    return lfm2_fast.load(tiny, device="cpu", dtype="float64", backend="eager").network


@pytest.fixture
def ahead(tiny) -> Lfm2:
    """The same, whose steps are launched one ahead, in buckets."""
    network = lfm2_fast.load(tiny, device="cpu", dtype="float64", backend="eager").network
    network.ops = Capturing()
    return network


def run(engine: Engine, steps: int = 10_000) -> dict[tuple[int, int], list[int]]:
    """Step until all requests have ended; the new tokens of each continuation."""
    found: dict[tuple[int, int], list[int]] = {}
    for _ in range(steps):
        if not engine.busy:
            break
        for event in engine.step():
            assert event.error is None, event.error
            if event.token is not None:
                found.setdefault((event.id, event.index), []).append(event.token)
    assert not engine.busy
    return found


def alone(model: Lfm2, request: Request) -> list[list[int]]:
    """Return each continuation of a request if nothing else runs and nothing is kept."""
    engine = Engine(model, max_rows=1, prefix_cache=False)
    id = engine.add(request)
    found = run(engine)
    return [found[id, index] for index in range(request.n)]


def all_is_free(engine: Engine) -> None:
    pool, dummy = engine.cache.pool, engine.cache.dummy_slot is not None
    assert pool.used == dummy and pool.used + pool.cached + pool.free == pool.memory.limit
    assert sorted(engine.slots.free) == list(range(engine.max_rows))
    assert engine.slots.index is None or len(engine.slots.index) == pool.cached


def test_requests_together_are_as_alone(native) -> None:
    requests = [
        Request(text(n, seed), sampling, max_tokens=count, seed=seed, n=copies)
        for n, seed, sampling, count, copies in (
            (5, 1, SamplingParams(), 20, 1),
            (90, 2, DRAWN, 12, 3),
            (1, 3, SamplingParams(repetition_penalty=1.3), 15, 1),
            (200, 4, SamplingParams(), 1, 1),
            (64, 5, DRAWN, 30, 2),
        )
    ]
    engine = Engine(native, max_rows=4)
    ids = [engine.add(request) for request in requests]
    found = run(engine)
    for id, request in zip(ids, requests, strict=True):
        assert [found[id, index] for index in range(request.n)] == alone(native, request)
    all_is_free(engine)
    statistics = engine.statistics
    assert statistics.new_tokens == 20 + 3 * 12 + 15 + 1 + 2 * 30
    assert len(statistics.first_token) == 8 and statistics.requests == 5


def test_each_request_ends_in_its_own_way(native) -> None:
    prompt = text(30)
    plain = alone(native, Request(prompt, max_tokens=20))[0]
    ends = plain[7]
    first = plain.index(ends)
    engine = Engine(native, max_rows=8)
    kinds = {
        engine.add(Request(prompt, max_tokens=20)): (plain, "length"),
        engine.add(Request(prompt, eos=(ends,), max_tokens=20)): (plain[: first + 1], "stop"),
        engine.add(Request(prompt, stop=lambda new: len(new) == 5)): (plain[:5], "stop"),
        engine.add(Request(prompt, max_tokens=3, eos=(999,))): (plain[:3], "length"),
    }
    reasons: dict[int, Any] = {}
    tokens: dict[int, list[int]] = {}
    while engine.busy:
        for event in engine.step():
            tokens.setdefault(event.id, []).append(event.token)
            if event.finish_reason:
                assert reasons.setdefault(event.id, event.finish_reason) == event.finish_reason
    for id, (wanted, reason) in kinds.items():
        assert tokens[id] == wanted and reasons[id] == reason
    all_is_free(engine)


def test_a_prefix_is_run_once(native) -> None:
    stem = text(4 * PAGE_SIZE + 10)
    engine = Engine(native, max_rows=2)
    first = Request(stem + text(80, 2), max_tokens=4)
    engine.add(first)
    run(engine)
    ran: list[int] = []
    chunks = engine.prefill.runner.run_chunks

    def noted(texts: Sequence[Sequence[int]], *args: Any, **kwargs: Any) -> torch.Tensor:
        ran.extend(map(len, texts))
        return chunks(texts, *args, **kwargs)

    engine.prefill.runner.run_chunks = noted  # type: ignore[method-assign]
    for seed in (3, 4):
        ran.clear()
        fill_unowned(engine)
        second = Request(stem + text(25, seed), max_tokens=6)
        id = engine.add(second)
        events = []
        while engine.busy:
            events += engine.step()
        assert [event.token for event in events] == alone(native, second)[0]
        # Four whole pages, and the rows of the fifth that are alike.
        assert events[0].cached_tokens == len(stem) and events[0].id == id
        assert sum(ran) == 25 + engine.cache.replay_length
    assert engine.statistics.prefix_hits == 2 * len(stem)


def fill_unowned(engine: Engine) -> None:
    """Fill all windows with NaN, and every page without owner that is not kept."""
    pool, cache = engine.cache.pool, engine.cache
    kept = {page: pool.memory.page(page).clone() for page in (*pool._owners, *pool._cached)}
    windows = [layer.rows.clone() for layer in cache.layers if hasattr(layer, "rows")]
    fill(cache, with_nan)
    for page, held in kept.items():
        pool.memory.page(page).copy_(held)
    live = {row.slot for row in engine.decode.rows}
    live |= {row.slot for row in engine.scheduler.prefilling if not cache.replay(row.slot)}
    for layer, rows in zip((x for x in cache.layers if hasattr(x, "rows")), windows, strict=True):
        for slot in live:
            layer.rows[slot] = rows[slot]


def test_other_salts_share_nothing(native) -> None:
    engine = Engine(native, max_rows=1)
    for salt, hits in ((b"", 0), (b"other", 0), (b"", 128)):
        engine.add(Request(text(150), max_tokens=2, salt=salt))
        events = []
        while engine.busy:
            events += engine.step()
        assert events[0].cached_tokens == hits


def test_shared_pages_are_never_written(native) -> None:
    stem = text(3 * PAGE_SIZE)
    engine = Engine(native, max_rows=4)
    engine.add(Request(stem + [9], max_tokens=2))
    run(engine)
    # The salt of a request without an adapter.
    match = engine.slots.index.match(stem, bytes(8))
    before = [engine.cache.pool.memory.page(page).clone() for page in match.pages]
    assert len(before) == 3
    for cut in (40, 64, 100, 191, 192):
        engine.add(Request(stem[:cut] + text(30, cut), DRAWN, max_tokens=70, n=2))
    run(engine)
    for page, held in zip(match.pages, before, strict=True):
        assert torch.equal(engine.cache.pool.memory.page(page), held)


@pytest.mark.slow
def test_thirty_requests_pass_through_a_pool_of_five_pages(exact) -> None:
    requests = [Request(text(45 + 7 * i % 40, i), max_tokens=15 + i % 10) for i in range(30)]
    engine = Engine(exact, max_rows=6, pages=5)
    ids = [engine.add(request) for request in requests]
    found = run(engine)
    assert engine.statistics.preemptions > 0
    for id, request in list(zip(ids, requests, strict=True))[::7]:
        assert [found[id, 0]] == alone(exact, request)
    all_is_free(engine)


def test_a_cancelled_request_frees_all_it_had(native) -> None:
    engine = Engine(native, max_rows=2, prefix_cache=False)
    long, short = Request(text(500), max_tokens=400), Request(text(5), max_tokens=8)
    for steps in range(9):
        cancelled, kept = engine.add(long), engine.add(short)
        waiting = engine.add(long)
        events: list[Event] = []
        for _ in range(steps):
            events += engine.step()
        engine.cancel(cancelled)
        engine.cancel(waiting)
        engine.cancel(12345)
        while engine.busy:
            events += engine.step()
        assert [e.token for e in events if e.id == kept] == alone(native, short)[0]
        for id in (cancelled, waiting):
            last = [event for event in events if event.id == id][-1]
            assert last.finish_reason == "cancelled" and last.token is None
        all_is_free(engine)


def test_a_deadline_ends_what_runs_and_what_waits(native) -> None:
    engine = Engine(native, max_rows=1)
    now = time.monotonic()
    ids = [engine.add(Request(text(5), max_tokens=500, deadline=now + 0.05)) for _ in range(2)]
    events = []
    while engine.busy:
        events += engine.step()
    assert time.monotonic() - now < 5
    assert {e.id for e in events if e.finish_reason == "deadline"} == set(ids)
    all_is_free(engine)


def test_logits_are_changed_as_asked(native) -> None:
    prompt = text(20)
    plain = alone(native, Request(prompt, max_tokens=12))[0]
    banned = {plain[0]: -1e9}
    assert plain[0] not in alone(native, Request(prompt, max_tokens=12, logit_bias=banned))[0]
    forced = alone(native, Request(prompt, max_tokens=6, logit_bias={77: 1e4}))[0]
    assert forced == [77] * 6
    varied = alone(
        native, Request(prompt, max_tokens=12, logit_bias={77: 30.0}, presence_penalty=1e4)
    )[0]
    assert varied.count(77) == 1 and len(set(varied)) == len(varied)
    often = alone(
        native, Request(prompt, max_tokens=12, logit_bias={77: 50.0}, frequency_penalty=9)
    )
    assert 1 < often[0].count(77) < 12
    late = alone(native, Request(prompt, eos=(plain[2],), min_tokens=6, max_tokens=12))[0]
    assert plain[2] not in late[:6] and len(late) >= 6
    seen: list[tuple[int, ...]] = []

    def hook(tokens: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tokens))
        return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor([len(tokens)]), 0)

    hooked = alone(native, Request(prompt, hook=hook, max_tokens=4))[0]
    assert hooked == [20, 21, 22, 23] and seen[-1] == (*prompt, 20, 21, 22)


def test_a_row_that_needs_its_logits_changes_no_other(native) -> None:
    engine = Engine(native, max_rows=4)
    requests = [
        Request(text(20), max_tokens=12),
        Request(text(9, 2), DRAWN, seed=4, max_tokens=12),
        Request(text(9, 3), max_tokens=5, logit_bias={77: 1e4}, logprobs=2),
    ]
    ids = [engine.add(request) for request in requests]
    found = run(engine)
    for id, request in zip(ids, requests, strict=True):
        assert [found[id, 0]] == alone(native, request)


def test_log_probabilities_are_those_of_the_logits(exact, tiny) -> None:
    prompt = text(100)
    engine = Engine(exact, max_rows=2, chunk=37)
    engine.add(Request(prompt, DRAWN, max_tokens=6, logprobs=3, prompt_logprobs=2, n=2))
    events = []
    while engine.busy:
        events += engine.step()
    for index in (0, 1):
        own = [event for event in events if event.index == index]
        tokens = [*prompt, *(event.token for event in own)]
        model = lfm2_fast.load(tiny, device="cpu", dtype="float64", backend="eager")
        scores = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        told = own[0].prompt_logprobs
        assert len(told) == 100 and told[0] is None
        for place, found in [*enumerate(told)][1:] + [*enumerate((e.logprobs for e in own), 100)]:
            row = scores[place - 1]
            assert found.token == pytest.approx(float(row[tokens[place]]), rel=1e-4)
            best = row.topk(len(found.best))
            assert [token for token, _ in found.best] == best.indices.tolist()


def test_a_preempted_prompt_reports_its_log_probabilities_once(exact) -> None:
    engine = Engine(exact, max_rows=2, chunk=37)
    engine.add(Request(text(4), max_tokens=30))
    engine.step()
    told = Request(text(100), max_tokens=2, prompt_logprobs=1)
    id = engine.add(told)
    engine.step()
    engine.step()
    assert engine.scheduler.prefilling and engine.runner.preempt()
    events = []
    while engine.busy:
        events += [event for event in engine.step() if event.id == id]
    assert len(events[0].prompt_logprobs) == 100 and events[1].prompt_logprobs is None


def test_an_end_token_that_a_hook_forces_ends_the_row(native) -> None:
    def hook(tokens: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor([9]), 0)

    engine = Engine(native, max_rows=1)
    engine.add(Request(text(5), eos=(9,), min_tokens=4, hook=hook, max_tokens=20))
    events = []
    while engine.busy:
        events += engine.step()
    assert [(event.token, event.finish_reason) for event in events] == [(9, "stop")]
    all_is_free(engine)


def test_priorities_come_first(native) -> None:
    engine = Engine(native, max_rows=1)
    order = [
        engine.add(Request(text(4, i), max_tokens=2, priority=p))
        for i, p in enumerate((0, 1, -1, 0))
    ]
    done = []
    while engine.busy:
        done += [event.id for event in engine.step() if event.finish_reason]
    assert done == [order[2], order[0], order[3], order[1]]


def test_a_long_prompt_does_not_stop_decoding_rows(native) -> None:
    engine = Engine(native, max_rows=3, chunk=32)
    writer = engine.add(Request(text(4), max_tokens=40))
    engine.step()
    engine.step()
    engine.add(Request(text(600, 2), max_tokens=1))
    short = engine.add(Request(text(20, 3), max_tokens=1))
    steps = []
    while engine.busy:
        steps.append([event.id for event in engine.step()])
    # A token a step for who writes; the short prompt waits for one chunk of the long.
    assert all(writer in each for each in steps[:19])
    assert next(i for i, each in enumerate(steps) if short in each) <= 2


def test_requests_that_cannot_run_are_refused(native) -> None:
    engine = Engine(native, max_rows=2, pages=2)
    for request, message in (
        (Request([]), "prompt has no tokens"),
        (Request([10**6]), "token 1000000 is not in this model's vocabulary"),
        (
            Request(text(128)),
            "prompt of 128 tokens and 1 new ones do not fit into the context of 128",
        ),
        (Request(text(9), max_tokens=0), "max_tokens must be at least 1"),
        (Request(text(9), n=0), "n must be at least 1"),
        (Request(text(9), logit_bias={4: float("nan")}), "logit_bias of 4 must be a number"),
        (Request(text(9), logprobs=-1), "logprobs must be between 0"),
        (Request(text(9), seed=-1), "seed must be a whole number from 0"),
        (Request(text(9), seed=2**64), "seed must be a whole number from 0"),
        (Request(text(9), min_tokens=4, max_tokens=3), "min_tokens must be from 0 to max_tokens=3"),
        (Request(text(9), adapter="mine"), "adapter 'mine' is not loaded"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.add(request)
    for given, message in (
        ({"max_rows": 0}, "max_rows must be at least 1"),
        ({"memory": 1000}, "memory=1000 is 0 MiB"),
        ({"memory": "lots"}, "memory must be bytes, or like '8GB'"),
        ({"memory": "101%"}, "at most '100%' of the free memory, got '101%'"),
        ({"memory": "1GB", "pages": 3}, "memory or pages, not both"),
        ({"pages": 0}, "pages must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(native, **given)


def test_a_list_that_grows_later_changes_no_request(native) -> None:
    prompt, ends = text(20), [5]
    engine = Engine(native, max_rows=1)
    request = Request(prompt, eos=ends, max_tokens=9)
    expected = alone(native, request)[0]
    id = engine.add(request)
    first = [event.token for event in engine.step()]
    prompt += [7, 8]
    ends.append(expected[3])
    assert first + run(engine)[id, 0] == expected


def test_a_full_queue_refuses(native) -> None:
    """Rows that can run do not wait. All rows of a request are accepted, or none."""
    engine = Engine(native, max_rows=2, max_waiting=1)
    requests = [Request(text(9, i), max_tokens=3, n=n) for i, n in enumerate((1, 1, 3))]
    for request in requests:
        engine.add(request)
    for _ in range(2):
        with pytest.raises(QueueFull, match="3 continuations wait for a row and max_waiting is 1"):
            engine.add(requests[0])
        engine.step()
    assert sum(map(len, run(engine).values())) <= 15
    engine.add(requests[0])
    with pytest.raises(QueueFull, match="0 continuations wait for a row and max_waiting is 0"):
        full = Engine(native, max_rows=1, max_waiting=0)
        full.add(requests[0])
        full.add(requests[0])


def test_callers_python_that_raises_ends_its_row_alone(native) -> None:
    """Faults are in ``stop``, in ``hook``, and in the result of a hook."""

    def stop(written: Sequence[int]) -> bool:
        if len(written) == 3:
            raise KeyError("mine")
        return False

    def raises(tokens: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        raise KeyError("mine")

    good = Request(text(20), max_tokens=8)
    expected = alone(native, good)[0]
    for bad, tokens, kind in (
        (Request(text(9, 2), stop=stop, max_tokens=8), 3, KeyError),
        (Request(text(9, 2), hook=raises, max_tokens=8), 0, KeyError),
        (Request(text(9, 2), hook=lambda tokens, logits: logits[:3], max_tokens=8), 0, ValueError),
    ):
        engine = Engine(native, max_rows=2)
        id, other = engine.add(bad), engine.add(good)
        events = []
        while engine.busy:
            events += engine.step()
        assert [event.token for event in events if event.id == other] == expected
        own = [event for event in events if event.id == id]
        assert [event.token is not None for event in own] == [True] * tokens + [False]
        assert own[-1].finish_reason == "error" and isinstance(own[-1].error, kind)
        all_is_free(engine)


def test_memory_is_taken_at_once_and_reported(native, monkeypatch) -> None:
    engine = Engine(native, max_rows=2, memory="64MB")
    assert engine.cache.pool.memory.count == engine.cache.pool.memory.limit
    assert f"room for {engine.tokens:,} tokens together" in str(engine)

    def full(self: Any, pages: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PageMemory, "grow", full)
    with pytest.raises(ValueError, match="memory='64MB' cannot be taken from cpu.*give less"):
        Engine(native, max_rows=2, memory="64MB")


def test_memory_is_counted_in_pages(native) -> None:
    engine = Engine(native, max_rows=2, memory="64MB")
    page = engine.cache.pool.memory.page_bytes
    windows = engine.cache.nbytes - engine.cache.pool.memory.nbytes
    assert engine.tokens == min(
        (64 * 10**6 - windows) // page, 2 * engine.max_length // 64
    ) * 64 or (abs(engine.tokens // 64 * page + windows - 64 * 10**6) < 2 * page)
    assert Engine(native, max_rows=1, memory="10%").tokens > 0


def test_logits_that_break_end_their_row_alone(tiny) -> None:
    model = lfm2_fast.load(tiny, device="cpu", dtype="float32").network
    plain = alone(model, Request(text(20), max_tokens=12))[0]
    good = alone(model, Request(text(9, 5), max_tokens=12))[0]
    broken = next(token for token in plain if token not in good and token not in text(9, 5))
    head = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    model.lm_head.weight = head
    model.embed_tokens.weight.data[broken] = torch.nan
    engine = Engine(model, max_rows=2)
    ids = [
        engine.add(Request(text(20), max_tokens=12)),
        engine.add(Request(text(9, 5), max_tokens=12)),
    ]
    events = []
    while engine.busy:
        events += engine.step()
    assert [e.token for e in events if e.id == ids[1]] == good
    last = [e for e in events if e.id == ids[0]][-1]
    assert last.finish_reason == "error" and isinstance(last.error, lfm2_fast.LogitsError)
    all_is_free(engine)


def test_a_fault_reaches_every_request_and_the_next_works(native, monkeypatch) -> None:
    engine = Engine(native, max_rows=1)
    engine.add(Request(text(5), max_tokens=9))
    engine.add(Request(text(5), max_tokens=9))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.decode, "launch", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError) as caught:
            engine.step()
    engine.reset(caught.value)
    events = engine.step()
    assert [(e.finish_reason, e.error) for e in events] == [("error", caught.value)] * 2
    request = Request(text(5), max_tokens=9)
    id = engine.add(request)
    assert run(engine)[id, 0] == alone(native, request)[0]


def test_sleep_gives_the_memory_back(native) -> None:
    engine = Engine(native, max_rows=2)
    request = Request(text(70), max_tokens=3)
    id = engine.add(request)
    with pytest.raises(RuntimeError, match="without requests"):
        engine.sleep()
    before = run(engine)[id, 0]
    for put_away in (engine.sleep, engine.close, engine.close):
        put_away()
        assert not hasattr(engine, "cache") and not engine.busy and engine.rows == []
        engine.cancel(id)
        for use in (engine.step, lambda: engine.add(request), engine.clear_prefix_cache):
            with pytest.raises(RuntimeError, match="asleep or closed; call wake"):
                use()
    engine.wake()
    engine.wake()
    id = engine.add(request)
    assert run(engine)[id, 0] == before


PROMPTS = [text(n, seed) for n, seed in ((1, 1), (20, 2), (63, 3), (64, 4), (65, 5), (150, 6))]
PROMPTS += [PROMPTS[5][:100] + text(30, 7), PROMPTS[5][:128] + text(3, 8), PROMPTS[4] + text(9, 9)]


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"sampling": DRAWN},
    "ends": {"eos": tuple(range(8, 900, 5))},
    "ends late": {"eos": tuple(range(8, 900, 5)), "min_tokens": 6, "sampling": DRAWN},
    "stops": {"stop": lambda written: len(written) == 5},
    "penalised": {"sampling": SamplingParams(repetition_penalty=1.4)},
    "presence": {"presence_penalty": 3.0, "frequency_penalty": 1.0},
    "told": {"logprobs": 2},
    "urgent": {"priority": -1},
    "streamed": {"stream": True},
}


class Schedules(RuleBasedStateMachine):
    """Requests that come and go at random, against what each is alone."""

    model: Lfm2
    known: dict[Any, list[list[int]]]

    @initialize(
        rows=st.integers(1, 6),
        pages=st.integers(5, 12),
        chunk=st.sampled_from([1, 3, 17, 64, 300]),
        keeps=st.booleans(),
    )
    def begin(self, rows: int, pages: int, chunk: int, keeps: bool) -> None:
        self.engine = Engine(
            self.model, max_rows=rows, pages=pages, chunk=chunk, prefix_cache=keeps
        )
        # Drafts are made for any cost of steps.
        self.engine.decode.speculation.costs.of = lambda tokens: 1.0
        self.asked: dict[int, tuple[Any, Request]] = {}
        self.found: dict[tuple[int, int], list[int]] = {}
        self.cancelled: set[int] = set()

    @rule(
        prompt=st.integers(0, len(PROMPTS) - 1),
        count=st.sampled_from([1, 2, 9, 9, 70]),
        kind=st.sampled_from(sorted(KINDS)),
        n=st.integers(1, 2),
        drafts=st.sampled_from([0, 6]),
    )
    def add(self, prompt: int, count: int, kind: str, n: int, drafts: int) -> None:
        given = KINDS[kind]
        if given.get("min_tokens", 0) > count:
            return
        given = {**given, "prompt_lookup": drafts, "lookup_ngram": 1}
        request = Request(PROMPTS[prompt], max_tokens=count, seed=prompt, n=n, **given)
        self.asked[self.engine.add(request)] = (prompt, count, kind), request

    @precondition(lambda self: self.asked)
    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        id = list(self.asked)[which % len(self.asked)]
        self.engine.cancel(id)
        self.cancelled.add(id)

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            fill_unowned(self.engine)
            self.take(self.engine.step())
            self.pages_add_up()

    def take(self, events: list[Event]) -> None:
        for event in events:
            assert event.error is None, event.error
            if event.token is not None:
                self.found.setdefault((event.id, event.index), []).append(event.token)

    def pages_add_up(self) -> None:
        engine, pool = self.engine, self.engine.cache.pool
        owned = [page for slot in range(engine.max_rows) for page in engine.cache.pages(slot)]
        dummy = engine.cache.dummy_slot is not None
        assert pool.used == len(set(owned)) + dummy
        assert sum(pool._owners.values()) == len(owned) + dummy
        assert pool.used + pool.cached + pool.free == pool.memory.limit

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        while self.engine.busy:
            self.take(self.engine.step())
        all_is_free(self.engine)
        for id, (key, request) in self.asked.items():
            if key not in self.known:
                plain = replace(request, n=2, prompt_lookup=0)
                self.known[key] = alone(self.model, plain)
            for index, wanted in enumerate(self.known[key][: request.n]):
                found = self.found.get((id, index), [])
                assert found == wanted[: len(found)]
                assert id in self.cancelled or len(found) == len(wanted)


def schedules(model: Lfm2, examples: int) -> None:
    known: dict[Any, list[list[int]]] = {}
    machine = type("Machine", (Schedules,), {"model": model, "known": known})
    run_state_machine(machine, examples)


def run_state_machine(machine: Callable[[], RuleBasedStateMachine], examples: int) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=checks,
        ),
    )


@pytest.mark.slow
def test_any_schedule_gives_each_request_what_it_gets_alone(exact) -> None:
    schedules(exact, 5)


@pytest.mark.slow
def test_any_schedule_a_step_ahead_does_too(ahead, graphs) -> None:
    """Steps run in buckets with a dummy slot, several in a launch, and the host reads them late."""
    schedules(ahead, 5)


@pytest.mark.nightly
def test_a_hundred_thousand_steps(exact) -> None:
    schedules(exact, 400)


@pytest.mark.nightly
def test_a_hundred_thousand_steps_ahead(ahead, graphs) -> None:
    schedules(ahead, 200)
