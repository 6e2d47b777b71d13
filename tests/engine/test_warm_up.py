"""warm_up(): afterwards requests compile and capture nothing, and it leaves nothing behind."""

from __future__ import annotations

import pytest

import lfm2_fast
from bench.cpu.adapters import write_adapter
from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.request import Request
from lfm2_fast.engine.statistics import Statistics
from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.ops.sampling import SamplingParams
from tests.engine.capturing import Capturing

DRAWN = SamplingParams(do_sample=True, temperature=0.7, min_p=0.15, repetition_penalty=1.05)


@pytest.fixture
def model(random_checkpoint) -> Lfm2:
    """A small network whose steps are launched a step ahead, in buckets."""
    folder = random_checkpoint(num_hidden_layers=2, layer_types=["conv", "full_attention"])
    model = lfm2_fast.load(folder, device="cpu", dtype="float32", backend="eager").network
    model.ops = Capturing()
    return model


def test_requests_find_all_of_it_captured(model, graphs) -> None:
    engine = Engine(model, max_rows=3, max_length=160)
    pool = engine.cache.pool
    used = pool.used
    engine.warm_up([DRAWN])
    assert engine.statistics == Statistics() and (pool.used, pool.cached) == (used, 0)
    (made,) = graphs
    warm = set(made._warm)
    assert warm == set(made._graphs)
    for params, more in ((SamplingParams(), {}), (DRAWN, {}), (SamplingParams(), {"logprobs": 2})):
        for rows in (1, 2, 3):
            for row in range(rows):
                prompt = list(range(1 + row, 100))
                engine.add(Request(prompt, params, max_tokens=9, stream=row > 0, **more))
            while engine.busy:
                engine.step()
    assert made._warm == warm, "a request met work that was not warm"


def test_requests_with_adapters_find_their_steps_captured(model, graphs, tmp_path) -> None:
    """Beside rows without one, too."""
    folder = write_adapter(tmp_path / "adapter", model.config, 4, 0)
    model.adapters.load(folder, "one", model.embedding_norm.weight)
    engine = Engine(model, max_rows=2, max_length=160)
    engine.warm_up()
    (made,) = graphs
    warm = set(made._warm)
    for names in (("one",), ("one", None), (None,)):
        for name in names:
            engine.add(Request(list(range(1, 100)), max_tokens=9, adapter=name))
        while engine.busy:
            engine.step()
    assert made._warm == warm, "a request met work that was not warm"


def test_requests_that_run_are_not_disturbed(model, graphs) -> None:
    engine = Engine(model, max_rows=1, max_length=40)
    engine.add(Request([1, 2], max_tokens=3))
    with pytest.raises(RuntimeError, match="without requests"):
        engine.warm_up()
    engine.abandon()
    engine.close()
    with pytest.raises(RuntimeError, match="asleep"):
        engine.warm_up()


def test_a_cpu_runs_nothing(native) -> None:
    engine = Engine(native, max_rows=2, max_length=40)
    engine.warm_up([DRAWN])
    assert engine.statistics == Statistics()
