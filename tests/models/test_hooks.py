"""PyTorch's hooks on the network's modules: those on layers are followed, others are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

import lfm2_fast
from lfm2_fast import HookError
from lfm2_fast.engine.model_runner import ModelRunner
from lfm2_fast.ops.select import why_not
from lfm2_fast.weights.formats import Projection

IDS = torch.tensor([[1, 1639, 1084, 273, 573, 638, 27]])
LONG = torch.arange(2, 60)[None]  # more tokens than the bodies take in one fused launch


@pytest.fixture(scope="module", params=["eager", "native"])
def model(request: pytest.FixtureRequest, tiny) -> lfm2_fast.Lfm2ForCausalLM:
    if lacking := why_not(request.param, torch.device("cpu"), torch.float32):
        pytest.skip(lacking)
    return lfm2_fast.load(tiny, device="cpu", dtype="float32", backend=request.param)


def noop(*_: Any) -> None:
    return None


def own_forward(module: nn.Module) -> Any:
    module.forward = noop

    class Handle:
        def remove(self) -> None:
            del module.forward

    return Handle()


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "forward hook": lambda module: module.register_forward_hook(noop),
    "forward pre-hook": lambda module: module.register_forward_pre_hook(noop),
    "backward hook": lambda module: module.register_full_backward_hook(noop),
    "backward pre-hook": lambda module: module.register_full_backward_pre_hook(noop),
    "own forward": own_forward,
}
HOLDERS = [
    "",
    "embed_tokens",
    "layers",
    "layers.0.operator_norm",
    "layers.0.conv",
    "layers.0.conv.conv",
    "layers.2.feed_forward",
    "layers.2.self_attn.q_layernorm",
    "layers.2.self_attn.out_proj",
    "embedding_norm",
    "lm_head",
]


@pytest.mark.parametrize("path", HOLDERS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_hooks_that_would_never_run_are_refused_by_name(model, path: str, way) -> None:
    cache = model.new_cache(1)
    handle = way(model.network.get_submodule(path))
    try:
        for call in (model, model.generate, lambda _: ModelRunner(model.network, cache)):
            with pytest.raises(HookError, match=rf"^{path or 'the network'} has a "):
                call(IDS)
    finally:
        handle.remove()
    model(IDS)


@pytest.mark.parametrize("way", ["backward hook", "backward pre-hook"])
def test_no_layer_runs_backward(model, way: str) -> None:
    handle = WAYS[way](model.network.layers[1])
    try:
        with pytest.raises(HookError, match=r"^layers\.1 has a backward hook"):
            model.generate(IDS)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "register",
    [
        torch_module.register_module_forward_hook,
        torch_module.register_module_forward_pre_hook,
        torch_module.register_module_full_backward_hook,
        torch_module.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_for_all_modules_are_refused_by_name(model, register) -> None:
    handle = register(noop)
    try:
        for call in (model.forward, model.generate):
            with pytest.raises(HookError, match=register.__name__):
                call(IDS)
    finally:
        handle.remove()
    model(IDS)


@pytest.mark.parametrize("path", ["layers.0.operator_norm", "layers.1.feed_forward", "lm_head"])
def test_a_module_in_a_holders_place_is_refused_by_name(model, path: str) -> None:
    parent, _, name = path.rpartition(".")
    parent = model.network.get_submodule(parent)
    before = getattr(parent, name)
    setattr(parent, name, nn.Identity())
    try:
        for call in (model, model.generate):
            with pytest.raises(HookError, match=rf"^{path} is a caller's Identity"):
                call(IDS)
    finally:
        setattr(parent, name, before)
    model(IDS)


def test_a_hook_may_call_a_module_that_the_caller_added(model) -> None:
    """A module that a caller adds to a layer is the caller's, with its hooks and parts."""
    layer, seen = model.network.layers[3], []
    layer.probe = nn.Sequential(nn.Linear(192, 2))
    layer.probe[0].register_forward_hook(lambda mod, args, out: seen.append(out.shape))

    def probe(mod: nn.Module, args: Any, out: torch.Tensor) -> None:
        mod.probe(out)

    handle = layer.register_forward_hook(probe)
    try:
        model(IDS)
        assert seen == [(7, 2)]
    finally:
        handle.remove()
        del layer.probe


def test_every_kind_of_module_is_refused(random_checkpoint) -> None:
    """No type of module is left out, a conv layer's nor an attention layer's."""
    model = lfm2_fast.load(random_checkpoint(), device="cpu", dtype="float32")
    for path, module in model.network.named_modules():
        handle = module.register_forward_hook(noop)
        try:
            if module in list(model.network.layers):
                model.network.check_hooks()
                continue
            with pytest.raises(HookError, match=f"^{path or 'the network'} has a forward hook"):
                model.network.check_hooks()
        finally:
            handle.remove()
    model.network.check_hooks()


@pytest.mark.parametrize("ids", [IDS, LONG], ids=["few tokens", "many tokens"])
def test_layers_give_their_hooks_the_stream(model, ids: torch.Tensor) -> None:
    """Hooks see the tensors of output_hidden_states, with nothing pending."""
    states = model(ids, output_hidden_states=True).hidden_states
    layers, seen, handles = model.network.layers, [], []
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(lambda _, args: seen.append(args)))
        handles.append(layer.register_forward_hook(lambda _, args, out: seen.append((out,))))
    try:
        model(ids)
    finally:
        for handle in handles:
            handle.remove()
    assert all(len(each) == 1 and type(each[0]) is torch.Tensor for each in seen)
    for i in range(len(layers)):
        torch.testing.assert_close(seen[2 * i][0][None], states[i], rtol=1e-5, atol=1e-5)
    for i in range(len(layers) - 1):
        assert seen[2 * i + 1][0] is seen[2 * i + 2][0]


@pytest.mark.parametrize(
    ("gives", "error", "match"),
    [
        (lambda out: (out,), TypeError, "gave tuple; it must give a tensor of shape \\(7, 192\\)"),
        (lambda out: out[:-1], ValueError, "gave shape \\(6, 192\\) .*must give .* \\(7, 192\\)"),
        (lambda out: out.double(), ValueError, "gave .*float64.*must give .*float32"),
        (lambda out: out[None], ValueError, "gave shape \\(1, 7, 192\\)"),
    ],
)
def test_wrong_results_of_a_layer_are_refused(model, gives, error, match: str) -> None:
    layer = model.network.layers[2]
    for handle in (
        layer.register_forward_hook(lambda mod, args, out: gives(out)),
        layer.register_forward_pre_hook(lambda mod, args: (gives(args[0]),)),
    ):
        try:
            with pytest.raises(error, match=match):
                model(IDS)
        finally:
            handle.remove()


def test_a_strided_replacement_is_taken(model) -> None:
    layer = model.network.layers[2]
    expected = model(IDS).logits
    handles = (
        layer.register_forward_hook(lambda mod, args, out: out.T.contiguous().T),
        layer.register_forward_pre_hook(lambda mod, args: (args[0].T.contiguous().T,)),
    )
    try:
        assert torch.equal(model(IDS).logits, expected)
    finally:
        for handle in handles:
            handle.remove()


class Scaled(nn.Module):
    """A caller's module around a layer, as people steer a model."""

    def __init__(self, layer: nn.Module, factor: float) -> None:
        super().__init__()
        self.layer, self.factor, self.calls = layer, factor, 0
        self.norm = nn.Identity()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        return self.norm(self.layer(x, *args, **kwargs)) * self.factor


@pytest.mark.parametrize("ids", [IDS, LONG], ids=["few tokens", "many tokens"])
def test_a_callers_module_stands_in_for_a_layer(model, ids: torch.Tensor) -> None:
    layers, ask = model.network.layers, {"max_new_tokens": 8, "eos_token_id": []}
    layer = layers[3]
    handle = layer.register_forward_hook(lambda mod, args, out: out * 1.5)
    expected, logits = model.generate(ids, **ask), model(ids).logits
    handle.remove()
    layers[3] = wrapper = Scaled(layer, 1.5)
    try:
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(model.generate(ids, **ask), expected) and wrapper.calls == 9
        wrapper.norm.register_forward_hook(noop)
        model(ids)
        handle = layer.feed_forward.register_forward_hook(noop)
        with pytest.raises(HookError, match=r"^layers\.3\.layer\.feed_forward has a forward hook"):
            model(ids)
        handle.remove()
    finally:
        layers[3] = layer
    assert not torch.equal(model(ids).logits, logits)


def test_projections_that_callers_call_have_hooks(model) -> None:
    """Outside of the model a module is PyTorch's, with all of its ways."""
    seen: list[Any] = []
    projection = Projection(3, 4)
    projection.register_forward_hook(lambda *_: seen.append(1))
    projection(torch.zeros(2, 4))
    assert seen == [1]
