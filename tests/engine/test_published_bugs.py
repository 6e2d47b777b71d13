"""Bugs that other engines published of hybrid models, each looked for by name.

Lost hits and stale states of growing chats, hits across tenants, pages that leak, pools that lock
up, and clients that leave. Those of any schedule and of writes to shared pages: ``test_engine.py``.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import lfm2_fast
from bench.near_ties import alone
from lfm2_fast.cache.kv_cache import ConvWindow
from lfm2_fast.cache.page_memory import PAGE_SIZE, PageMemory, pages_of
from lfm2_fast.cache.page_pool import PagePool
from lfm2_fast.cache.prefix_index import PrefixIndex
from lfm2_fast.engine.async_engine import AsyncEngine
from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.request import Event, Request
from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.ops.sampling import SamplingParams
from tests.batches import text


class Chat:
    """Turns of conversations on one engine, and the prompt tokens that each turn ran."""

    def __init__(self, model: Lfm2, **options: Any) -> None:
        self.engine = Engine(model, **{"max_rows": 2, **options})
        self.chunks: list[int] = []
        run_chunks = self.engine.prefill.runner.run_chunks

        def noted(texts: Sequence[Sequence[int]], *args: Any, **kwargs: Any) -> torch.Tensor:
            self.chunks.extend(map(len, texts))
            return run_chunks(texts, *args, **kwargs)

        self.engine.prefill.runner.run_chunks = noted  # type: ignore[method-assign]

    def turn(self, prompt: Sequence[int], new: int = 9, salt: bytes = b"") -> tuple[list[int], int]:
        """Run a prompt to its end. Return the text with ``new`` tokens, and the number of tokens
        run.
        """
        self.chunks.clear()
        request = Request(prompt, max_tokens=new, salt=salt)
        self.engine.add(request)
        events: list[Event] = []
        while self.engine.busy:
            events += self.engine.step()
        answer = [event.token for event in events]
        assert [answer] == alone(self.engine.model, request)
        return [*prompt, *answer], sum(self.chunks)

    def most(self, added: int) -> int:
        """Most tokens that a turn may run if it adds ``new`` tokens to a known text."""
        return PAGE_SIZE + self.engine.cache.replay_length + added


def test_a_second_turn_runs_what_is_new(native) -> None:
    chat = Chat(native)
    held, _ = chat.turn(text(150), new=80)
    assert chat.turn([*held, *text(20, 2)])[1] <= chat.most(20)


def test_sibling_branches_run_what_is_new(native) -> None:
    chat = Chat(native)
    held, _ = chat.turn(text(200), new=70)
    for seed in (2, 3, 4):
        assert chat.turn([*held, *text(15, seed)])[1] <= chat.most(15)


def test_an_edit_in_the_middle_runs_what_comes_after_it(native) -> None:
    chat = Chat(native)
    held, _ = chat.turn(text(300))
    edited = [*held[:170], *text(30, 2), *held[200:]]
    ran = chat.turn(edited)[1]
    # The edit stands in mid-page, whose rows before it are copied.
    assert ran == len(edited) - 170 + chat.engine.cache.replay_length


def test_alternate_turns_run_what_is_new(native) -> None:
    chat = Chat(native, max_rows=1)
    held = [chat.turn(text(130, seed))[0] for seed in (1, 2)]
    for number in range(3):
        for which in (0, 1):
            prompt = [*held[which], *text(12, 10 + 2 * number + which)]
            held[which], ran = chat.turn(prompt)
            assert ran <= chat.most(12)


def test_no_resume_reads_a_window_that_was_there(native) -> None:
    """Windows of a slot are NaN when its text begins, or continues from pages only."""
    engine = Engine(native, max_rows=3, chunk=48)
    run_chunks, cache = engine.prefill.runner.run_chunks, engine.cache
    resumed: list[int] = []

    def poisoned(texts: Any, slots: Any, replays: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        for slot, again in zip(slots, replays, strict=True):
            if again or not cache.lengths[slot]:
                resumed.append(again)
                for layer in cache.layers:
                    if isinstance(layer, ConvWindow):
                        layer.rows[slot] = torch.nan
        return run_chunks(texts, slots, replays, *args, **kwargs)

    engine.prefill.runner.run_chunks = poisoned  # type: ignore[method-assign]
    stem = text(140)
    requests = [Request([*stem, *text(20, seed)], max_tokens=30) for seed in range(5)]
    found: dict[int, list[int]] = {engine.add(request): [] for request in requests}
    while engine.busy:
        for event in engine.step():
            assert event.error is None, event.error
            found[event.id].append(event.token)
        if engine.statistics.steps % 8 == 0:
            engine.runner.preempt()
    assert engine.statistics.preemptions > 3 and sum(map(bool, resumed)) > 6
    for request, tokens in zip(requests, found.values(), strict=True):
        assert [tokens] == alone(native, request)


def test_tenants_and_dtypes_share_nothing(native, tiny) -> None:
    chat = Chat(native)
    prompt = text(200)
    for salt in (b"", b"a", b"b", b"ab"):
        assert chat.turn(prompt, salt=salt)[1] == 200
        assert chat.turn(prompt, salt=salt)[1] < 200
    # Neither does the part of a page that is alike, nor a prompt that runs at the same time.
    assert chat.turn(prompt[:40], salt=b"other")[1] == 40
    together = Engine(native, chunk=64)
    for salt in (b"a", b"b"):
        together.add(Request(prompt, max_tokens=1, salt=salt))
    for _ in range(2):
        together.step()
    assert len(together.scheduler.prefilling) == 2
    half = lfm2_fast.load(tiny, device="cpu", dtype="bfloat16").network
    assert Chat(half).turn(prompt)[1] == 200


def test_a_pool_of_three_pages_serves_fifty_requests(native) -> None:
    pick = random.Random(0)
    engine = Engine(native, max_rows=6, pages=3)
    wanted, found = {}, Counter[tuple[int, int]]()
    for number in range(50):
        count, n = pick.randint(1, 16), pick.choice([1, 1, 1, 2])
        prompt = text(pick.choice([3, 40, 60, 100]), number % 10)
        drawn = SamplingParams(do_sample=number % 2 == 1)
        request = Request(prompt, drawn, max_tokens=count, n=n, priority=number % 3)
        id = engine.add(request)
        wanted |= {(id, index): count for index in range(n)}
    while engine.busy and engine.statistics.steps < 20_000:
        for event in engine.step():
            assert event.error is None, event.error
            found[event.id, event.index] += event.token is not None
    assert found == wanted
    pool = engine.cache.pool
    assert engine.statistics.preemptions and not pool.used
    assert pool.cached + pool.free == pool.memory.limit == 3


@pytest.mark.parametrize("seen", [1, 40])
def test_a_client_that_leaves_frees_its_row_within_eight_steps(native, seen: int) -> None:
    inner = Engine(native, max_rows=2, prefix_cache=False)
    held: list[tuple[int, int]] = []
    step = inner.step

    def watched() -> list[Event]:
        events = step()
        held.append((len(inner.rows), inner.cache.pool.used))
        return events

    inner.step = watched  # type: ignore[method-assign]

    async def work() -> int:
        async with AsyncEngine(inner) as engine:
            other = engine.generate(Request(text(5), max_tokens=1500))
            await anext(other)
            events = engine.generate(Request(text(900, 2), max_tokens=1000))
            for _ in range(seen):
                await anext(events)
            await events.aclose()
            left = len(held)
            while len(held) < left + 20:
                await anext(other)
            await other.aclose()
            return left

    left = asyncio.run(asyncio.wait_for(work(), 60))
    assert held[left - 1][0] == 2 and held[left - 1][1] > pages_of(900)
    # What is left are the pages of the other row, far shorter than the one that went.
    assert held[left + 7][0] == 1 and held[left + 7][1] < pages_of(900)


class Sequences:
    """Sequences that share pages of a small pool at random, with their tables."""

    LIMIT = 24

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)
        shape = {"limit": self.LIMIT, "device": "cpu", "dtype": torch.float32, "in_place": False}
        self.pool = PagePool(PageMemory(1, 1, 2, **shape))
        self.index = PrefixIndex(self.pool)
        self.tables: list[tuple[list[int], list[int], bytes]] = []
        self.content: dict[int, list[int]] = {}
        # Few texts, so that sequences meet: three stems of four pages, in three tenants' hands.
        self.stems = [[self.pick.randrange(5) for _ in range(256)] for _ in range(3)]

    def begin(self) -> None:
        """Begin a sequence on what the index has of its text."""
        stem = self.pick.choice(self.stems)[: self.pick.randint(1, 256)]
        tokens = [*stem, *(self.pick.randrange(5) for _ in range(self.pick.randint(0, 40)))]
        salt = self.pick.choice([b"", b"a", b"b"])
        match = self.index.match(tokens[:-1], salt)
        pages = list(match.pages)
        self.pool.share(pages)
        if match.partial is not None:
            # As an engine does: the page is owned while its rows are copied.
            self.pool.share([match.partial])
            first = len(pages) * PAGE_SIZE
            same = self.content[match.partial][: match.rows]
            assert same == tokens[first : first + match.rows]
            self.pool.release([match.partial])
        more = pages_of(len(tokens)) - len(pages)
        if more > self.pool.available:
            self.pool.release(pages)
            return
        pages += self.pool.take(more)
        self.write(tokens, pages, len(match.pages))
        self.tables.append((tokens, pages, salt))

    def write(self, tokens: list[int], pages: list[int], first: int) -> None:
        """Keep the contents of pages from number ``first`` on, which must have no other owner."""
        for number in range(first, len(pages)):
            assert not self.pool.is_shared(pages[number])
            self.content[pages[number]] = tokens[number * PAGE_SIZE :][:PAGE_SIZE]

    def grow(self) -> None:
        """Write more tokens at a sequence's end; a page that it shares is copied first."""
        tokens, pages, _ = self.some()
        first = len(tokens) // PAGE_SIZE
        more = self.pick.randint(1, 80)
        copied = first < len(pages) and self.pool.is_shared(pages[first])
        needed = pages_of(len(tokens) + more) - len(pages) + copied
        if needed > self.pool.available:
            return
        taken = self.pool.take(needed)
        if copied:
            self.pool.release([pages[first]])
            pages[first] = taken.pop()
        pages += taken
        tokens += [self.pick.randrange(5) for _ in range(more)]
        self.write(tokens, pages, first)

    def fork(self) -> None:
        """Continue a sequence in two ways, with its full pages shared."""
        tokens, pages, salt = self.some()
        full = len(tokens) // PAGE_SIZE
        rest = len(pages) - full
        if rest > self.pool.available:
            return
        taken = self.pool.take(rest)
        self.pool.share(pages[:full])
        self.tables.append((list(tokens), [*pages[:full], *taken], salt))
        self.write(tokens, self.tables[-1][1], full)

    def enter(self) -> None:
        """Enter a sequence's full pages into the index."""
        self.index.enter(*self.some())

    def shorten(self) -> None:
        """Roll back the end of a sequence, or all of it."""
        tokens, pages, _ = entry = self.some()
        length = self.pick.choice([0, 0, self.pick.randrange(len(tokens) + 1)])
        kept = pages_of(length)
        self.pool.release(pages[kept:])
        del tokens[length:], pages[kept:]
        if not tokens:
            self.tables.remove(entry)

    def some(self) -> tuple[list[int], list[int], bytes]:
        return self.pick.choice(self.tables)

    def check(self, whole: bool) -> None:
        """Compare references with tables; ``whole``: what pages hold, too."""
        pool = self.pool
        owners = Counter(page for _, pages, _ in self.tables for page in pages)
        assert pool._owners == owners
        assert pool.used + pool.cached + pool.free == self.LIMIT
        assert len(self.index) == len(pool._kept) == len(pool._kept & {*owners, *pool._cached})
        if whole:
            for tokens, pages, _ in self.tables:
                assert len(pages) == pages_of(len(tokens))
                for number, page in enumerate(pages):
                    part = tokens[number * PAGE_SIZE :][:PAGE_SIZE]
                    assert self.content[page][: len(part)] == part


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.nightly)])
def test_references_are_the_sum_of_tables(count: int) -> None:
    made = Sequences(seed=count)
    kinds = (made.begin, made.begin, made.grow, made.fork, made.enter, made.enter, made.shorten)
    for number in range(count):
        if not made.tables or made.pick.random() < 0.001:
            made.pool.drop_cached()
            made.begin()
        else:
            made.pick.choice(kinds)()
        made.check(number % 50 == 0)
    while made.tables:
        made.shorten()
    made.check(True)
    assert not made.pool.used
    made.pool.drop_cached()
    assert made.pool.free == made.LIMIT and not len(made.index) and not made.index._children
