"""Drafts change no text: each request gets the same text as without, beside any other requests."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast
from bench.cpu.adapters import write_adapter
from lfm2_fast.cache.page_pool import CacheError
from lfm2_fast.engine import speculation
from lfm2_fast.engine.assistant import Assistant
from lfm2_fast.engine.draft_length import Acceptance, StepCosts, draft_lengths
from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.model_runner import new_cache
from lfm2_fast.engine.prompt_lookup import PromptLookup
from lfm2_fast.engine.request import Event, Request, Row
from lfm2_fast.engine.speculation import IDLE
from lfm2_fast.engine.step_buffers import MAX_STEPS
from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.ops.sampling import SamplingParams
from tests.batches import events_by_request, text
from tests.engine.capturing import Capturing

DRAWN = SamplingParams(do_sample=True, temperature=0.7, top_k=8)
LOOP = text(40) * 2


class Only:
    """A constraint: of the vocabulary's multiples of three, and only after what was accepted."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def prepare(self, written: Sequence[int]) -> None: ...

    def allowed(self, written: Sequence[int]) -> torch.Tensor:
        assert len(written) == len(self.asked), "a draft was shown, or a token was skipped"
        self.asked.append(written[-1] if written else -1)
        bits = torch.arange(4096) % 3 == 0
        return (bits.view(-1, 32).long() << torch.arange(32)).sum(1).int()


@pytest.fixture
def eager(tiny: Path) -> Lfm2:
    return lfm2_fast.load(tiny, device="cpu", dtype="float64", backend="eager").network


@pytest.fixture
def known(monkeypatch) -> list[list[int]]:
    """Whole texts that lookups know from the first; of five tokens they tell one wrong.

    Steps cost nothing more for more tokens, so that drafts are always made.
    """
    found: list[list[int]] = []

    def draft(self: PromptLookup, place: int, count: int) -> list[int]:
        at = len(self._text)
        texts = [each for each in found if each[:at] == self._text]
        drafted = [*(texts[0][at:] if texts else []), *range(20, 30)][:count]
        return [t + ((at + i) % 5 == 0) for i, t in enumerate(drafted)]

    monkeypatch.setattr(StepCosts, "of", lambda self, tokens: 1.0 + 0.01 * tokens)
    monkeypatch.setattr(PromptLookup, "find", lambda self: (1, 4))
    monkeypatch.setattr(PromptLookup, "draft", draft)
    return found


def requests() -> list[Request]:
    """Requests of all kinds; some end by a token or a condition in the middle of a draft."""
    seen: list[int] = []

    def hook(tokens: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append(len(tokens))
        assert seen == list(range(seen[0], seen[0] + len(seen)))
        return logits.index_fill(0, torch.tensor([tokens[-40]]), 50.0)

    return [
        Request(LOOP, max_tokens=50),
        Request(LOOP, DRAWN, max_tokens=40, seed=3, n=2),
        Request(text(9, 2), max_tokens=20),
        Request(LOOP, SamplingParams(repetition_penalty=1.2), max_tokens=40),
        Request(LOOP, replace(DRAWN, repetition_penalty=1.1), max_tokens=40, seed=9),
        Request(LOOP, frequency_penalty=0.3, presence_penalty=0.2, max_tokens=40),
        Request(LOOP, constraint=Only, max_tokens=30),
        Request(LOOP, max_tokens=30, logprobs=3),
        Request(LOOP, DRAWN, max_tokens=60, stop=lambda new: len(new) == 13, logprobs=0),
        Request(LOOP, max_tokens=30, hook=hook, eos=(LOOP[20],)),
        Request(LOOP, max_tokens=40, eos=(5, 9), min_tokens=7, logit_bias={LOOP[3]: 2.0}),
    ]


Texts = list[list[tuple[Any, ...]]]


def texts(events: Sequence[Sequence[Event]], *, told: bool = False) -> Texts:
    """Tokens, ends and, if they are to be ``told``, log-probabilities of each request."""
    return [
        [
            (event.index, event.token, event.finish_reason, event.logprobs if told else None)
            for event in sorted(own, key=lambda event: event.index)
        ]
        for own in events
    ]


def drafting(request: Request) -> Request:
    return replace(request, prompt_lookup=7)


def same_with_drafts(model: Lfm2, known: list[list[int]], **options: Any) -> Engine:
    """Run all requests without drafts, then with them in most; the latter's engine."""
    plain = events_by_request(Engine(model, max_rows=6), requests())
    for request, events in zip(requests(), plain, strict=True):
        for index in range(request.n):
            new = [event.token for event in events if event.index == index]
            known.append([*request.prompt, *new])
    engine = Engine(model, **options)
    given = [each if i == 2 else drafting(each) for i, each in enumerate(requests())]
    assert texts(events_by_request(engine, given)) == texts(plain)
    statistics = engine.statistics
    assert statistics.drafted - 60 > statistics.accepted > 120
    pool = engine.cache.pool
    assert pool.used == (engine.cache.dummy_slot is not None)
    assert sorted(engine.slots.free) == list(range(engine.max_rows))
    return engine


def test_texts_are_those_without_drafts(native, known) -> None:
    same_with_drafts(native, known, max_rows=6)


def test_a_row_alone_has_the_same_bits(native, known) -> None:
    """Log-probabilities included: prompts run alike, and steps are equal to the bit."""
    for request, again in zip(requests(), requests(), strict=True):
        engine = Engine(native, max_rows=1, prefix_cache=False)
        plain = events_by_request(engine, [request])
        new = [event.token for event in plain[0] if event.index == 0]
        known[:] = [[*request.prompt, *new]]
        engine = Engine(native, max_rows=1, prefix_cache=False)
        found = events_by_request(engine, [drafting(again)])
        assert texts(found, told=True) == texts(plain, told=True)
        assert engine.statistics.accepted > 4


@pytest.mark.parametrize("max_rows", [1, 3])
def test_texts_stay_where_the_host_runs_ahead(tiny, known, max_rows) -> None:
    """In buckets, with a dummy slot or without, as on a GPU; the eager bodies in float64."""
    model = lfm2_fast.load(tiny, device="cpu", dtype="float64", backend="eager").network
    model.ops = Capturing()
    same_with_drafts(model, known, max_rows=max_rows)


def test_preempted_rows_go_on_with_their_drafts(native, known, monkeypatch) -> None:
    step, steps = Engine.step, itertools.count(1)

    def interrupted(engine: Engine) -> list[Event]:
        if next(steps) % 4 == 0:
            engine.runner.preempt()
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    engine = same_with_drafts(native, known, max_rows=4)
    assert engine.statistics.preemptions > 5


def test_only_accepted_tokens_are_shared(native, known) -> None:
    """A later prompt hits the pages of a text that had drafts, and goes on as from none."""
    engine = Engine(native, max_rows=2)
    first = drafting(Request(LOOP, max_tokens=120))
    written = [event.token for event in events_by_request(engine, [first])[0]]
    again = Request([*LOOP, *written, 5], max_tokens=20)
    hit = events_by_request(engine, [again])[0]
    assert hit[0].cached_tokens >= 128
    assert texts([hit])[0] == texts(events_by_request(Engine(native, max_rows=1), [again]))[0]


def test_a_cancelled_row_gives_all_back(native, known) -> None:
    engine = Engine(native, max_rows=1, prefix_cache=False)
    for steps in range(1, 12):
        id = engine.add(drafting(Request(LOOP, max_tokens=200)))
        for _ in range(steps):
            engine.step()
        engine.cancel(id)
        while engine.busy:
            engine.step()
        assert engine.cache.pool.used == 0 and engine.slots.free == [0]


def test_a_draft_takes_no_page_from_others(native, known) -> None:
    """A row whose draft would need a page that is not there takes a plain step."""
    engine = Engine(native, max_rows=1, pages=2)
    request = Request(LOOP[:60] * 2, max_tokens=8)
    plain = texts(events_by_request(Engine(native, max_rows=1), [request]))
    assert texts(events_by_request(engine, [drafting(request)])) == plain


def test_windows_that_drafts_overwrote_are_made_again(native, known) -> None:
    """A caller's cache goes back behind a refused draft: what the ring lost is replayed."""
    model = native
    cache = new_cache(model, 1, 512)
    engine = Engine(model, cache=cache)
    request = Request(LOOP, max_tokens=40)
    engine.add(drafting(request), [0])
    run = [event for _ in range(60) if engine.busy for event in engine.step()]
    assert len(run) == 40 and engine.statistics.drafted > engine.statistics.accepted
    kept = cache.history[0][:95]
    shorter = Request([*kept, 7], max_tokens=10)
    engine = Engine(model, cache=cache)
    engine.add(shorter, [0])
    found = [event.token for _ in range(30) if engine.busy for event in engine.step()]
    wanted = events_by_request(Engine(model, max_rows=1), [shorter])[0]
    assert found == [event.token for event in wanted]


def test_an_assistant_changes_no_text(native, tiny, known) -> None:
    """Rows with an assistant, with a lookup and without drafts stand in the same steps."""
    wanted = texts(events_by_request(Engine(native, max_rows=6), requests()))
    other = lfm2_fast.load(tiny, device="cpu", dtype="bfloat16").network
    engine = Engine(native, max_rows=6, assistant=other)
    given = [
        replace(each, assisted=i != 2, prompt_lookup=7 if i == 3 else None)
        for i, each in enumerate(requests())
    ]
    assert texts(events_by_request(engine, given)) == wanted
    # The same model agrees where no penalty, constraint or hook has a say, drawn tokens too.
    assert engine.statistics.accepted > 0.6 * engine.statistics.drafted > 100


def test_a_useless_assistant_is_not_planned_and_tried_again(native, random_checkpoint, monkeypatch):
    """Until its rest ends, no length is computed for its drafts."""
    planned: list[int] = []

    def lengths(*arguments: Any, **named: Any) -> list[int]:
        planned.append(len(planned))
        return draft_lengths(*arguments, **named)

    monkeypatch.setattr(speculation, "draft_lengths", lengths)
    monkeypatch.setattr(StepCosts, "of", lambda self, tokens: 1.0)
    other = lfm2_fast.load(random_checkpoint(vocab_size=native.config.vocab_size), device="cpu")
    engine = Engine(native, max_rows=1, assistant=other.network)
    engine.add(Request(LOOP, max_tokens=230, assisted=True))
    seen = [(0, 0)]
    while engine.busy:
        engine.step()
        seen.append((engine.statistics.drafted, len(planned)))
    assert not engine.statistics.accepted
    tried = [i for i in range(1, len(seen)) if seen[i][0] > seen[i - 1][0]]
    before, last = tried[-2:]
    assert last - before > 100 and seen[last][1] - seen[before][1] == 1


def test_an_assistant_without_memory_is_given_up(native, known, monkeypatch) -> None:
    def fail(*_: Any) -> None:
        raise CacheError("no memory")

    wanted = texts(events_by_request(Engine(native, max_rows=2), requests()[:2]))
    monkeypatch.setattr(Assistant, "draft", fail)
    engine = Engine(native, max_rows=2, assistant=native)
    assert texts(events_by_request(engine, requests()[:2])) == wanted
    assert not engine.statistics.preemptions


def test_an_assistant_catches_up_with_many_tokens(eager) -> None:
    """Tokens that were written without it are more than its conv windows hold in one step."""
    row = Row(0, Request(LOOP, assisted=True), 0, limit=60, arrival=0, slot=0)
    behind, fresh = (Assistant(eager, eager, 1, 256) for _ in range(2))
    row.written += text(1, 3)
    behind.draft([row], [3])
    row.written += text(14, 4)
    assert behind.draft([row], [1]) == fresh.draft([row], [1])
    found, wanted = (
        torch.cat([each._cache.pool.memory.page(p) for p in each._cache.pages(0)], -2)
        for each in (behind, fresh)
    )
    assert torch.allclose(found[..., : row.length, :], wanted[..., : row.length, :])


def test_drafts_are_looked_for_again_where_the_host_runs_ahead(eager, monkeypatch) -> None:
    """After long without a draft, only some steps look for one: those must find it."""
    eager.ops = Capturing()
    asked = itertools.count(1)
    monkeypatch.setattr(StepCosts, "of", lambda self, tokens: 1.0 + 0.01 * tokens)
    monkeypatch.setattr(PromptLookup, "find", lambda _: (1, 4) if next(asked) > IDLE + 1 else None)
    engine = Engine(eager, max_rows=1, prompt_lookup=7)
    engine.add(Request(LOOP[:9], max_tokens=60 * MAX_STEPS))
    while engine.busy and not engine.statistics.drafted:
        engine.step()
    assert engine.busy


def test_steps_with_an_adapter_keep_their_bits(tiny, tmp_path, known) -> None:
    """Drafts stand beside an active adapter on a CPU. A GPU's kernels cannot verify them there."""
    model = lfm2_fast.load(tiny, device="cpu", dtype="float32")
    network = model.network
    model.load_adapter(write_adapter(tmp_path / "a", network.config, 4, seed=1, std=0.1))
    assert network.adapters.active is not None
    request = Request(LOOP, max_tokens=24)
    plain = events_by_request(Engine(network, max_rows=2), [request, request])
    known.append([*LOOP, *[event.token for event in plain[0]]])
    engine = Engine(network, max_rows=2)
    found = events_by_request(engine, [drafting(request), request])
    assert texts(found) == texts(plain) and engine.statistics.accepted > 8
    network.ops = Capturing()
    engine = Engine(network, max_rows=2)
    events_by_request(engine, [drafting(Request(LOOP, max_tokens=6))])
    assert not engine.statistics.drafted


def test_counts_stay_after_a_reset(native, known) -> None:
    engine = Engine(native, max_rows=1)
    events_by_request(engine, [drafting(Request(LOOP, max_tokens=20))])
    before = engine.statistics.drafted
    engine.reset()
    events_by_request(engine, [Request(LOOP, max_tokens=2)])
    assert engine.statistics.drafted == before > 0


def test_an_assistant_of_another_vocabulary_is_refused(native, random_checkpoint) -> None:
    other = lfm2_fast.load(random_checkpoint(), device="cpu")
    with pytest.raises(ValueError, match="vocabulary of 307 tokens and the model one of 4096"):
        Engine(native, assistant=other)


def test_a_lookup_finds_the_longest_and_latest_place() -> None:
    lookup = PromptLookup(3)
    lookup.follow([1, 2, 3, 9, 5, 2, 3, 8, 6, 1, 2, 3], [])
    # Of [1, 2, 3] there is one place, which is before the later one of [2, 3].
    assert lookup.find() == (3, 3)
    assert lookup.draft(3, 4) == [9, 5, 2, 3]
    # The text continues differently from the draft: its end [8] is looked up again.
    lookup.follow([1, 2, 3, 9, 5, 2, 3, 8, 6, 1, 2, 3], [8])
    assert lookup.find() == (8, 3)
    assert PromptLookup(2).find() is None
    # A text that repeats itself is drafted beyond its end.
    lookup = PromptLookup(2)
    lookup.follow([4, 5, 6, 4, 5], [])
    assert lookup.draft(lookup.find()[0], 7) == [6, 4, 5, 6, 4, 5, 6]


def test_drafts_that_lose_are_few(native, known, monkeypatch) -> None:
    """A budget bounds the time that refused drafts take, also where chances promise much."""
    monkeypatch.setattr(StepCosts, "of", lambda self, tokens: 0.9 + 0.1 * tokens)
    monkeypatch.setattr(StepCosts, "add", lambda self, tokens, seconds: self.of(tokens))
    monkeypatch.setattr(StepCosts, "knows", lambda *_: True)
    monkeypatch.setattr(Acceptance, "chance", lambda *_: 0.9)
    engine = Engine(native, max_rows=1, prompt_lookup=7)
    events_by_request(engine, [Request(LOOP, max_tokens=200)])
    assert 0 < engine.statistics.drafted < 80
