"""The cache: rollback, slots, growth, saving, and interrupted steps."""

from __future__ import annotations

import copy

import pytest
import torch

from lfm2_fast import Cache, CacheError
from lfm2_fast.cache.page_memory import PAGE_SIZE
from lfm2_fast.engine.model_runner import run_batch
from tests.batches import fill, with_nan


@pytest.fixture(scope="module")
def model(random_checkpoint, pair):
    return pair(random_checkpoint())[1]


def run(model, cache: Cache, work: dict[int, torch.Tensor]) -> list[torch.Tensor]:
    counts = [len(tokens) for tokens in work.values()]
    batch = cache.next_batch(counts, list(work), "cpu")
    logits = run_batch(model.network, torch.cat(list(work.values())), batch, cache)
    cache.record_tokens(batch, (tokens.tolist() for tokens in work.values()))
    return list(logits.split(counts))


def ids(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(8, 307, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("taken", [1, 2, 3, 4])
@pytest.mark.parametrize("steps", [(4,), (1, 1, 1, 1), (3, 1), (1, 3)])
def test_rollback_equals_never_having_run(model, taken: int, steps: tuple[int, ...]) -> None:
    cache, never = model.new_cache(1, spare=4), model.new_cache(1, spare=4)
    for held in (cache, never):
        run(model, held, {0: ids(9)})
    wrong, right = ids(4, seed=2), ids(5, seed=3)
    for part in wrong.split(list(steps)):
        run(model, cache, {0: part})
    run(model, never, {0: wrong[: 4 - taken]}) if taken < 4 else None
    cache.rollback(taken)
    assert cache.lengths == never.lengths
    torch.testing.assert_close(
        run(model, cache, {0: right})[0], run(model, never, {0: right})[0], rtol=1e-5, atol=1e-4
    )


def test_rollback_beyond_the_window_says_so_and_changes_nothing(model) -> None:
    cache = model.new_cache(2, spare=2)
    run(model, cache, {0: ids(9), 1: ids(9)})
    cache.rollback(2, [0])
    with pytest.raises(CacheError, match="slot 0 cannot continue from token 6"):
        cache.rollback(1)
    assert cache.lengths == [7, 9]
    with pytest.raises(CacheError, match="cannot remove 10 tokens"):
        cache.rollback(10, [1])
    with pytest.raises(ValueError, match="-1"):
        cache.rollback(-1)
    cache.rollback(9, [1])
    assert cache.lengths == [7, 0]


def test_a_reset_slot_is_as_new(model) -> None:
    cache = model.new_cache(3)
    run(model, cache, {0: ids(80), 1: ids(4, seed=2), 2: ids(7, seed=3)})
    cache.reset([0, 2])
    again = ids(6, seed=4)
    fresh = run(model, model.new_cache(1), {0: again})[0]
    for slot in (2, 0):
        torch.testing.assert_close(run(model, cache, {slot: again})[0], fresh)
    assert cache.lengths == [6, 4, 6]


def test_garbage_beyond_the_length_is_never_read(model) -> None:
    cache = model.new_cache(2)
    cache.make_room({0: 200, 1: 200})
    fill(cache, with_nan)
    tokens = ids(7)
    got = run(model, cache, {1: tokens})[0]
    step = run(model, cache, {1: ids(1, seed=2)})[0]
    clean = model.new_cache(1)
    assert torch.equal(got, run(model, clean, {0: tokens})[0])
    assert torch.equal(step, run(model, clean, {0: ids(1, seed=2)})[0])


def test_growth_keeps_the_content(model) -> None:
    cache = model.new_cache(2)
    small = cache.nbytes
    tokens = ids(300)
    whole = run(model, model.new_cache(1), {0: tokens})[0]
    parts = [run(model, cache, {1: part})[0] for part in tokens.split(37)]
    assert cache.nbytes > small
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-3)


def test_the_table_stays_the_same_object(model) -> None:
    """Kernels' counters are stored by table, and captured graphs point to both."""
    cache = model.new_cache(2)
    tables = {id(layer.table) for layer in cache.layers if hasattr(layer, "table")}
    run(model, cache, {0: ids(70)})
    cache.copy(0, 1)
    cache.reset([0])
    again = {id(layer.table) for layer in cache.layers if hasattr(layer, "table")}
    assert len(tables) == 1 and tables == again


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_reordered_slots_hold_what_their_sources_held(model, length: int) -> None:
    """Slots swap, fork and stay at the same time, with any part of a page full."""
    cache, texts = model.new_cache(5), [ids(length + slot, seed=slot) for slot in range(4)]
    run(model, cache, dict(enumerate(texts)))
    sources = {0: 1, 1: 0, 2: 3, 3: 3, 4: 1}
    for _ in range(2):
        cache.reorder(sources)
        texts = [*texts, texts[0]]
        texts = [texts[sources[slot]] for slot in range(5)]
        assert cache.lengths == [len(text) for text in texts]
        assert cache.history == [text.tolist() for text in texts]
        owned = [page for slot in range(5) for page in cache.pages(slot)]
        assert cache.pool.used == len(set(owned))
        unfinished = [cache.pages(slot)[-1] for slot in range(5) if len(texts[slot]) % PAGE_SIZE]
        assert len(set(unfinished)) == len(unfinished)
        token = ids(1, seed=9)
        following = run(model, cache, {slot: token for slot in range(5)})
        for text, logits in zip(texts, following, strict=True):
            alone = model.new_cache(1)
            run(model, alone, {0: text})
            expected = run(model, alone, {0: token})[0]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        cache.rollback(1)
    cache.reset()
    assert cache.pool.used == 0


def test_a_full_cache_can_be_reordered(model) -> None:
    """No page is needed beyond those of the slots."""
    cache = model.new_cache(3, max_length=60)
    run(model, cache, {slot: ids(59, seed=slot) for slot in range(3)})
    assert cache.pool.available == 0
    cache.reorder({0: 2, 1: 2, 2: 2})
    assert cache.history == [ids(59, seed=2).tolist()] * 3 and cache.pool.available == 0
    run(model, cache, {slot: ids(1) for slot in range(3)})
    small = Cache(model.network.config, 2, 60, device="cpu", dtype=torch.float32, pages=1)
    run(model, small, {0: ids(9)})
    with pytest.raises(CacheError, match="1 more pages do not fit"):
        small.reorder({1: 0})
    assert small.lengths == [9, 0] and small.pool.used == 1


def test_full_cache_says_so_and_loses_nothing(model) -> None:
    cache = model.new_cache(1, max_length=10)
    run(model, cache, {0: ids(9)})
    before = copy.deepcopy(cache)
    with pytest.raises(CacheError, match="max_length of 10"):
        run(model, cache, {0: ids(2)})
    assert cache.lengths == [9]
    token = ids(1, seed=5)
    assert torch.equal(run(model, cache, {0: token})[0], run(model, before, {0: token})[0])


def test_save_and_restore(model) -> None:
    cache = model.new_cache(2, spare=3)
    run(model, cache, {0: ids(5), 1: ids(90, seed=2)})
    state = cache.state_dict()
    restored = model.new_cache(2, spare=3)
    restored.load_state_dict(state)
    following = {1: ids(2, seed=3), 0: ids(4, seed=4)}
    for a, b in zip(run(model, cache, following), run(model, restored, following), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(CacheError, match="not of a cache with 2 slots, ring 3"):
        model.new_cache(2).load_state_dict(state)
    with pytest.raises(CacheError, match="max_length 50"):
        model.new_cache(2, max_length=50, spare=3).load_state_dict(state)


def test_a_step_that_broke_off_cannot_be_continued_silently(model, monkeypatch) -> None:
    """A chunk that stopped midway has overwritten conv rows; the next step must not use them."""
    cache = model.new_cache(1)
    run(model, cache, {0: ids(8)})

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.ops, "attend", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model, cache, {0: ids(5)})
    assert cache.lengths == [8]
    with pytest.raises(CacheError, match="a step that failed counts too"):
        run(model, cache, {0: ids(1)})
    cache.reset()
    run(model, cache, {0: ids(8)})


def test_a_first_step_that_broke_off_leaves_an_empty_slot_sound(model) -> None:
    cache = model.new_cache(1)
    cache.reserve(cache.next_batch([10], [0], "cpu"))
    run(model, cache, {0: ids(2)})
    assert torch.isfinite(run(model, cache, {0: ids(1)})[0]).all()


def test_a_decode_step_that_broke_off_can_be_run_again(model, monkeypatch) -> None:
    cache = model.new_cache(1)
    run(model, cache, {0: ids(8)})
    untouched = copy.deepcopy(cache)
    token = ids(1, seed=2)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.ops, "attend", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model, cache, {0: token})
    assert torch.equal(run(model, cache, {0: token})[0], run(model, untouched, {0: token})[0])


def test_a_cache_made_in_inference_mode_works_outside(model) -> None:
    with torch.inference_mode():
        cache = model(ids(70)[None]).past_key_values
    assert model(ids(1)[None], past_key_values=cache).past_key_values.lengths == [71]


def test_bad_batches_are_named(model) -> None:
    cache = model.new_cache(2)
    with pytest.raises(ValueError, match="slot 2 is not one of the cache's 2"):
        cache.next_batch([1], [2], "cpu")
    with pytest.raises(ValueError, match="once"):
        cache.next_batch([1, 1], [0, 0], "cpu")
    with pytest.raises(ValueError, match="negative"):
        cache.next_batch([-1], [0], "cpu")
    with pytest.raises(ValueError, match="1 query lengths for 2 slots"):
        cache.next_batch([1], [0, 1], "cpu")
    stale = cache.next_batch([1], [0], "cpu")
    run_batch(model.network, ids(1), stale, cache)
    with pytest.raises(CacheError, match="prepare a new batch"):
        run_batch(model.network, ids(1), stale, cache)
