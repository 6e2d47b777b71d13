"""How many kernels a decode step launches, counted where they are launched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import lfm2_fast
from lfm2_fast.batch import Batch
from lfm2_fast.kernels.gemv import MOST_TOKENS

# The angles of rotary embedding, and the embedding's rows.
START = ["rope", "aten::index_select"]
CONV = ["norm_conv", "linear_add", "norm_swiglu", "linear_add"]
ATTENTION = ["norm_linear", "flash_decode", "linear_add", "norm_swiglu", "linear_add"]
END = ["head_argmax", "last_argmax"]
ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")


class Launches(TorchDispatchMode):
    """Notes every Triton kernel and every PyTorch operation that is not a view or an allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
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
def model(random_checkpoint, kernel_device):
    folder = random_checkpoint(layer_types=["conv", "full_attention", "conv"], num_hidden_layers=3)
    return lfm2_fast.load(folder, device=kernel_device, backend="triton")


@pytest.fixture
def step(model, monkeypatch):
    """Runs one token in each of so many slots, twice; gives the second's launches and answer."""

    def step(rows: int, greedy: bool) -> tuple[list[str], torch.Tensor]:
        words, norm_linear = model.ops, model.ops.norm_linear

        def best(x: Any, norm: Any, linear: Any) -> torch.Tensor:
            if linear is not model.lm_head:
                return norm_linear(x, norm, linear)
            monkeypatch.undo()
            return words.head_argmax(x, norm, linear)

        cache = model.new_cache(rows)
        for last in (False, True):
            batch = Batch.prepare([1] * rows, range(rows), cache, model.device)
            tokens = torch.arange(9, 9 + rows, device=model.device)
            if last and greedy:
                monkeypatch.setattr(words, "norm_linear", best)
            with Launches() as launches:
                answer = model.run(tokens, batch, cache)
        return launches.names, answer

    return step


@pytest.mark.parametrize("rows", [1, MOST_TOKENS])
def test_a_decode_step(rows, step) -> None:
    """4 launches a conv layer, 5 an attention layer, at most 3 at the end, and the start."""
    greedy, tokens = step(rows, greedy=True)
    assert greedy == START + CONV + ATTENTION + CONV + END
    assert len(CONV) <= 4 and len(ATTENTION) <= 5 and len(END) <= 3
    names, logits = step(rows, greedy=False)
    assert names == [*greedy[: -len(END)], "norm_linear"]
    assert tokens.tolist() == logits.argmax(-1).tolist()


def test_more_rows_than_few(step) -> None:
    """The library multiplies again, and the best token is the same one's."""
    names, tokens = step(MOST_TOKENS + 1, greedy=True)
    assert "norm_linear" not in names and names.count("aten::mm") == 3 * 4 + 1
    assert tokens.tolist() == step(MOST_TOKENS + 1, greedy=False)[1].argmax(-1).tolist()
