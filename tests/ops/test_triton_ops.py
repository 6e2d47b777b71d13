"""Whole models on the Triton kernels against the same models in eager PyTorch."""

from __future__ import annotations

import copy
import gc
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

import lfm2_fast
from lfm2_fast.engine.model_runner import ModelRunner, run_batch
from lfm2_fast.kernels.gemv import MOST_TOKENS
from lfm2_fast.ops import reference, triton_ops
from lfm2_fast.ops.select import BackendError, Ops, choose
from lfm2_fast.weights.adapter_stack import AdapterStack
from lfm2_fast.weights.formats import DENSE, INT4, INT8, Projection
from tests.batches import logits_of


def layers(*kinds: str) -> dict[str, Any]:
    return {"num_hidden_layers": len(kinds), "layer_types": list(kinds)}


CONV, ATTENTION = "conv", "full_attention"
# In the interpreter each layer takes seconds: these are every neighbour that one may have.
ODD = {"conv_L_cache": 5, "conv_bias": True, "head_dim": 24, "num_key_value_heads": 3}
UNTIED = {"conv_L_cache": 2, "tie_word_embeddings": False}
CHANGED = {
    "odd": {**ODD, **layers(CONV, CONV, ATTENTION, CONV)},
    "attention_first": {**UNTIED, **layers(ATTENTION, ATTENTION, CONV)},
}
LONG = {"short_factor": [1.5] * 8, "long_factor": [2.0 + i for i in range(8)], "factor": 8.0}
CHANGED["long_rope"] = {
    **layers(CONV, ATTENTION),
    "max_position_embeddings": 16,
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONG},
}
FIVE_LAYERS = {
    "five": {},
    "odd_five": ODD,
    "attention_first_five": {**UNTIED, **layers(ATTENTION, CONV, ATTENTION, ATTENTION, CONV)},
}
TWO_LAYERS = layers(CONV, ATTENTION)
# What every kind of step asks of a model: tokens by slot. Prompts, then a second turn, a chunk, a
# decode step and a new prompt in one batch, then a decode step of all.
STEPS = [{2: 35, 0: 1, 3: 5}, {3: 4, 2: 1, 1: 9, 0: 1}, {1: 1, 0: 1, 3: 1, 2: 1}]


@pytest.fixture(scope="module", autouse=True)
def poisoned():
    """Outputs begin as NaN, so that an element which no kernel wrote shows."""
    # torch lists only once what ``with device`` changes: not what stands in here.
    _device_constructors()
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
        patch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
        yield


@pytest.fixture(scope="module")
def load(kernel_device):
    def load(
        folder: Path, backend: str, dtype: torch.dtype, **options: Any
    ) -> lfm2_fast.Lfm2ForCausalLM:
        options |= {"device": kernel_device, "dtype": dtype, "backend": backend}
        model = lfm2_fast.load(folder, **options)
        assert model.ops.name == backend
        return model

    return load


@pytest.mark.usefixtures("grid_order")
@pytest.mark.parametrize(
    "changed",
    [
        *(pytest.param(changed, id=name) for name, changed in CHANGED.items()),
        *(
            pytest.param(changed, id=name, marks=pytest.mark.nightly)
            for name, changed in FIVE_LAYERS.items()
        ),
    ],
)
def test_logits_equal_eager(random_checkpoint, load, kernel_dtype, within_budget, changed) -> None:
    folder = random_checkpoint(**changed)
    exact = logits_of(load(folder, "eager", torch.float64), STEPS)
    plain = logits_of(load(folder, "eager", kernel_dtype), STEPS)
    for ours, a, b in zip(
        logits_of(load(folder, "triton", kernel_dtype), STEPS), exact, plain, strict=True
    ):
        within_budget(ours, a, b)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_narrow_weights_equal_eager(
    random_checkpoint, load, within_budget, monkeypatch, quantization
) -> None:
    """The steps of few tokens multiply by the integers themselves."""
    # All rows are whole groups and begin at a word.
    folder = random_checkpoint(**TWO_LAYERS, intermediate_size=160)
    narrow = {"quantization": quantization}
    exact = logits_of(load(folder, "eager", torch.float64, **narrow), STEPS)
    plain = logits_of(load(folder, "eager", torch.float32, **narrow), STEPS)
    ours = load(folder, "triton", torch.float32, **narrow)
    for found, a, b in zip(logits_of(ours, STEPS), exact, plain, strict=True):
        within_budget(found, a, b)

    def refuse(*args: object) -> None:
        raise AssertionError("the reference's product ran")

    monkeypatch.setattr(reference, "linear_ref", refuse)
    cache = ours.new_cache(2)
    batch = cache.next_batch([1, 1], [1, 0], ours.device)
    run_batch(ours.network, torch.tensor([9, 12], device=ours.device), batch, cache)


@pytest.mark.parametrize("format", [DENSE, INT8, INT4], ids=lambda format: str(format.name))
@pytest.mark.parametrize("tokens", [3, MOST_TOKENS + 1])
def test_products_have_what_adapters_add(
    kernel_device, within_budget, same_bits, format, tokens
) -> None:
    """Few tokens and many, with each format; a bias alone has no rank.

    A whole matrix that no token may have is left out, and changes no other token's bits.
    """
    torch.manual_seed(0)
    linear = Projection(24, 32, bias=True, format=format)
    places = format.quantize(torch.randn(24, 32))
    for place, part in zip(linear.parts, places, strict=True):
        place.copy_(part)
    format.interleave(linear.parts)
    assert linear.bias is not None
    torch.nn.init.normal_(linear.bias)
    norm = torch.nn.RMSNorm(32, eps=1e-5)
    x, entries = torch.randn(tokens, 32), torch.arange(tokens) % 3
    for rank in (8, 0):
        stack = AdapterStack.empty(3, rank, (16, 8), 32, is_table=False, like=x)
        for part in (stack.down, stack.up, stack.gain, stack.shift):
            part[1:].normal_()
        linear.adapters = stack
        own = linear.replaced[1, 16] = Projection(8, 32, bias=True)
        with torch.no_grad():
            for part in own.parameters():
                part.normal_()
            plain = Ops().adapted(entries).norm_linear(x, norm, linear)
            wide = copy.deepcopy(linear).double()
            exact = Ops().adapted(entries).norm_linear(x.double(), norm.double(), wide)
            here = [each.to(kernel_device) for each in (x, entries)]
            norm = norm.float()
            ours = triton_ops.TritonOps().adapted(here[1])
            found = ours.norm_linear(here[0], norm.to(kernel_device), linear.to(kernel_device))
            without = triton_ops.TritonOps().adapted(here[1], frozenset())
            others = without.norm_linear(here[0], norm, linear)
        within_budget(found.cpu(), exact, plain)
        assert same_bits(others[here[1] != 1], found[here[1] != 1])
        assert not same_bits(others[here[1] == 1], found[here[1] == 1])


def test_whole_matrices_change_no_other_tokens_bits(kernel_device, kernel_dtype, same_bits) -> None:
    """Tokens with low-rank changes have the same bits in steps with a whole matrix and without."""
    torch.manual_seed(0)
    x, entries = torch.randn(6, 320).to(kernel_device, kernel_dtype), torch.arange(6) % 3
    norm = torch.nn.RMSNorm(320, eps=1e-5).to(x)
    linear, own = (Projection(rows, 320).to(x) for rows in (24, 8))
    stack = AdapterStack.empty(3, 8, (16, 8), 320, is_table=False, like=x)
    parts = norm.weight, linear.weight, own.weight, stack.down[1:], stack.up[1:]
    with torch.no_grad():
        for part in parts:
            part.normal_()
        linear.adapters, linear.replaced[1, 16] = stack, own
        ops = triton_ops.TritonOps()
        steps = [ops.adapted(entries.to(kernel_device), each) for each in (None, frozenset())]
        for call in (
            lambda ops: ops.norm_linear(x, norm, linear),
            lambda ops: ops.linear_add(x, linear, x[:, :24]),
        ):
            found, without = map(call, steps)
            assert same_bits(found[entries != 1], without[entries != 1])
            assert not same_bits(found[entries == 1], without[entries == 1])


def test_few_tokens_with_adapters_take_one_launch_more(kernel_device, monkeypatch) -> None:
    """The first product of the change; the second is in the kernel of the projection."""
    launched: list[str] = []
    # The fills are those that poison new tensors here.
    quiet = r"empty|view|slice|detach|unbind|\.fill_"

    class Noting(TorchDispatchMode):
        """Notes operations of PyTorch outside of launchers, but for those without work."""

        inside = False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if not self.inside and not re.search(quiet, str(func)):
                launched.append(str(func))
            return func(*args, **(kwargs or {}))

    mode = Noting()

    def note(name: str, launch: Callable[..., None]) -> Callable[..., None]:
        def noted(*args: Any, **kwargs: Any) -> None:
            launched.append(name.removesuffix("_triton"))
            mode.inside = True
            launch(*args, **kwargs)
            mode.inside = False

        return noted

    for name in [name for name in dir(triton_ops) if name.endswith("_triton")]:
        monkeypatch.setattr(triton_ops, name, note(name, getattr(triton_ops, name)))
    x, entries = torch.randn(3, 32, device=kernel_device), torch.arange(3, device=kernel_device)
    norm = torch.nn.RMSNorm(32, eps=1e-5).to(kernel_device)
    linear, gate_up = (Projection(rows, 32).to(kernel_device) for rows in (32, 80))
    for each, parts in ((linear, (32,)), (gate_up, (40, 40))):
        each.adapters = AdapterStack.empty(3, 8, parts, 32, is_table=False, like=x)
        for part in (each.weight, each.adapters.down, each.adapters.up):
            torch.nn.init.normal_(part)
    ops = triton_ops.TritonOps().adapted(entries)
    calls = {
        "low_rank_down norm_linear": lambda: ops.norm_linear(x, norm, linear),
        "low_rank_down linear_add": lambda: ops.linear_add(x, linear, x),
        "low_rank_down norm_swiglu": lambda: ops.norm_swiglu(x, norm, gate_up),
    }
    for expected, call in calls.items():
        launched.clear()
        with torch.no_grad(), mode:
            call()
        assert " ".join(launched) == expected


def test_the_triton_kernels_run(random_checkpoint, load, monkeypatch) -> None:
    """Only projections run in the reference."""
    model = load(random_checkpoint(**TWO_LAYERS), "triton", torch.float32)

    def refuse(*args: object) -> None:
        raise AssertionError("the reference ran")

    for name in dir(reference):
        if name.endswith("_ref") and name != "linear_ref":
            monkeypatch.setattr(reference, name, refuse)
    assert all(step.isfinite().all() for step in logits_of(model, STEPS))


def test_a_decode_step_attends_in_one_launch_per_layer(
    random_checkpoint, load, within_budget, monkeypatch
) -> None:
    """Over a context of more than one split, too; any other step in two."""
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}
    folder = random_checkpoint(**layers(ATTENTION, ATTENTION), **heads)
    ours = load(folder, "triton", torch.float32)
    exact, plain = load(folder, "eager", torch.float64), load(folder, "eager", torch.float32)
    launched: list[str] = []

    def note(name: str, launch: Callable[..., None]) -> Callable[..., None]:
        def noted(*args: Any, **kwargs: Any) -> None:
            launched.append(name)
            launch(*args, **kwargs)

        return noted

    for name in ("qk_norm_rope_triton", "flash_decode_triton", "flash_prefill_triton"):
        monkeypatch.setattr(triton_ops, name, note(name, getattr(triton_ops, name)))
    caches = [model.new_cache(2) for model in (ours, exact, plain)]
    decode, other = ["flash_decode_triton"], ["qk_norm_rope_triton", "flash_prefill_triton"]
    for step, expected in (({1: 140, 0: 3}, other), ({1: 1, 0: 1}, decode), ({0: 2, 1: 1}, other)):
        tokens = torch.arange(10, 10 + sum(step.values()), device=ours.device)
        found = []
        launched.clear()
        for model, cache in zip((ours, exact, plain), caches, strict=True):
            batch = cache.next_batch(list(step.values()), list(step), model.device)
            found.append(run_batch(model.network, tokens, batch, cache))
        within_budget(*found)
        assert launched == expected * 2


def test_caches_have_counters_of_their_own(random_checkpoint, load) -> None:
    """Two may be stepped at once; what a cache counted with goes where it goes."""
    model = load(random_checkpoint(**TWO_LAYERS), "triton", torch.float32)
    caches = [model.new_cache(2) for _ in range(2)]
    for cache in caches:
        run_batch(
            model.network,
            torch.tensor([9], device=model.device),
            cache.next_batch([1], [0], model.device),
            cache,
        )
    assert len(model.ops._arrivals) == 2
    del caches, cache
    gc.collect()
    assert len(model.ops._arrivals) == 0


@pytest.mark.parametrize(
    ("read", "written"), [(9, 4), pytest.param(40, 24, marks=pytest.mark.nightly)]
)
def test_the_same_greedy_tokens_as_eager(tiny, load, read: int, written: int) -> None:
    """Weights are trained, so a token depends on the text before it."""
    from transformers import AutoTokenizer

    text = (tiny / "heldout.txt").read_text(encoding="utf-8")
    prompt = AutoTokenizer.from_pretrained(tiny)(text, return_tensors="pt").input_ids[:, :read]
    expected, ours = (
        load(tiny, backend, torch.float32).generate(prompt, max_new_tokens=written, do_sample=False)
        for backend in ("eager", "triton")
    )
    assert ours.tolist() == expected.tolist()


def test_rows_are_picked_before_the_last_addition(random_checkpoint, load) -> None:
    model = load(random_checkpoint(**TWO_LAYERS), "triton", torch.float32)
    tokens = torch.arange(10, 29, device=model.device)
    caches = [model.new_cache(1) for _ in range(2)]
    batches = [cache.next_batch([19], [0], model.device) for cache in caches]
    whole = run_batch(model.network, tokens, batches[0], caches[0])
    last = run_batch(model.network, tokens, batches[1], caches[1], batches[1].last_rows)
    torch.testing.assert_close(last, whole[-1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [5, MOST_TOKENS + 1])
def test_every_reader_of_a_pending_addition_makes_it(tokens, kernel_device) -> None:
    """The reader may be a few rows of many tokens."""
    torch.manual_seed(0)
    x, y = torch.randn(2, tokens, 96, device=kernel_device)
    with torch.device(kernel_device), torch.no_grad():
        linear, norm = Projection(96, 96), torch.nn.RMSNorm(96, eps=1e-5)
        linear.weight.normal_(std=0.1)
        eager, ours = Ops(), choose("triton", kernel_device, x.dtype)
        for steps in (1, 2):
            streams = [x, x]
            for _ in range(steps):
                streams = [
                    ops.linear_add(y, linear, stream)
                    for ops, stream in zip((eager, ours), streams, strict=True)
                ]
            expected = eager.norm_linear(streams[0], norm, linear)
            few = torch.tensor([3, 0], device=kernel_device)
            picked = ours.norm_linear(streams[1][few], norm, linear)
            torch.testing.assert_close(picked, expected[few])
            # The second reading finds the sum that the first has made.
            for _ in range(2):
                torch.testing.assert_close(ours.norm_linear(streams[1], norm, linear), expected)


def test_empty_rows(random_checkpoint, load) -> None:
    model = load(random_checkpoint(**TWO_LAYERS), "triton", torch.float32)
    tokens = torch.full((2, 3), 9, device=model.device)
    assert model(tokens[:0]).logits.shape == (0, 3, 307)
    answer = model(tokens, attention_mask=torch.tensor([[0, 0, 0], [1, 1, 1]]))
    torch.testing.assert_close(answer.logits[1:], model(tokens[1:]).logits)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('os.environ["TRITON_INTERPRET"] = "0"', "TRITON_INTERPRET=1"),
        ('sys.modules["triton"] = None', "pip install triton"),
    ],
)
def test_a_request_that_cannot_be_met_says_what_to_do(setting: str, message: str) -> None:
    """With "auto" another backend runs, without an error."""
    code = f"""
import os, sys
{setting}
import torch
from lfm2_fast.ops.select import choose
cpu = torch.device("cpu")
assert choose("auto", cpu, torch.float32).name in ("eager", "native")
choose("triton", cpu, torch.float32)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    error = done.stderr.splitlines()[-1]
    assert (
        error.startswith("lfm2_fast.ops.select.BackendError: backend='triton'") and message in error
    )


def test_auto_takes_the_kernels_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose("auto", torch.device("cuda"), torch.bfloat16).name == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert choose("auto", torch.device("cuda"), torch.bfloat16).name == "eager"
    with pytest.raises(BackendError, match=r"compute capability 8\.0"):
        choose("triton", torch.device("cuda"), torch.bfloat16)
    with pytest.raises(BackendError, match="eager"):
        choose("triton", torch.device("mps"), torch.bfloat16)
    with pytest.raises(BackendError, match="'eager', 'triton'"):
        choose("cublas", torch.device("cpu"), torch.bfloat16)


def test_captured_work_is_launched_early_if_the_device_can(monkeypatch) -> None:
    """Captured work has its own operations, which share the counters. Other threads are not
    affected.
    """
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for capability, early in (((8, 9), False), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, has=capability: has)
        ops = choose("triton", torch.device("cuda"), torch.bfloat16)
        assert isinstance(ops, triton_ops.TritonOps) and not ops.pdl
        assert ops.for_capture.pdl == early and (ops.for_capture is ops) == (not early)
        assert (
            ops.for_capture is ops.for_capture.for_capture
            and ops.for_capture._arrivals is ops._arrivals
        )
    assert Ops().for_capture.name == "eager"


@pytest.mark.usefixtures("graphs")
def test_steps_read_only_tensors_on_the_device(random_checkpoint, load) -> None:
    """Captured by a stand-in and done again, rows end at different times and write the same.

    The host's numbers of a step mean nothing then, so a body that went by them would be wrong.
    """
    prompts, folder = (
        [[1, 40, 41, 42], [1, 50], [1, 60, 61, 62, 63]],
        random_checkpoint(**TWO_LAYERS),
    )
    ours, eager = (load(folder, backend, torch.float32) for backend in ("triton", "eager"))
    kwargs = {"do_sample": True, "seed": 1, "top_k": 0, "min_p": 0.1, "repetition_penalty": 1.1}
    kwargs["max_new_tokens"] = 5
    written = eager.generate(prompts, eos_token_id=None, **kwargs)[:, 5:]
    kwargs["eos_token_id"] = [int(written[0, 1]), int(written[1, 2])]
    assert torch.equal(ours.generate(prompts, **kwargs), eager.generate(prompts, **kwargs))


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("length", [9, 40])
def test_a_captured_prompt_is_padded_and_right(
    random_checkpoint, load, within_budget, length: int
) -> None:
    """Over a prefix too, and as it is, captured and replayed; results of padding are not used."""
    folder = random_checkpoint(**TWO_LAYERS)
    found = []
    for backend, dtype in (
        ("triton", torch.float32),
        ("eager", torch.float64),
        ("eager", torch.float32),
    ):
        model = load(folder, backend, dtype)
        cache = model.new_cache(2)
        decoder, logits = ModelRunner(model.network, cache), []
        for start in (2, 3, 5):
            tokens = [start + i % 97 for i in range(length)]
            logits.append(decoder.prefill([tokens], [1]))
            logits.append(decoder.step([7], [1]))
        found.append(torch.cat(logits))
    within_budget(*found)
