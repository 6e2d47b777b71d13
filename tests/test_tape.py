"""The tape: what it replays, and what it refuses to record."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import lfm2_fast
from lfm2_fast import graphs, native
from lfm2_fast.tape import Tape


def test_what_was_made_is_made_again() -> None:
    """Functions, results that are written over, changes in place, views, several results."""
    x, total, seen = torch.arange(6.0).view(2, 3), torch.zeros(2), []

    def body() -> None:
        kept = x.new_empty(2, 3)
        torch.mul(x, 2, out=kept)
        best, at = kept.T.max(0)
        total.add_(best + at)
        seen.append((best, at))

    tape = Tape(body)
    expected = torch.zeros(2)
    for step in range(3):
        x.copy_(torch.randn(2, 3))
        tape.replay()
        doubled = 2 * x
        expected += doubled.amax(1) + doubled.argmax(1)
        best, at = seen[0]
        assert torch.equal(best, doubled.amax(1)) and torch.equal(at, doubled.argmax(1)), step
        assert torch.allclose(total, expected)
    assert len(seen) == 1, "the body ran again"


@pytest.mark.parametrize(
    "waits", [lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x[0].item()]
)
def test_what_depends_on_what_tensors_hold_is_refused(waits) -> None:
    x = torch.ones(3)
    tape = Tape(lambda: waits(x))
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be replayed"):
            tape.replay()


def test_what_was_recorded_does_not_hold_the_body() -> None:
    class Owner:
        pass

    owner, x = Owner(), torch.ones(2)
    owner.tape = Tape(lambda held=owner: x.add_(1))
    owner.tape.replay()
    alive = weakref.ref(owner)
    gc.disable()
    try:
        del owner
        assert alive() is None
    finally:
        gc.enable()


needs_native = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason="no extension"
)


@needs_native
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize(
    "sampling", [{}, {"do_sample": True, "seed": 7, "repetition_penalty": 1.1}]
)
def test_generation_is_taped_and_writes_the_same(tiny, quantization, sampling, monkeypatch) -> None:
    """Rows that end at different times, beyond the place where the cache grows."""
    model = lfm2_fast.load(tiny, device="cpu", dtype="bfloat16", quantization=quantization)
    prompts = [[1, 40, 41, 42], [1, 50], [1, 60, 61, 62, 63]]
    ask = {"max_new_tokens": 300, **sampling}
    replays = []
    replay = Tape.replay
    monkeypatch.setattr(Tape, "replay", lambda tape: (replays.append(tape), replay(tape))[1])
    taped = model.generate(prompts, **ask)
    assert len(replays) > 100 and len(set(map(id, replays))) < 12
    monkeypatch.setattr(model.ops, "tapes", 0)
    count = len(replays)
    assert torch.equal(model.generate(prompts, **ask), taped)
    assert len(replays) == count


@needs_native
def test_a_step_for_the_callers_own_python_is_taped_too(tiny, monkeypatch) -> None:
    model = lfm2_fast.load(tiny, device="cpu", dtype="bfloat16")
    ask = {"max_new_tokens": 20, "logits_processor": [lambda ids, scores: scores * 1.0]}
    made = []
    capture = graphs.Tape
    monkeypatch.setattr(graphs, "Tape", lambda body: made.append(capture(body)) or made[-1])
    taped = model.generate([[1, 40, 41]], **ask)
    assert made
    monkeypatch.setattr(model.ops, "tapes", 0)
    assert torch.equal(model.generate([[1, 40, 41]], **ask), taped)


@needs_native
def test_a_conversation_begun_in_inference_mode_goes_on_outside(tiny) -> None:
    model = lfm2_fast.load(tiny, device="cpu", dtype="bfloat16")
    cache = model.new_cache(1)
    with torch.inference_mode():
        first = model.generate([[1, 40, 41]], max_new_tokens=6, past_key_values=cache)
    longer = torch.cat([first.clone(), torch.tensor([[50, 51]])], 1)
    turn = model.generate(longer, max_new_tokens=6, past_key_values=cache)
    assert torch.equal(turn, model.generate(longer, max_new_tokens=6))
