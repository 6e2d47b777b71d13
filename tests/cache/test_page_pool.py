"""Pages: memory that grows and never moves, owners that add up, and the index of prefixes."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lfm2_fast import CacheError
from lfm2_fast.cache import page_memory
from lfm2_fast.cache.page_memory import PAGE_SIZE, PageMemory, pages_of
from lfm2_fast.cache.page_pool import PagePool
from lfm2_fast.cache.prefix_index import PrefixIndex


def memory(limit: int, *, kind: str = "reserved", layers: int = 2) -> PageMemory:
    made = PageMemory(
        layers, 2, 4, limit=limit, device="cpu", dtype=torch.float32, in_place=kind == "slabs"
    )
    if kind != "reserved":
        made.kind, made._slabs = kind, []  # as on a device
    return made


@pytest.mark.parametrize("kind", ["reserved", "slabs", "moving"])
def test_memory_that_grows_keeps_what_pages_hold(kind, monkeypatch) -> None:
    monkeypatch.setattr(page_memory, "_LEAST", 0)
    grown = memory(1000, kind=kind)
    numbers: list[int] = []
    for more in (1, 3, 30, 700):
        new = grown.grow(more)
        assert len(new) >= more
        for page in new:
            grown.page(page).fill_(page)
        numbers += new
    assert len(set(numbers)) == len(numbers) == grown.count >= 734
    assert len(grown.grow(1000)) == 1000 - len(numbers)
    for page in numbers[:50] + numbers[-50:]:
        assert (grown.page(page) == page).all()
    grown.copy(numbers[0], numbers[-1], 5)
    assert (grown.page(numbers[-1])[:, :, :5] == numbers[0]).all()
    assert (grown.page(numbers[-1])[:, :, 5:] == numbers[-1]).all()


def test_slabs_are_reached_from_one_base_address(monkeypatch) -> None:
    """A kernel adds a page's number, times the page's stride, to the address of the first slab."""
    monkeypatch.setattr(page_memory, "_LEAST", 0)
    grown = memory(10_000, kind="slabs")
    numbers = grown.grow(4)
    where = grown.layer(1)[1].data_ptr()
    numbers += grown.grow(9_000)
    assert grown.layer(1)[1].data_ptr() == where and len(grown._slabs) > 1
    stride = grown.layer(1)[1].stride(0) * 4
    assert stride == grown.page_bytes
    for page in numbers[:3] + numbers[-3:]:
        assert grown.page(page)[3].data_ptr() == where + page * stride


def test_reserved_address_space_takes_no_memory() -> None:
    """A terabyte of addresses is reserved at once. Only written parts take memory."""
    room = PageMemory(8, 8, 64, limit=2**19, device="cpu", dtype=torch.bfloat16, in_place=False)
    assert room.nbytes == 0 and room.limit * room.page_bytes == 2**39
    page = room.grow(1)[0]
    room.page(page).fill_(1)
    assert room.nbytes == room.page_bytes


def test_more_address_space_than_any_machine_has_is_refused() -> None:
    with pytest.raises(MemoryError, match="lower max_length or the number of sequences"):
        PageMemory(8, 8, 64, limit=2**45, device="cpu", dtype=torch.float32, in_place=False)


def test_a_full_pool_says_so_and_changes_nothing() -> None:
    pool = PagePool(memory(3))
    held = pool.take(2)
    with pytest.raises(CacheError, match="2 more pages do not fit.*1 of its 3 are not owned"):
        pool.take(2)
    assert (pool.used, pool.free, pool.cached) == (2, 1, 0)
    pool.release(held)
    assert sorted(pool.take(3)) == [0, 1, 2]


class Small(PageMemory):
    """Memory of a device with room for four pages, below the limit."""

    def grow(self, pages: int) -> list[int]:
        if self.count + pages > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().grow(pages)


def test_a_device_without_memory_is_a_limit() -> None:
    """Cached pages are evicted then. A request that does not fit changes nothing."""
    small = Small(1, 1, 8, limit=9, device="cpu", dtype=torch.float32, in_place=False)
    pool = PagePool(small)
    index = PrefixIndex(pool)
    text = list(range(3 * PAGE_SIZE))
    pages = pool.take(3)
    index.enter(text, pages)
    pool.release(pages)
    with pytest.raises(CacheError, match="the device has no memory for 6 more pages"):
        pool.take(6)
    assert (pool.used, pool.cached, pool.free) == (0, 3, 0)
    assert len(set(pool.take(3))) == 3
    assert (pool.used, pool.cached, pool.available) == (3, 0, 0)


def test_all_memory_can_be_taken_at_once() -> None:
    pool = PagePool(memory(5))
    held = pool.take(1)
    pool.take_memory()
    assert pool.memory.count == 5 and pool.memory.grow(0) == []
    assert sorted(held + pool.take(4)) == list(range(5))


def test_a_known_text_is_not_hashed_again() -> None:
    pool = PagePool(memory(9))
    index = PrefixIndex(pool)
    text, digests = list(range(3 * PAGE_SIZE + 5)), []
    assert index.match(text, digests=digests).tokens == 0 and len(digests) == 1
    index.enter(text, pool.take(4))
    assert index.match(text, digests=digests) == index.match(text)
    assert len(digests) == 3
    # The pages are those of the digests, also for another text.
    assert index.match([0] * len(text), digests=digests).pages == index.match(text).pages


def texts() -> list[list[int]]:
    """Texts of which some begin alike, for pages and in mid-page."""
    pick = random.Random(0)
    stem = [pick.randrange(9) for _ in range(4 * PAGE_SIZE)]
    made = [stem[:n] + [pick.randrange(9) for _ in range(m)] for n, m in ((0, 200), (64, 100))]
    return [*made, stem[:130] + made[0][:90], stem, stem[:100]]


class Pages(RuleBasedStateMachine):
    """Sequences that take, share, enter and release pages, compared with lists of their pages."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(memory(12))
        self.index = PrefixIndex(self.pool)
        self.held: list[tuple[list[int], list[int]]] = []
        self.content: dict[int, list[int]] = {}

    @rule(text=st.sampled_from(texts()), salt=st.sampled_from([b"", b"other"]))
    def begin(self, text: list[int], salt: bytes) -> None:
        text = [(token + len(salt)) % 11 for token in text]
        match = self.index.match(text[:-1], salt)
        for number, page in enumerate(match.pages):
            first = number * PAGE_SIZE
            assert self.content[page] == text[first : first + PAGE_SIZE]
        if match.rows:
            first = len(match.pages) * PAGE_SIZE
            assert match.partial is not None
            assert self.content[match.partial][: match.rows] == text[first : first + match.rows]
        pages = list(match.pages)
        self.pool.share(pages)
        try:
            pages += self.pool.take(pages_of(len(text)) - len(pages))
        except CacheError:
            self.pool.release(pages)
            return
        for number in range(len(match.pages), len(pages)):
            assert not self.pool.is_shared(pages[number])
            self.content[pages[number]] = text[number * PAGE_SIZE :][:PAGE_SIZE]
        self.index.enter(text, pages, salt)
        self.held.append((text, pages))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99))
    def end(self, which: int) -> None:
        _, pages = self.held.pop(which % len(self.held))
        self.pool.release(pages)

    @rule()
    def clear(self) -> None:
        self.index.clear()
        assert self.pool.cached == len(self.index) == 0

    @invariant()
    def pages_add_up(self) -> None:
        owned = {page for _, pages in self.held for page in pages}
        assert self.pool.used == len(owned)
        assert self.pool.used + self.pool.cached + self.pool.free == 12
        assert len(self.index) <= self.pool.used + self.pool.cached
        for text, pages in self.held:
            for number, page in enumerate(pages):
                assert self.content[page] == text[number * PAGE_SIZE :][:PAGE_SIZE]


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_page_used_last_is_evicted_last() -> None:
    pool = PagePool(memory(4))
    index = PrefixIndex(pool)
    first, second = ([token] * (2 * PAGE_SIZE) for token in (1, 2))
    for text in (first, second):
        pages = pool.take(2)
        index.enter(text, pages)
        pool.release(pages)
    again = index.match(first)
    pool.share(again.pages)
    pool.release(again.pages)
    pool.take(1)
    # The end of the text that was used longest ago is gone, and its beginning is there.
    assert index.match(second).tokens == PAGE_SIZE
    assert index.match(first).tokens == 2 * PAGE_SIZE


def test_salts_separate_texts() -> None:
    pool = PagePool(memory(4))
    index = PrefixIndex(pool)
    text = list(range(PAGE_SIZE))
    index.enter(text, pool.take(1), b"adapter")
    assert index.match(text).tokens == 0
    assert index.match(text, b"adapter").tokens == PAGE_SIZE
