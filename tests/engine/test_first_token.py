"""Launches beside a prompt's own, from its admission to its first token, on the stand-in GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

import lfm2_fast
from lfm2_fast.cache.batch import together_on_device
from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.ops.sampling import SamplingParams
from tests.engine.stand_in_gpu import GPU, OnGpu, StandInGpu, storage

pytestmark = [
    pytest.mark.skipif(
        os.environ["TRITON_INTERPRET"] != "1", reason="there is a GPU, which needs no stand-in"
    ),
    pytest.mark.filterwarnings("ignore:overflow"),  # the interpreter's, where a draw is made
]
ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")


class Launches(TorchDispatchMode):
    """Names of all launches on the GPU, in order.

    What a prompt runs in the network is one entry, "prompt", and a replayed graph is "graph".
    """

    def __init__(self, gpu: StandInGpu) -> None:
        super().__init__()
        self.gpu, self.names = gpu, list[str]()
        self._patch, self._inside = pytest.MonkeyPatch(), False

    def __enter__(self) -> Launches:
        graph = torch.cuda.CUDAGraph
        self._note(interpreter.GridExecutor, "__call__", lambda kernel: kernel.fn.__name__)
        self._note(triton.JITFunction, "run", lambda kernel: kernel.fn.__name__)
        self._note(graph, "replay", lambda graph: "graph")
        self._note(Lfm2, "forward", lambda network: "prompt")
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()

    def _note(self, owner: Any, name: str, told: Callable[[Any], str]) -> None:
        run = getattr(owner, name)

        def noted(one: Any, *args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return run(one, *args, **kwargs)
            self.names.append(told(one))
            self._inside = True
            try:
                return run(one, *args, **kwargs)
            finally:
                self._inside = False

        self._patch.setattr(owner, name, noted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        ours = any(isinstance(each, OnGpu) for each in tree_leaves((args, kwargs, made)))
        if ours and not (self._inside or func.is_view or name in ALLOCATIONS):
            self.names.append(name)
        return made


@pytest.fixture(scope="module")
def folder(random_checkpoint: Callable[..., Path]) -> Path:
    layers = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return random_checkpoint(**layers, **heads)


@pytest.fixture(scope="module")
def gpu(folder: Path, quick_interpreter: None) -> Iterator[StandInGpu]:
    with StandInGpu() as device:
        yield device


@pytest.fixture(scope="module")
def model(folder: Path, gpu: StandInGpu) -> lfm2_fast.Lfm2ForCausalLM:
    return lfm2_fast.load(folder, dtype="float32")


MOST = 15
EVERYTHING = SamplingParams(True, 0.8, 40, 0.9, 0.01, 1.2)


def count(gpu: StandInGpu, run: Callable[[], Any]) -> tuple[int, int]:
    """Launches before the first forward pass of ``run``, and from there to the next one."""
    with Launches(gpu) as launches:
        run()
    print(launches.names)
    passes = [at for at, name in enumerate(launches.names) if name in ("prompt", "graph")]
    return passes[0], passes[1] - passes[0] - 1


# Alone a prompt is captured, together they are not.
@pytest.mark.parametrize(
    ("params", "prompts"), [(SamplingParams(), 1), (EVERYTHING, 1), (SamplingParams(), 2)]
)
def test_a_request_takes_few_launches_beside_its_prompt(model, gpu, params, prompts) -> None:
    engine = lfm2_fast.Engine(model, max_rows=2)

    def serve() -> None:
        for number in range(prompts):
            engine.add(lfm2_fast.Request(range(number, number + 9), params, max_tokens=2))
        while engine.busy:
            engine.step()

    for _ in range(2):
        serve()
    before, after = count(gpu, serve)
    assert 0 < before <= MOST and 0 < after <= MOST


def test_a_call_of_generate_takes_few_launches_beside_its_prompt(model, gpu) -> None:
    prompt = torch.arange(2, 11)[None]
    kept = {"max_new_tokens": 2, "eos_token_id": []}
    for _ in range(2):
        model.generate(prompt, **kept)
    before, after = count(gpu, lambda: model.generate(prompt, **kept))
    assert 0 < before <= MOST and 0 < after <= MOST


def test_tensors_that_move_together_keep_their_values(gpu) -> None:
    fields = [([1, -1, 2**62], torch.int64), ([True], torch.bool), ([], torch.int32)]
    fields += [([0.1, 2.5], torch.float64), ([7], torch.int32)]
    gpu.waits.clear()
    moved = together_on_device(GPU, *fields)
    assert not gpu.waits and len({storage(each.numbers) for each in moved}) == 1
    for each, (values, dtype) in zip(moved, fields, strict=True):
        assert each.dtype == dtype and each.is_cuda and not each.data_ptr() % 16
        assert each.tolist() == values
