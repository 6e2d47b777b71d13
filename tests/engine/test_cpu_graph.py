"""The CPU graph: what it replays, and what it refuses to record."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch

import lfm2_fast
from lfm2_fast.engine import graphs
from lfm2_fast.engine.cpu_graph import CpuGraph
from lfm2_fast.ops import native_library


def test_a_replay_makes_the_recorded_results_again() -> None:
    """Cases are functions, overwritten results, changes in place, views, several results."""
    x, total, seen = torch.arange(6.0).view(2, 3), torch.zeros(2), []

    def body() -> None:
        kept = x.new_empty(2, 3)
        torch.mul(x, 2, out=kept)
        best, at = kept.T.max(0)
        total.add_(best + at)
        seen.append((best, at))

    graph = CpuGraph(body)
    expected = torch.zeros(2)
    for step in range(3):
        x.copy_(torch.randn(2, 3))
        graph.replay()
        doubled = 2 * x
        expected += doubled.amax(1) + doubled.argmax(1)
        best, at = seen[0]
        assert torch.equal(best, doubled.amax(1)) and torch.equal(at, doubled.argmax(1)), step
        assert torch.allclose(total, expected)
    assert len(seen) == 1, "the body ran again"


@pytest.mark.parametrize(
    "waits", [lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x[0].item()]
)
def test_work_that_depends_on_tensor_values_is_refused(waits) -> None:
    x = torch.ones(3)
    graph = CpuGraph(lambda: waits(x))
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be replayed"):
            graph.replay()


def test_a_recording_does_not_keep_its_body_alive() -> None:
    class Owner:
        pass

    owner, x = Owner(), torch.ones(2)
    owner.graph = CpuGraph(lambda held=owner: x.add_(1))
    owner.graph.replay()
    alive = weakref.ref(owner)
    gc.disable()
    try:
        del owner
        assert alive() is None
    finally:
        gc.enable()


needs_native = pytest.mark.skipif(
    native_library.why_not(torch.device("cpu")) is not None, reason="no extension"
)


@needs_native
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize(
    "sampling", [{}, {"do_sample": True, "seed": 7, "repetition_penalty": 1.1}]
)
def test_generation_is_recorded_and_writes_the_same(
    tiny, quantization, sampling, monkeypatch
) -> None:
    """Rows end at different times, after the cache has grown."""
    model = lfm2_fast.load(tiny, device="cpu", dtype="bfloat16", quantization=quantization)
    prompts = [[1, 40, 41, 42], [1, 50], [1, 60, 61, 62, 63]]
    ask = {"max_new_tokens": 300, **sampling}
    replays = []
    replay = CpuGraph.replay
    monkeypatch.setattr(CpuGraph, "replay", lambda graph: (replays.append(graph), replay(graph))[1])
    taped = model.generate(prompts, **ask)
    assert len(replays) > 100 and len(set(map(id, replays))) < 12
    monkeypatch.setattr(model.ops, "cpu_graph_rows", 0)
    count = len(replays)
    assert torch.equal(model.generate(prompts, **ask), taped)
    assert len(replays) == count


@needs_native
def test_a_step_for_the_callers_own_python_is_recorded_too(tiny, monkeypatch) -> None:
    model = lfm2_fast.load(tiny, device="cpu", dtype="bfloat16")
    ask = {"max_new_tokens": 20, "logits_processor": [lambda ids, scores: scores * 1.0]}
    made = []
    capture = graphs.CpuGraph
    monkeypatch.setattr(graphs, "CpuGraph", lambda body: made.append(capture(body)) or made[-1])
    taped = model.generate([[1, 40, 41]], **ask)
    assert made
    monkeypatch.setattr(model.ops, "cpu_graph_rows", 0)
    assert torch.equal(model.generate([[1, 40, 41]], **ask), taped)


@needs_native
@pytest.mark.parametrize("processors", [[], [lambda ids, scores: scores * 1.0]])
def test_recorded_steps_rest_while_layers_have_hooks(tiny, processors, monkeypatch) -> None:
    """Recorded steps are not replayed with a hook, and are replayed again without it."""
    model = lfm2_fast.load(tiny, device="cpu", dtype="float32")
    cache, replays = model.new_cache(1), []
    replay = CpuGraph.replay
    monkeypatch.setattr(CpuGraph, "replay", lambda graph: (replays.append(graph), replay(graph))[1])

    def write() -> torch.Tensor:
        cache.reset()
        ask = {"max_new_tokens": 10, "eos_token_id": [], "logits_processor": processors}
        return model.generate([[1, 40, 41]], past_key_values=cache, **ask)

    plain = write()
    assert len(replays) == 8 and len(set(replays)) == 1
    replays.clear()
    seen: list[float] = []
    layer = model.network.layers[3]
    hooks = (
        layer.register_forward_hook(lambda mod, args, out: seen.append(float(out.norm()))),
        layer.register_forward_hook(lambda mod, args, out: -out),
    )
    steered = write()
    assert len(seen) == 10 and not replays and not torch.equal(steered, plain)
    for hook in hooks:
        hook.remove()
    assert torch.equal(write(), plain)
    assert len(seen) == 10 and len(replays) >= 8 and len(set(replays)) == 1


@needs_native
@pytest.mark.parametrize("token", [1, 2, 3])
def test_a_hook_that_comes_in_the_middle_is_in_no_graph(tiny, token: int) -> None:
    """The hook comes at any step. Later calls on the cache run without it."""
    model = lfm2_fast.load(tiny, device="cpu", dtype="float32")
    cache, layer, hooks = model.new_cache(1), model.network.layers[3], []

    def begin(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 3 + token and not hooks:
            hooks.append(layer.register_forward_hook(lambda mod, args, out: -out))
        return scores

    def write(**more: Any) -> torch.Tensor:
        ask = {"max_new_tokens": 10, "eos_token_id": [], "logits_processor": [begin]}
        return model.generate([[1, 40, 41]], **ask, **more)

    write(past_key_values=cache)
    hooks[0].remove()
    expected = write()
    for _ in range(2):
        cache.reset()
        assert torch.equal(write(past_key_values=cache), expected)


@needs_native
def test_a_conversation_begun_in_inference_mode_goes_on_outside(tiny) -> None:
    model = lfm2_fast.load(tiny, device="cpu", dtype="bfloat16")
    cache = model.new_cache(1)
    with torch.inference_mode():
        first = model.generate([[1, 40, 41]], max_new_tokens=6, past_key_values=cache)
    longer = torch.cat([first.clone(), torch.tensor([[50, 51]])], 1)
    turn = model.generate(longer, max_new_tokens=6, past_key_values=cache)
    assert torch.equal(turn, model.generate(longer, max_new_tokens=6))


@pytest.mark.slow
def test_recording_imports_no_compiler(tiny) -> None:
    """torch's compiler takes a second, which would delay the second token of every process."""
    code = (
        "import sys, lfm2_fast; model = lfm2_fast.load(sys.argv[1], device='cpu'); "
        "model.generate([[1, 40, 41]], max_new_tokens=6, eos_token_id=[]); "
        "names = 'lfm2_fast.engine.cpu_graph', 'torch._dynamo'; "
        "print([name for name in names if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, tiny]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "['lfm2_fast.engine.cpu_graph']\n"


LONG = """
import json, sys, weakref
import lfm2_fast
from lfm2_fast.engine import graphs
from lfm2_fast.cli.machine_load import memory

class CpuGraph(graphs.CpuGraph):
    def __init__(self, body):
        super().__init__(body)
        made.append(weakref.ref(self))

class Watch:
    tokens = -1  # the first that is put is the prompt

    def put(self, tokens):
        self.tokens += 1
        if self.tokens in (first, last):
            alive.append(sum(graph() is not None for graph in made))
            resident.append(memory()["resident"])

    def end(self):
        pass

first, last = map(int, sys.argv[2:])
made, alive, resident = [], [], []
graphs.CpuGraph = CpuGraph
model = lfm2_fast.load(sys.argv[1], device="cpu", dtype="bfloat16")
options = dict(do_sample=True, seed=0, repetition_penalty=1.1, eos_token_id=None)
for count, watch in ((first * 3 // 5, None), (last, Watch())):
    model.generate([[1, 40, 41]], max_new_tokens=count, streamer=watch, **options)
cached = model.network.config.cache_bytes(model.dtype.itemsize) * (last - first)
print(json.dumps([resident[1] - resident[0] - cached, len(made), alive]))
"""


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "last"), [(400, 2_000), pytest.param(2_000, 10_000, marks=pytest.mark.nightly)]
)
def test_a_long_text_takes_the_caches_memory_alone(tiny, tmp_path, first: int, last: int) -> None:
    """From the ``first`` token on, the process grows only by the new keys and values.

    Python also keeps each token in two lists, some 50 bytes. The smallest leaked tensor would take
    480, so the limit is 128.
    """
    longer = shutil.copytree(tiny, tmp_path / "longer")
    config = json.loads((longer / "config.json").read_text())
    config["max_position_embeddings"] = last + 100
    (longer / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", LONG, longer, str(first), str(last)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, made, alive = json.loads(done.stdout)
    assert grown < 128 * (last - first)
    # What was recorded on a cache goes with it, and stays while the cache does.
    assert made == 2 and alive == [1, 1]
