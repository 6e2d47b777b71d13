"""Decode steps on static buffers, on the CPU: lag, buckets, dummy slot, queue, stand-in graphs.

Only a GPU can show that a capture succeeds and replays the same launches.
"""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast
from lfm2_fast.cache.batch import DecodeInputs
from lfm2_fast.cache.kv_cache import Cache, CacheError, ConvWindow, KVPages
from lfm2_fast.cache.page_memory import PageMemory
from lfm2_fast.engine import model_runner, step_buffers
from lfm2_fast.engine.captured_prompt import MOST_PADDED, SIZES, CapturedPrompt
from lfm2_fast.engine.decode import DecodeLoop
from lfm2_fast.engine.model_runner import CHUNK, ModelRunner
from lfm2_fast.engine.request import Request, Row
from lfm2_fast.engine.step_buffers import StepBuffers, bucket
from lfm2_fast.hf import generate_call
from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.ops import native_library
from lfm2_fast.ops.reference import advance_ref
from tests.batches import sequence_of
from tests.engine.capturing import Capturing


# In float64: a bucket's products are summed in another order than those of as many rows as there
# are, and a draw must not hang on that.
@pytest.fixture(scope="module")
def plain(tiny: Path) -> lfm2_fast.Lfm2ForCausalLM:
    return lfm2_fast.load(tiny, device="cpu", dtype="float64", backend="eager")


@pytest.fixture
def ahead(tiny: Path) -> lfm2_fast.Lfm2ForCausalLM:
    """A model whose steps are launched one ahead, in buckets, with a dummy slot."""
    model = lfm2_fast.load(tiny, device="cpu", dtype="float64", backend="eager")
    model.network.ops = Capturing()
    return model


PROMPTS = [[1, 40, 41, 42], [1, 50], [1, 60, 61, 62, 63, 64, 65], [1, 70, 71], [1, 80]]


@pytest.fixture(scope="module")
def ends_at(plain) -> Callable[..., list[int]]:
    """Return tokens of greedy decoding at some steps, to stop rows at different times."""
    written = plain.generate(PROMPTS, max_new_tokens=15, eos_token_id=None)[:, 7:]
    return lambda *steps: [int(written[row, step]) for row, step in enumerate(steps)]


@pytest.fixture(scope="module")
def text_alone(plain) -> Callable[..., list[int]]:
    """Return the first prompt and 30 tokens, which each kind of sampling writes once."""

    @functools.cache
    def write(**sampling: Any) -> list[int]:
        kwargs = {"max_new_tokens": 30, "eos_token_id": None, **sampling}
        return plain.generate([PROMPTS[0]], **kwargs)[0].tolist()

    return write


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 3, "temperature": 0.8}])
@pytest.mark.parametrize("captured", [False, True], ids=["uncaptured", "captured"])
def test_a_step_ahead_writes_the_same(
    plain, ahead, sampling: dict[str, Any], captured: bool, request: pytest.FixtureRequest, ends_at
) -> None:
    """Rows end at different times, in buckets of 8, 4, 2 and 1."""
    if captured:
        request.getfixturevalue("graphs")
    ends = ends_at(2, 5, 9, 14)
    kwargs = {"max_new_tokens": 24, "eos_token_id": ends, "repetition_penalty": 1.1, **sampling}
    expected = plain.generate(PROMPTS, **kwargs)
    for _ in range(2):
        assert torch.equal(ahead.generate(PROMPTS, **kwargs), expected)


def test_buckets_shrink_and_rows_beyond_write_to_the_dummy_slot(
    plain, ahead, monkeypatch, ends_at
) -> None:
    counts, slots = [], []
    run = StepBuffers.run_steps

    def noted(self: StepBuffers, model: Any, cache: Any, count: int, **kwargs: Any) -> None:
        counts.append(count)
        slots.append(self.inputs.slots[:count].tolist())
        run(self, model, cache, count, **kwargs)

    ends = ends_at(2, 5, 9, 14)
    monkeypatch.setattr(StepBuffers, "run_steps", noted)
    ahead.generate(PROMPTS, max_new_tokens=30, eos_token_id=ends)
    assert counts[0] == 8 and slots[0] == [0, 1, 2, 3, 4, 5, 5, 5]
    assert sorted(set(counts), reverse=True) == counts[:1] + sorted(set(counts[1:]) - {8})[::-1]
    assert all(a >= b for a, b in zip(counts, counts[1:], strict=False)) and counts[-1] < 8
    for row in slots:
        live = [slot for slot in row if slot != 5]
        assert len(set(live)) == len(live)


def test_one_capture_serves_every_length_and_call(ahead, graphs) -> None:
    for tokens in (3, 40, 140):
        ahead.generate([PROMPTS[0]], max_new_tokens=tokens, eos_token_id=None)
    assert len(graphs) == 1, "the second call did not reuse the cache of the first"
    keys = {key for key in graphs[0]._graphs if key[0] != "prompt"}
    assert {key[:3] for key in keys} == {(True, 1, 1), (True, 1, step_buffers.MAX_STEPS)}
    # The first of all runs as it is.
    assert sum(key[2] * graphs[0]._graphs[key].replays for key in keys) >= 100
    ahead.generate([PROMPTS[1]], max_new_tokens=9, do_sample=True, eos_token_id=None)
    assert set(graphs[0]._graphs) > keys


@pytest.mark.slow
def test_graphs_stay_while_a_text_grows(ahead, graphs) -> None:
    """Pages never move, so graphs that point at them stay valid."""
    cache = ahead.new_cache(1)
    ahead.generate([PROMPTS[0]], max_new_tokens=30, eos_token_id=None, past_key_values=cache)
    before = dict(graphs[0]._graphs)
    ahead.generate([PROMPTS[0]], max_new_tokens=150, eos_token_id=None, past_key_values=cache)
    assert cache.reallocations == 0 and before
    assert before.items() <= graphs[0]._graphs.items()


@pytest.mark.slow
def test_a_table_that_widens_drops_the_graphs(ahead, plain, graphs) -> None:
    """On a GPU a table has only the needed columns, because kernels launch programs for each."""
    cache = ahead.new_cache(1)
    cache._pages.columns = 1
    cache._pages.lay_out()
    arguments = {"max_new_tokens": 140, "eos_token_id": None}
    found = ahead.generate([PROMPTS[0]], past_key_values=cache, **arguments)
    assert cache.reallocations == 2 and cache._pages.columns == 4
    assert torch.equal(found, plain.generate([PROMPTS[0]], **arguments))


def test_a_model_that_moves_or_goes_frees_its_graphs(ahead, graphs) -> None:
    ahead.generate([PROMPTS[0]], max_new_tokens=9, eos_token_id=None)
    held = weakref.ref(next(iter(graphs[0]._graphs.values())))
    graphs.clear()
    assert held() is not None
    ahead.to(torch.float64)
    gc.collect()
    assert held() is None


def test_buffers_of_another_model_are_not_used(ahead, graphs) -> None:
    cache = ahead.new_cache(2)
    first = ahead.workspace.buffers(ahead.network, cache)
    assert ahead.workspace.buffers(ahead.network, cache) is first
    ahead.network.ops = Capturing()
    assert ahead.workspace.buffers(ahead.network, cache) is not first


def test_callers_python_stands_outside_of_the_captured_forward(
    plain, ahead, graphs, ends_at
) -> None:
    ends = ends_at(2, 5, 9, 14)

    def dampen(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores - 0.5 * torch.nn.functional.one_hot(ids[:, -1], scores.shape[1])

    kwargs = {"max_new_tokens": 25, "eos_token_id": ends, "logits_processor": [dampen]}
    assert torch.equal(ahead.generate(PROMPTS, **kwargs), plain.generate(PROMPTS, **kwargs))
    assert {key[0] for each in graphs for key in each._graphs} == {False}


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("outside", [False, True], ids=["steps", "with a processor"])
def test_hooks_on_layers_see_the_text_and_no_graph(
    plain, ahead, graphs, rows, outside, ends_at
) -> None:
    """Hooks see each step and row once. Nothing is captured, runs ahead, or fills a bucket."""
    ends = ends_at(2, 5, 9, 14)
    kwargs = {"max_new_tokens": 24, "eos_token_id": ends}
    if outside:
        kwargs["logits_processor"] = [lambda ids, scores: scores * 1.0]
    cache = ahead.new_cache(rows)

    def write(model: Any, **more: Any) -> torch.Tensor:
        cache.reset()
        return model.generate(PROMPTS[:rows], **kwargs, **more)

    expected = write(plain)
    for _ in range(3):
        assert torch.equal(write(ahead, past_key_values=cache), expected)
    ours = graphs[-1]._graphs
    held = {key: graph.replays for key, graph in ours.items()}
    assert held
    for steer in (lambda mod, args, out: None, lambda mod, args, out: -out):
        found = []
        for model, more in ((plain, {}), (ahead, {"past_key_values": cache})):
            seen: list[int] = []
            layer = model.network.layers[3]
            hooks = (
                layer.register_forward_hook(lambda mod, args, out, to=seen: to.append(len(out))),
                layer.register_forward_hook(steer),
            )
            found.append((write(model, **more), seen))
            for hook in hooks:
                hook.remove()
        assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert not torch.equal(found[0][0], expected)
    assert held == {key: graph.replays for key, graph in ours.items()}
    assert torch.equal(write(ahead, past_key_values=cache), expected)
    assert sum(graph.replays for graph in ours.values()) > sum(held.values())


def test_a_second_turn_after_a_step_that_was_ahead(plain, ahead, ends_at) -> None:
    """A text ended, then a streamer stopped one. The lengths in the cache are right."""

    class Stop(Exception):
        pass

    class Streamer:
        left = 5

        def put(self, value: torch.Tensor) -> None:
            self.left -= 1
            if self.left < 0:
                raise Stop

        def end(self) -> None:
            pass

    ends = ends_at(6)
    cache = ahead.new_cache(1)
    text = ahead.generate([PROMPTS[0]], max_new_tokens=30, eos_token_id=ends, past_key_values=cache)
    assert cache.lengths == [text.shape[1] - 1]
    assert cache.history[0] == text[0, :-1].tolist()
    cache.rollback(1)
    turn = torch.cat([text, torch.tensor([[30, 31]])], 1)
    with pytest.raises(Stop):
        ahead.generate(turn, streamer=Streamer(), max_new_tokens=30, past_key_values=cache)
    assert cache.lengths[0] == len(cache.history[0]) > turn.shape[1]
    turn = torch.cat([torch.tensor([cache.history[0]]), torch.tensor([[33]])], 1)
    kwargs = {"max_new_tokens": 12, "eos_token_id": None}
    continued = ahead.generate(turn, past_key_values=cache, **kwargs)
    assert torch.equal(continued, plain.generate(turn, **kwargs))


@pytest.mark.parametrize("step", range(2, 2 + 2 * step_buffers.MAX_STEPS))
def test_steps_after_the_end_change_nothing_before_it(plain, ahead, step: int, ends_at) -> None:
    """A text ends at any of the steps of one launch. The next turn is still right."""
    cache, reference = ahead.new_cache(1), plain.new_cache(1)
    for model, held in ((ahead, cache), (plain, reference)):
        text = model.generate(
            [PROMPTS[0]], max_new_tokens=40, eos_token_id=ends_at(step), past_key_values=held
        )
    length = text.shape[1] - 1
    assert cache.lengths == reference.lengths == [length] and length < 4 + 39
    same_contents(cache, reference, 0)
    assert not cache.replay(0), "the rows of the window are gone"
    kwargs = {"max_new_tokens": 12, "eos_token_id": None}
    turn = torch.cat([text, torch.tensor([[30, 31]])], 1)
    assert torch.equal(
        ahead.generate(turn, past_key_values=cache, **kwargs), plain.generate(turn, **kwargs)
    )


@pytest.mark.parametrize("seen", range(1, 2 * step_buffers.MAX_STEPS + 1))
def test_a_reader_that_stops_within_a_launch_loses_no_token(text_alone, ahead, seen: int) -> None:
    """Steps of one launch are read one by one. The others are counted later."""
    cache = ahead.new_cache(1)
    row = Row(0, Request(PROMPTS[0]), 0, limit=30, arrival=0, slot=0)
    steps = DecodeLoop(ahead.network, cache)
    logits = ModelRunner(ahead.network, cache).prefill([PROMPTS[0]], [0])
    steps.admit([row], logits)
    assert steps.launch() == steps.launch() == step_buffers.MAX_STEPS
    for _ in zip(range(seen), steps.read(0), strict=False):
        pass
    assert len(row.written) >= seen
    steps.settle()
    expected = text_alone()
    assert row.written == expected[4 : 4 + 1 + 2 * step_buffers.MAX_STEPS]
    assert cache.history[0] == expected[: cache.lengths[0]]
    assert cache.lengths == [4 + 2 * step_buffers.MAX_STEPS]


def test_a_streamer_gets_each_token_at_once(ahead, monkeypatch) -> None:
    together = []
    run = StepBuffers.run_steps

    def noted(self: StepBuffers, *args: Any, steps: int, **kwargs: Any) -> None:
        together.append(steps)
        run(self, *args, steps=steps, **kwargs)

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            pass

        def end(self) -> None:
            pass

    monkeypatch.setattr(StepBuffers, "run_steps", noted)
    for streamer, steps in ((Streamer(), {1}), (None, {1, step_buffers.MAX_STEPS})):
        together.clear()
        ahead.generate([PROMPTS[0]], max_new_tokens=20, eos_token_id=None, streamer=streamer)
        assert set(together) == steps


class Puts:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[list[Any]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        assert value.dtype == torch.int64
        self.got.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("rows", [1, 2])
def test_a_streamer_sees_no_more_than_the_text(plain, ahead, rows: int, ends_at) -> None:
    """A step is running when the last row ends. It has no rows and does not belong to the text."""
    ends = ends_at(4, 7)[:rows]
    seen = {}
    for name, model in (("plain", plain), ("ahead", ahead)):
        streamer = Puts()
        written = model.generate(
            PROMPTS[:rows], max_new_tokens=12, eos_token_id=ends, streamer=streamer
        )
        seen[name] = (written.tolist(), streamer.got, streamer.ended)
    assert seen["ahead"] == seen["plain"]
    assert len(seen["plain"][1]) < 13, "the text did not end before its limit"


def test_parameters_may_change_on_a_kept_graph(plain, ahead, graphs) -> None:
    kwargs = {"max_new_tokens": 12, "do_sample": True, "seed": 2, "eos_token_id": None}
    for top_k in (3, 50, 7, 3):
        expected = plain.generate(PROMPTS[:2], top_k=top_k, **kwargs)
        assert torch.equal(ahead.generate(PROMPTS[:2], top_k=top_k, **kwargs), expected)


@pytest.mark.parametrize(
    ("prefix", "length"),
    [(0, 2), (0, 31), (0, 32), (0, 33), (0, 512), (0, 513), (0, 1), (5, 40), (70, 3)],
)
def test_short_prompts_are_captured(plain, ahead, graphs, prefix: int, length: int) -> None:
    """A prompt runs uncaptured, captured and replayed, also after a prefix. Padding changes
    nothing.
    """
    cache, expected = ahead.new_cache(2), plain.new_cache(2)
    chunks = [[1 + i % 97 for i in range(n)] for n in (prefix, length) if n]
    for chunk in chunks:
        wanted = ModelRunner(plain.network, expected).prefill([chunk], [1])
    runner = ModelRunner(ahead.network, cache)
    for _ in range(3):
        cache.reset()
        for chunk in chunks:
            found = runner.prefill([chunk], [1])
        torch.testing.assert_close(found, wanted)
        assert cache.lengths == expected.lengths and cache.history == expected.history
        same_contents(cache, expected, 1)
    sizes = {key[1] for graph in graphs for key in graph._graphs if key[0] == "prompt"}
    padded = {
        min(size for size in SIZES if size >= n) for n in (prefix, length) if 1 < n <= MOST_PADDED
    }
    assert sizes == padded


def test_of_long_prompts_a_full_chunk_alone_is_captured(ahead, graphs) -> None:
    buffers = StepBuffers(ahead.network, ahead.new_cache(1))
    assert SIZES[-1] == CHUNK
    for tokens, size in ((513, None), (CHUNK - 1, None), (CHUNK, CHUNK), (CHUNK + 1, None)):
        made = CapturedPrompt.of(ahead.network, buffers, tokens)
        assert (made and made.size) == size


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 8.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 8.0,
        "short_factor": [1.5] * 16,
        "long_factor": [2.0 + i for i in range(16)],
    },
}


@pytest.fixture(params=ROPES)
def scaled(tiny: Path, request: pytest.FixtureRequest) -> Any:
    """Loads the checkpoint with frequencies that depend on the length, beyond 24 tokens."""
    config = lfm2_fast.Lfm2Config.from_pretrained(tiny)
    config.update({"max_position_embeddings": 24, "rope_parameters": ROPES[request.param]})
    return lambda dtype, backend: lfm2_fast.load(
        tiny, config=config, device="cpu", dtype=dtype, backend=backend
    )


def test_captured_steps_pass_the_original_context(scaled, graphs) -> None:
    """Each row passes it at another time, in the middle of replays."""
    plain, ahead = (scaled("float64", "eager") for _ in range(2))
    ahead.network.ops = Capturing()
    kwargs = {"max_new_tokens": 25, "eos_token_id": None}
    expected = plain.generate(PROMPTS[1:3], **kwargs)
    assert torch.equal(ahead.generate(PROMPTS[1:3], **kwargs), expected)
    assert sum(graph.replays for each in graphs for graph in each._graphs.values()) > 4


def test_a_prompt_in_chunks_that_could_be_captured(scaled, graphs, monkeypatch) -> None:
    """The first chunk has the frequencies of the whole prompt, so its graph cannot be used."""
    plain, ahead = (scaled("float64", "eager") for _ in range(2))
    ahead.network.ops = Capturing()
    prompt = [1 + i % 97 for i in range(50)]
    wanted = ModelRunner(plain.network, plain.new_cache(1)).prefill([prompt], [0])
    monkeypatch.setattr(model_runner, "CHUNK", 20)
    cache = ahead.new_cache(1)
    runner = ModelRunner(ahead.network, cache)
    for _ in range(3):
        cache.reset()
        found = runner.prefill([prompt], [0])
        torch.testing.assert_close(found, wanted)
    assert {key[0] for each in graphs for key in each._graphs} == {"prompt"}


@pytest.mark.skipif(native_library.why_not(torch.device("cpu")) is not None, reason="no extension")
def test_recorded_steps_pass_the_original_context(scaled) -> None:
    """Each row has the same bits as alone, unrecorded."""
    model = scaled("bfloat16", "native")
    kwargs = {"max_new_tokens": 30, "eos_token_id": None}
    found = model.generate(PROMPTS[:3], **kwargs)[:, 7:].tolist()
    model.ops.cpu_graph_rows = 0
    for row, prompt in zip(found, PROMPTS[:3], strict=True):
        assert model.generate([prompt], **kwargs)[0, len(prompt) :].tolist() == row


def same_contents(ours: Cache, theirs: Cache, slot: int) -> None:
    """Check that two caches hold the same in a slot, as far as it may be read."""
    length = theirs.lengths[slot]
    held = range(max(length - theirs.past, 0), length)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        if isinstance(a, ConvWindow) and isinstance(b, ConvWindow):
            a_rows, b_rows = ([x.rows[slot, i % len(x.rows[slot])] for i in held] for x in (a, b))
            torch.testing.assert_close(a_rows, b_rows)
        elif isinstance(a, KVPages) and isinstance(b, KVPages):
            pair = sequence_of(ours, a, slot), sequence_of(theirs, b, slot)
            for x, y in zip(*pair, strict=True):
                torch.testing.assert_close(x, y)


def test_slots_of_unknown_content_are_emptied(ahead, monkeypatch) -> None:
    """The device failed, so the contents of the slots are unknown, and they are emptied."""
    cache = ahead.new_cache(1)

    def fail(self: StepBuffers, *args: Any, **kwargs: Any) -> None:
        self.inputs = None
        raise RuntimeError("device")

    monkeypatch.setattr(DecodeLoop, "_copy_to_host", fail)
    with pytest.raises((RuntimeError, AttributeError)):
        ahead.generate([PROMPTS[0]], max_new_tokens=5, past_key_values=cache)
    monkeypatch.undo()
    expected = ahead.generate([PROMPTS[0]], max_new_tokens=5)
    assert torch.equal(
        ahead.generate([PROMPTS[0]], max_new_tokens=5, past_key_values=cache), expected
    )


def breaks_after(tiny: Path, token: int) -> lfm2_fast.Lfm2ForCausalLM:
    """Return a model like ``ahead``, with NaN as the logits after ``token``."""
    model = lfm2_fast.load(tiny, device="cpu", dtype="float64", backend="eager")
    network = model.network
    network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.clone(), requires_grad=False)
    network.embed_tokens.weight.data[token] = torch.nan
    network.ops = Capturing()
    return model


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 3, "temperature": 1.5}])
@pytest.mark.parametrize("step", range(2 * step_buffers.MAX_STEPS))
def test_a_row_without_a_token_among_steps_in_flight(
    tiny: Path, plain, text_alone, graphs, step: int, sampling: dict[str, Any]
) -> None:
    """The error names the row at any step of a launch, and the cache's lengths are right."""
    kwargs = {"max_new_tokens": 30, "eos_token_id": None, **sampling}
    text = text_alone(**sampling)
    firsts = [place for place in range(4, len(text)) if text[place] not in text[:place]]
    broken = firsts[step]
    model = breaks_after(tiny, text[broken])
    cache = model.new_cache(1)
    message = f"^row 0 .* new token {broken - 2}, at position {broken + 1}: "
    for _ in range(2):
        cache.reset()
        with pytest.raises(lfm2_fast.LogitsError, match=message):
            model.generate([PROMPTS[0]], past_key_values=cache, **kwargs)
        assert cache.history[0] == text[: broken + 1] and cache.lengths == [broken + 1]
    turn = [*text[:broken], 30, 31]
    kwargs["max_new_tokens"] = 2
    expected = plain.generate([turn], **kwargs)
    assert text[broken] not in expected[0, :-1], "it is written again"
    found = model.generate([turn], past_key_values=cache, **kwargs)
    assert torch.equal(found, expected)


def test_the_other_rows_of_a_batch_are_settled(tiny: Path, plain, graphs) -> None:
    """Their running steps are counted, and they continue."""
    kwargs = {"max_new_tokens": 30, "eos_token_id": None, "do_sample": True, "seed": 5}
    written = plain.generate(PROMPTS, **kwargs)[:, 7:].tolist()
    texts = [prompt + row for prompt, row in zip(PROMPTS, written, strict=True)]
    seen = [token for text in texts for token in text]
    broken = next(place for place in range(14, 30) if seen.count(texts[2][place]) == 1)
    model = breaks_after(tiny, texts[2][broken])
    cache = model.new_cache(5)
    with pytest.raises(lfm2_fast.LogitsError, match=f"^row 2 .* at position {broken + 1}: "):
        model.generate(PROMPTS, past_key_values=cache, **kwargs)
    # The row that broke holds what it has run; a step of the others was running.
    ran = broken + 1 - len(PROMPTS[2])
    assert cache.lengths == [len(p) + ran + (row != 2) for row, p in enumerate(PROMPTS)]
    assert cache.history == [text[:n] for text, n in zip(texts, cache.lengths, strict=True)]
    turns = [[*held, 33] for held in cache.history]
    turns[2] = [*texts[2][:broken], 34]
    kwargs["max_new_tokens"] = 5
    expected = plain.generate(turns, **kwargs)
    assert texts[2][broken] not in expected[:, :-1], "it is written again"
    found = model.generate(turns, past_key_values=cache, **kwargs)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("which", "at_a_time"),
    [
        ("ahead", 3),
        pytest.param("ahead", 1, marks=pytest.mark.slow),
        pytest.param("plain", 2, marks=pytest.mark.slow),
        *(
            pytest.param(w, n, marks=pytest.mark.nightly)
            for w in ("plain", "ahead")
            for n in (7, 9)
        ),
    ],
)
def test_more_prompts_than_rows(
    plain, at_a_time: int, which: str, request: pytest.FixtureRequest, ends_at
) -> None:
    """Answers are in order, each as if alone, in slots that were used before."""
    model = request.getfixturevalue(which)
    prompts = PROMPTS + [list(reversed(prompt)) for prompt in PROMPTS] + [PROMPTS[0]]
    kwargs = {
        "max_new_tokens": 12, "eos_token_id": ends_at(2, 5, 9), "do_sample": True,
        "seed": 4, "repetition_penalty": 1.2, "temperature": 0.7,
    }  # fmt: skip
    expected = plain.generate(prompts, **kwargs)
    assert torch.equal(model.generate(prompts, **kwargs, max_batch_size=at_a_time), expected)
    copies = {**kwargs, "num_return_sequences": 2}
    expected = plain.generate(prompts[:3], **copies)
    assert torch.equal(model.generate(prompts[:3], **copies, max_batch_size=at_a_time), expected)


def test_a_long_prompt_that_waited_moves_pages_under_steps_in_flight(plain, ahead, ends_at) -> None:
    """Tokens that these steps wrote, and the host has not read, are on the new pages."""
    prompts = [PROMPTS[0], PROMPTS[1], [1 + i % 97 for i in range(300)]]
    ends = ends_at(5)
    kwargs = {"max_new_tokens": 40, "eos_token_id": ends}
    found = ahead.generate(prompts, max_batch_size=2, **kwargs)
    assert torch.equal(found, plain.generate(prompts, **kwargs))


def test_rows_stay_busy(plain, monkeypatch, ends_at) -> None:
    sizes = []
    run_blocks = Lfm2.run_blocks

    def counted(self: Any, tokens: Any, batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if batch.max_query == 1:
            sizes.append(len(tokens))
        return run_blocks(self, tokens, batch, *args, **kwargs)

    ends = ends_at(2, 5, 9, 14)
    monkeypatch.setattr(Lfm2, "run_blocks", counted)
    plain.generate(PROMPTS, max_new_tokens=30, eos_token_id=ends, max_batch_size=2)
    assert max(sizes) == 2
    assert 1 not in sizes[: sizes.index(1)] and set(sizes[sizes.index(1) :]) == {1}


def test_results_of_all_rows_need_all_rows_at_once(plain) -> None:
    for wrong in (
        {"logits_processor": [lambda ids, scores: scores]},
        {"streamer": Puts()},
        {"past_key_values": plain.new_cache(5)},
    ):
        with pytest.raises(ValueError, match="need all rows at a time"):
            plain.generate(PROMPTS, max_batch_size=2, max_new_tokens=3, **wrong)
    with pytest.raises(ValueError, match="max_batch_size must be at least 1"):
        plain.generate(PROMPTS, max_batch_size=0)


def test_progress_is_reported(plain, monkeypatch) -> None:
    told = []

    class Bar:
        def update(self) -> None:
            told.append(1)

        def close(self) -> None:
            told.append(0)

    monkeypatch.setattr(generate_call, "progress_bar", lambda rows: told.append(rows) or Bar())
    plain.generate(PROMPTS, max_new_tokens=3, max_batch_size=2)
    assert told == [5, 1, 1, 1, 1, 1, 0]


def test_out_of_memory_says_what_to_lower(tiny: Path, monkeypatch) -> None:
    def full(self: Any, *args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = lfm2_fast.load(tiny, device="cpu", backend="eager")
    monkeypatch.setattr(PageMemory, "grow", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"5 rows of up to 27 tokens.*max_batch_size"):
        model.generate(PROMPTS, max_new_tokens=20)


@pytest.mark.slow
def test_contexts_grow_across_pages(plain, ahead) -> None:
    kwargs = {"max_new_tokens": 140, "eos_token_id": None}
    assert torch.equal(ahead.generate(PROMPTS[:2], **kwargs), plain.generate(PROMPTS[:2], **kwargs))


def test_max_length_is_an_error_that_loses_nothing(ahead) -> None:
    cache = ahead.new_cache(1, 12)
    row = Row(0, Request(PROMPTS[0]), 0, limit=100, arrival=0, slot=0)
    steps = DecodeLoop(ahead.network, cache)
    logits = ModelRunner(ahead.network, cache).prefill([PROMPTS[0]], [0])
    steps.admit([row], logits)
    with pytest.raises(CacheError, match="max_length of 12"):
        while steps.launch():
            list(steps.read(steps.lag))
    steps.settle()
    assert len(row.written) == 9 and cache.lengths == [12]
    assert cache.history[0] == PROMPTS[0] + row.written[:-1]


def test_threads_and_models_do_not_disturb_each_other(tiny, plain, ahead, graphs) -> None:
    kwargs = {"do_sample": True, "max_new_tokens": 10}
    expected = [plain.generate(PROMPTS, seed=seed, **kwargs) for seed in range(4)]
    other = lfm2_fast.load(tiny, device="cpu", dtype="float64", backend="eager")
    other.network.ops = Capturing()
    found: dict[int, torch.Tensor] = {}

    def work(seed: int) -> None:
        model = (ahead, other)[seed % 2]
        for _ in range(2):
            found[seed] = model.generate(PROMPTS, seed=seed, **kwargs)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(4))


def test_state_and_copies_leave_out_dummy_slot_and_graphs(plain, ahead, graphs) -> None:
    import copy

    caches = [plain.new_cache(2), ahead.new_cache(2)]
    for model, cache in zip((plain, ahead), caches, strict=True):
        kwargs = {"max_new_tokens": 5, "eos_token_id": None}
        model.generate(PROMPTS[:2], past_key_values=cache, **kwargs)
    assert caches[1].dummy_slot == 2 and len(caches[1].layers[0].rows) == 3
    twin = copy.deepcopy(caches[1])
    buffers = ahead.workspace.buffers(ahead.network, caches[1])
    assert buffers.graphs._warm
    assert ahead.workspace.buffers(ahead.network, twin) is not buffers
    state = caches[1].state_dict()
    fresh = ahead.new_cache(2)
    fresh.load_state_dict(state)
    assert fresh.lengths == caches[0].lengths and fresh.history == caches[0].history
    assert all(len(tensor) != 3 for name, tensor in state.items() if name.startswith("layers"))


@pytest.mark.parametrize("dummy_slot", [None, 7])
@pytest.mark.parametrize("body", ["triton", "native"])
def test_advance(body: str, dummy_slot: int | None, kernel_device) -> None:
    from lfm2_fast.kernels.advance import advance_triton

    if body == "native" and native_library.why_not(torch.device("cpu")):
        pytest.skip("the extension was not built")
    device = kernel_device if body == "triton" else torch.device("cpu")
    advance = advance_triton if body == "triton" else torch.ops.lfm2_fast.advance_native
    torch.manual_seed(0)
    for count in (0, 1, 3, 200):
        chosen = torch.randint(-1, 5, (count,))
        finished = torch.rand(count) < 0.3
        positions = torch.randint(100, (count,))
        inputs = [torch.full((count,), 99), torch.arange(count), positions]
        inputs += [(positions + 1).int(), finished]
        ours = [each.clone().to(device) for each in inputs]
        before, eos = [each.clone() for each in inputs], torch.randint(-1, 5, (count, 2))
        written, theirs = (torch.full((count,), 77) for _ in "ab")
        theirs = theirs.to(device)
        advance_ref(chosen, eos, dummy_slot, DecodeInputs(*inputs), written)
        advance(chosen.to(device), eos.to(device), dummy_slot, *ours, theirs)
        assert torch.equal(written, chosen) and torch.equal(theirs.cpu(), chosen)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(inputs, ours, strict=True))
        tokens, slots, positions, lengths, ended = inputs
        expected = before[4] | (chosen[:, None] == eos).any(-1) | (chosen == -1)
        assert torch.equal(ended, expected)
        # A negative token must not be looked up in the embedding.
        assert torch.equal(tokens, chosen.where(chosen >= 0, 0))
        assert torch.equal(lengths, (positions + 1).int())
        # A row that ends is one position past its text: its last token has run.
        goes = before[2] + ~before[4]
        assert torch.equal(positions, goes if dummy_slot is None else goes.where(~expected, 0))
        assert torch.equal(
            slots, before[1] if dummy_slot is None else before[1].where(~expected, dummy_slot)
        )


def test_buckets() -> None:
    class Some:
        dummy_slot: int | None = 9

    assert [bucket(n, Some()) for n in range(10)] == [0, 1, 2, 4, 4, 8, 8, 8, 8, 16]
    Some.dummy_slot = None
    assert [bucket(n, Some()) for n in range(5)] == [0, 1, 2, 3, 4]
    assert step_buffers.EOS_TOKENS >= 1
