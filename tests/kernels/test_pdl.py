"""Kernels of a decode step: their number, and those that may begin before the previous one ends."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import lfm2_fast
from lfm2_fast.cache.batch import DecodeInputs
from lfm2_fast.engine.step_buffers import StepBuffers
from lfm2_fast.kernels.gemv import MOST_TOKENS
from lfm2_fast.ops.sampling import SamplingParams
from lfm2_fast.ops.select import has_dependent_launch
from lfm2_fast.ops.triton_ops import TritonOps
from tests.batches import fill

# The embedding's rows, and the angles of rotary embedding.
START = ["embed_rope"]
CONV = ["norm_conv", "linear_add", "norm_swiglu", "linear_add"]
ATTENTION = ["norm_linear", "flash_decode", "linear_add", "norm_swiglu", "linear_add"]
END = ["head_argmax", "argmax_advance"]
ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")


class Launches(TorchDispatchMode):
    """Notes every Triton kernel and every PyTorch operation that is not a view or an allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.dependent: list[str] = []
        self._patch = pytest.MonkeyPatch()
        self._inside = False

    def __enter__(self) -> Launches:
        for owner, name in ((interpreter.GridExecutor, "__call__"), (triton.JITFunction, "run")):
            self._patch.setattr(owner, name, self._noting(getattr(owner, name)))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()

    def _noting(self, launch: Any) -> Any:
        def noted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self.names.append(kernel.fn.__name__.strip("_").removesuffix("_kernel"))
            assert kwargs.get("PDL", False) == kwargs.get("launch_pdl", False)
            self.dependent += self.names[-1:] * kwargs.get("PDL", False)
            self._inside = True  # the interpreter is written in PyTorch, too
            try:
                return launch(kernel, *args, **kwargs)
            finally:
                self._inside = False

        return noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if not (self._inside or func.is_view or name in ALLOCATIONS):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model(request, random_checkpoint, kernel_device):
    """Return a model of three layers, with a test's changes of its config."""
    layers = {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}
    folder = random_checkpoint(**layers, **getattr(request, "param", {}))
    return lfm2_fast.load(folder, device=kernel_device, backend="triton")


@pytest.fixture
def step(model):
    """Runs one token in each of some slots, twice; gives the second's launches and answer."""

    def step(rows: int, greedy: bool) -> tuple[list[str], torch.Tensor]:
        cache = model.new_cache(rows)
        for last in (False, True):
            batch = cache.next_batch([1] * rows, range(rows), model.device)
            tokens = torch.arange(9, 9 + rows, device=model.device)
            places = batch.slots, batch.positions, batch.lengths
            inputs = DecodeInputs(tokens, *places, torch.zeros_like(tokens, dtype=torch.bool))
            answer, eos = torch.empty_like(tokens), torch.full_like(tokens, -1)[:, None]
            cache.reserve(batch)
            with Launches() as launches:
                if last and greedy:
                    model.network.advance(inputs, batch, cache, eos, answer)
                else:
                    answer = model.network(tokens, batch, cache)
            cache.commit_batch(batch)
        return launches.names, answer

    return step


@pytest.mark.parametrize("rows", [1, MOST_TOKENS])
def test_a_decode_step(rows, step) -> None:
    """4 launches a conv layer, 5 an attention layer, 2 at the end, and one at the start.

    The last one writes the next step's inputs, too.
    """
    greedy, tokens = step(rows, greedy=True)
    assert greedy == START + CONV + ATTENTION + CONV + END
    assert len(CONV) <= 4 and len(ATTENTION) <= 5 and len(END) <= 2 and len(START) == 1
    names, logits = step(rows, greedy=False)
    assert names == [*greedy[: -len(END)], "norm_linear"]
    assert tokens.tolist() == logits.argmax(-1).tolist()


def test_more_rows_than_few(step) -> None:
    """The library multiplies again, and the best token is the same one's."""
    names, tokens = step(MOST_TOKENS + 1, greedy=True)
    assert "norm_linear" not in names and names.count("aten::mm") == 3 * 4 + 1
    assert tokens.tolist() == step(MOST_TOKENS + 1, greedy=False)[1].argmax(-1).tolist()


@pytest.fixture
def waits(model, monkeypatch) -> Iterator[None]:
    """Follows, in the interpreter, what programs of dependent launches do before they wait.

    Each waits once. Before the wait it stores nothing, and loads only the model's weights and
    frequencies: a step writes all else, or the host before it.
    """
    if model.device.type != "cpu":
        yield
        return
    from triton.runtime.interpreter import interpreter_builder as builder

    constants = [*model.state_dict().values(), model.network.rope_frequencies.inv_freq]
    begins = np.array([each.data_ptr() for each in constants])
    ends = begins + [each.nbytes for each in constants]
    waiting, waited = False, Counter()
    launch, load = interpreter.GridExecutor.__call__, builder.create_masked_load

    def launched(kernel: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal waiting
        waiting = kwargs.get("PDL", False)
        waited.clear()
        launch(kernel, *args, **kwargs)
        programs = math.prod(builder.grid_dim) if waiting else 0
        assert len(waited) == programs and set(waited.values()) <= {1}, kernel.fn
        waiting = False

    def early() -> bool:
        return waiting and not waited[tuple(builder.grid_idx)]

    def loads(ptrs: Any, mask: Any, *args: Any) -> Any:
        if early():
            at = ptrs.data[mask.data.astype(bool)].astype(np.int64)[:, None]
            assert ((begins <= at) & (at < ends)).any(1).all(), "loads of the chain before the wait"
        return load(ptrs, mask, *args)

    def late(write: Any) -> Any:
        def written(*args: Any) -> Any:
            assert not early(), "writes before the wait"
            return write(*args)

        return written

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
    monkeypatch.setattr(builder, "create_masked_load", loads)
    for name in ("create_masked_store", "create_atomic_rmw", "create_atomic_cas"):
        monkeypatch.setattr(builder, name, late(getattr(builder, name)))
    monkeypatch.setattr(tl.extra.cuda, "gdc_launch_dependents", lambda: None)
    monkeypatch.setattr(tl.extra.cuda, "gdc_wait", lambda: waited.update([tuple(builder.grid_idx)]))
    yield


CHOICES = {
    "greedy": (SamplingParams(), END),
    "drawn": (
        SamplingParams(do_sample=True, top_k=5, repetition_penalty=1.1),
        ["norm_linear", "sample_scores", "sample_cut", "sample_draw", "sample_last", "advance"],
    ),
}


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("choice", CHOICES)
def test_captured_work_is_a_chain_of_dependent_launches(model, choice, monkeypatch) -> None:
    """One step and two are dependent, in the warm-up and later, and over several splits.

    The model's own operations, which run all other work, have no dependent launches.
    """
    check_chain(model, choice, monkeypatch)


SCALED = {
    "max_position_embeddings": 4,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 100.0},
}


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("model", [SCALED], indirect=True, ids=["dynamic"])
def test_a_step_that_makes_its_frequencies_is_a_chain_too(model, monkeypatch) -> None:
    """Frequencies are read after the wait, because PyTorch's operations make them in this step."""
    check_chain(model, "greedy", monkeypatch)


def check_chain(model: Any, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if model.device.type == "cuda" and not has_dependent_launch(model.device):
        pytest.skip("needs compute capability 9.0")
    monkeypatch.setattr(model.network, "ops", TritonOps(dependent=True))
    params, last = CHOICES[choice]
    kernels = START + CONV + ATTENTION + CONV + last
    tokens: dict[bool, list[list[int]]] = {False: [], True: []}
    for captured, found in tokens.items():
        cache = model.new_cache(2)
        cache.make_room({0: 300, 1: 300})
        torch.manual_seed(0)
        fill(cache, torch.Tensor.normal_)
        buffers = StepBuffers(
            model.network, cache, lambda graphs, body: SimpleNamespace(replay=body)
        )
        if not captured:
            buffers.graphs = None
        buffers.begin(cache, params)
        buffers.load_rows([9, 10], [1, 0], [0, 0], cache)
        for step, together in enumerate((2, 1, 1)):
            if step == 2:
                buffers.inputs.positions[0] = 280
                buffers.inputs.lengths[0] = 281
            with Launches() as launches:
                buffers.run_steps(model.network, cache, 2, choose=True, steps=together)
            scaled = model.network.rope_frequencies.kind != "default"
            names = [n for n in launches.names if "::" not in n or step and not scaled]
            assert names == kernels * together
            assert launches.dependent == (names if captured else [])
            found.append(buffers.inputs.tokens.tolist())
    assert tokens[True] == tokens[False]
