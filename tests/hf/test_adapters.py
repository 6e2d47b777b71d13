"""Adapters beside a model's weights: PEFT's logits on every backend, and several in one step."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lfm2_fast
from bench.cpu.adapters import write_adapter
from lfm2_fast.engine.draft_length import StepCosts
from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.request import Request
from lfm2_fast.ops.base import Ops
from lfm2_fast.ops.native_library import why_not
from tests.adapters import ALL, IDS, make_adapter

TABLES = ["embed_tokens", "lm_head"]
WHOLE = [*TABLES, "v_proj", "in_proj", "w2", "w3"]
BIASED = {"conv_bias": True}
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all": (BIASED, {"target_modules": [*ALL, *TABLES], "rank_pattern": {"w1": 9}}),
    "DoRA": (BIASED, {"target_modules": [*ALL, *TABLES], "use_dora": True}),
    "biases": (BIASED, {"lora_bias": True, "target_modules": r".*(proj|w\d)"}),
    "whole embedding": ({}, {"target_modules": ["w1"], "modules_to_save": ["embed_tokens"]}),
    "whole head": ({}, {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]}),
    "whole": (
        BIASED,
        {"target_modules": ["q_proj", "w1"], "use_dora": True, "modules_to_save": WHOLE},
    ),
}
BACKENDS = ["eager", "native"]


@pytest.mark.parametrize("name", OPTIONS)
def test_beside_the_weights_as_peft_runs_it(
    name: str, random_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A prompt in one pass, and token by token, in eager and native."""
    changed, options = OPTIONS[name]
    base = random_checkpoint(**changed)
    made = make_adapter(base, tmp_path, **options)
    for backend in BACKENDS:
        if backend == "native" and why_not(torch.device("cpu")):
            continue
        model = lfm2_fast.load(base, device="cpu", dtype="float32", backend=backend)
        before = model(IDS).logits
        model.load_adapter(tmp_path)
        made.check(model(IDS).logits)
        made.check(model(IDS.repeat(1, 4)).logits[:, : IDS.shape[1]])
        cache, steps = model.new_cache(1), []
        for token in IDS[0]:
            steps.append(model(token.view(1, 1), past_key_values=cache).logits)
        made.check(torch.cat(steps, 1))
        model.set_adapter(None)
        assert torch.equal(model(IDS).logits, before)


def run(model: Any, requests: list[Request], **options: Any) -> list[list[int]]:
    """Return the new tokens of each request, all run together."""
    engine = Engine(model, **options)
    places = {engine.add(request): place for place, request in enumerate(requests)}
    written: list[list[int]] = [[] for _ in requests]
    while engine.busy:
        for event in engine.step():
            assert event.error is None
            if event.token is not None:
                written[places[event.id]].append(event.token)
    return written


@pytest.fixture(scope="module")
def several(random_checkpoint: Callable[..., Path], tmp_path_factory: Any) -> dict[str, Any]:
    """A base, and adapters of different targets and ranks; "c" has whole matrices."""
    base = random_checkpoint()
    a, b, c = (tmp_path_factory.mktemp(name) for name in "abc")
    make_adapter(base, a, target_modules=[*ALL, "lm_head"], r=3)
    make_adapter(base, b, seed=1, target_modules=["in_proj", "w2", "embed_tokens"], r=12)
    make_adapter(base, c, seed=2, target_modules=["q_proj"], modules_to_save=WHOLE)
    return {"base": base, "a": a, "b": b, "c": c}


def beside(several: dict[str, Any], backend: str, names: str) -> Any:
    """Return a model with these adapters beside it. Skips if the backend is not here."""
    if backend == "native" and why_not(torch.device("cpu")):
        pytest.skip("the extension is not built")
    model = lfm2_fast.load(several["base"], device="cpu", dtype="float32", backend=backend)
    for name in names:
        model.load_adapter(several[name], name)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_several_adapters_in_one_step(backend: str, several: dict[str, Any]) -> None:
    """Each request gets the tokens that it gets alone, and pages are shared within an adapter."""
    model = beside(several, backend, "")
    prompt = IDS[0].tolist() * 7
    names = ["a", "b", None, "c", "a"]
    count = 6
    plain = Request(prompt, max_tokens=count)
    alone = {None: run(model, [plain])[0]}
    for name in "abc":
        merged = lfm2_fast.load(
            several["base"], device="cpu", dtype="float32", adapter=several[name]
        )
        alone[name] = run(merged, [plain])[0]
        model.load_adapter(several[name], name)
    model.set_adapter(None)
    assert len({tuple(tokens) for tokens in alone.values()}) == 4, "the adapters change nothing"
    requests = [Request(prompt, max_tokens=count, adapter=name) for name in names]
    assert run(model, requests, chunk=32) == [alone[name] for name in names]
    # One after another on one cache: what one adapter left is no other's.
    engine = Engine(model, max_rows=1)
    cached = []
    for request in (*requests, plain):
        engine.add(request)
        events = []
        while engine.busy:
            events += engine.step()
        assert [event.token for event in events] == alone[request.adapter]
        cached.append(events[0].cached_tokens)
    assert [tokens > 0 for tokens in cached] == [False, False, False, False, True, True]
    model.set_adapter("b")
    assert run(model, [plain])[0] == alone["b"]
    assert (
        model.generate(torch.tensor([prompt]), max_new_tokens=count)[0, -count:].tolist()
        == (alone["b"])
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_matrices_are_multiplied_for_their_adapter_alone(
    backend: str, several: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of others leave them out, recorded ones too; these rows keep their bits in company."""
    model = beside(several, backend, "ac")
    model.set_adapter(None)
    multiplied: list[int] = []
    product = Ops._unadapted_product

    def counted(ops: Ops, x: torch.Tensor, own: Any) -> torch.Tensor:
        multiplied.append(len(x))
        return product(ops, x, own)

    monkeypatch.setattr(Ops, "_unadapted_product", counted)
    prompt = IDS[0].tolist()
    first, plain, whole = (Request(prompt, max_tokens=8, adapter=name) for name in ("a", None, "c"))
    assert len(run(model, [first, plain])) == 2 and not multiplied
    engine, written = Engine(model), {}
    ids = [engine.add(first), engine.add(plain)]
    for step in range(20):
        assert step > 4 or not multiplied
        if step == 4:
            ids.append(engine.add(whole))
        for event in engine.step():
            written.setdefault(event.id, []).append(event.token)
    assert multiplied
    assert [written[each] for each in ids] == run(model, [first, plain, whole])
    multiplied.clear()
    model.set_adapter("c")
    model(IDS)
    assert multiplied
    entries = [model.network.adapters.find(name).entry for name in "ac"]
    for tokens in (5, 40):
        x, block = torch.randn(tokens, 96), model.network.layers[0]
        own = torch.tensor([*entries, 0] * tokens)[:tokens]
        made = [
            model.ops.adapted(own, known).norm_linear(x, block.operator_norm, block.conv.in_proj)
            for known in (None, frozenset({entries[1]}), frozenset())
        ]
        others = own != entries[1]
        assert all(torch.equal(each[others], made[0][others]) for each in made)
        assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_drafts_beside_adapters(
    backend: str, several: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of several adapters write the same with drafts, the active one changed meanwhile."""
    model = beside(several, backend, "acb")
    prompt = IDS[0].tolist() * 3
    requests = [Request(prompt, max_tokens=12, adapter=name) for name in ("a", "c", None, "b")]
    alone = [run(model, [request])[0] for request in requests]
    monkeypatch.setattr(StepCosts, "of", lambda self, tokens: 1.0)
    monkeypatch.setattr(StepCosts, "knows", lambda *_: True)
    engine, written = Engine(model, prompt_lookup=4), {}
    ids = [engine.add(request) for request in requests]
    while engine.busy:
        for event in engine.step():
            written.setdefault(event.id, []).append(event.token)
        # The request that names none began with the active one, which was "b".
        model.set_adapter(None)
    assert [written[each] for each in ids] == alone
    assert engine.statistics.drafted > 0


def test_weights_are_not_saved_without_the_active_adapter(
    several: dict[str, Any], tmp_path: Path
) -> None:
    model = lfm2_fast.load(several["base"], device="cpu")
    model.load_adapter(several["a"], "a")
    with pytest.raises(ValueError, match=r"active adapter 'a'.*set_adapter\(None\)"):
        model.save_pretrained(tmp_path)
    model.set_adapter(None)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_memory_is_freed_with_the_last_adapter(several: dict[str, Any]) -> None:
    """Room that was reserved stays. What runs with an adapter that was unloaded keeps it."""
    model = lfm2_fast.load(several["base"], device="cpu", dtype="float32")
    adapters = model.network.adapters

    def held() -> int:
        stacks = [each.adapters for each in adapters.projections.values()]
        return sum(stack.nbytes for stack in stacks if stack is not None)

    def replaced() -> int:
        own = [list(each.replaced.values()) for each in adapters.projections.values()]
        return sum(each.weight.nbytes for each in chain(*own))

    model.load_adapter(several["a"], "a")
    logits, loaded = model(IDS).logits, held()
    model.load_adapter(several["c"], "c")
    running = adapters.find("a"), adapters.find("c")
    model.unload_adapter("a")
    model.unload_adapter("c")
    assert held() == loaded and replaced() > model.network.embed_tokens.weight.nbytes
    version = adapters.version
    del running
    model.load_adapter(several["a"], "a")
    # Captured steps point at the matrices that are gone.
    assert replaced() == 0 and adapters.version > version
    model.unload_adapter("a")
    for name in "bc":
        model.load_adapter(several[name], name)
        model.unload_adapter(name)
        assert held() == replaced() == 0
    model.load_adapter(several["a"], "a")
    assert torch.equal(model(IDS).logits, logits)
    adapters.reserve(2, 3)
    model.unload_adapter("a")
    assert held() == loaded


@pytest.mark.slow
@pytest.mark.interpreter
def test_triton_gives_what_eager_gives(tmp_path: Path, quick_interpreter: None) -> None:
    """A prompt, a step and a text, on a model of two layers."""
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2}
    layers = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    config = lfm2_fast.Lfm2Config(
        vocab_size=67, num_key_value_heads=1, block_auto_adjust_ff_dim=False, **sizes, **layers
    )
    torch.manual_seed(0)
    made = lfm2_fast.Lfm2ForCausalLM(config)
    made.save_pretrained(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", made.network.config, 4, 0, std=0.3)
    ids, found = torch.tensor([[1, 4, 5]]), []
    for backend in ("eager", "triton"):
        model = lfm2_fast.load(tmp_path / "base", device="cpu", dtype="float32", backend=backend)
        plain = model(ids).logits
        model.load_adapter(adapter)
        cache = model.new_cache(1)
        logits = [model(each, past_key_values=cache).logits for each in (ids, ids[:, :1])]
        assert (logits[0] - plain).abs().max() > 0.1
        text = model.generate(ids, max_new_tokens=3, do_sample=False)
        found.append((torch.cat(logits, 1), text))
    (eager, text), (triton, again) = found
    assert (triton - eager).abs().max() <= 2e-5 * eager.abs().max() and torch.equal(text, again)


def test_adapters_come_and_go_while_requests_run(several: dict[str, Any]) -> None:
    """A running request keeps its adapter, and captured steps see those that came later."""
    model = lfm2_fast.load(several["base"], device="cpu", dtype="float32")
    model.load_adapter(several["a"], "a")
    model.load_adapter(several["b"], "b")
    model.set_adapter(None)
    first, second = (Request(IDS[0].tolist(), max_tokens=12, adapter=name) for name in "ab")
    alone = run(model, [first])[0], run(model, [second])[0]
    engine, written = Engine(model), {}
    ids = [engine.add(first)]
    for step in range(40):
        if step == 4:
            model.unload_adapter("a")
            version = model.network.adapters.version
            model.load_adapter(several["b"], "again")
            assert model.network.adapters.version == version, "captured steps were thrown away"
            model.set_adapter(None)
            ids.append(engine.add(Request(first.prompt, max_tokens=12, adapter="again")))
        for event in engine.step():
            written.setdefault(event.id, []).append(event.token)
    assert (written[ids[0]], written[ids[1]]) == alone
    with pytest.raises(ValueError, match="'a' is not loaded.*'b', 'again'"):
        engine.add(first)
    with pytest.raises(ValueError, match="'again' is loaded already"):
        model.load_adapter(several["a"], "again")
    # Its entry is free once the row that held it is gone.
    del engine
    entries = {model.network.adapters.find(name).entry for name in model.adapters()}
    model.load_adapter(several["a"], "a")
    assert model.network.adapters.find("a").entry not in entries
    assert model.network.adapters.version == version and model.active_adapter == "a"
    assert run(model, [Request(first.prompt, max_tokens=12)])[0] == alone[0]
    # Its iterators cannot be copied from Python 3.14 on.
    assert b"itertools" not in pickle.dumps(model.network.adapters)
    copied = copy.deepcopy(model)
    copied.set_adapter("b")
    assert copied(IDS).logits.sub(model(IDS).logits).abs().max() > 0.01
    assert torch.equal(copied.double()(IDS).logits.argmax(-1), copied(IDS).logits.argmax(-1))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_beside_quantized_weights(
    quantization: str, several: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    """Nearer to the exact logits than the merge that is quantized, or as near."""
    made = make_adapter(tiny, tmp_path, target_modules=[*ALL, *TABLES])
    options = {"device": "cpu", "dtype": "float32", "quantization": quantization}
    merged = lfm2_fast.load(tiny, adapter=tmp_path, **options)
    beside = lfm2_fast.load(tiny, **options)
    before = (beside(IDS).logits - made.exact).norm()
    beside.load_adapter(tmp_path)
    error, other = ((each(IDS).logits - made.exact).norm() for each in (beside, merged))
    assert error < 1.5 * other and error < 0.5 * before


def test_whole_matrices_beside_quantized_weights(tiny: Path, tmp_path: Path) -> None:
    """PEFT gives the same on a base of the quantized numbers; a mixed batch equals each row."""
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "quantization": "int8"}
    model = lfm2_fast.load(tiny, backend="eager", **options)
    dense = lfm2_fast.load(tiny, device="cpu", dtype="float32")
    for name, projection in dense.network.adapters.projections.items():
        projection.weight.data = model.network.adapters.projections[name].dequantized(torch.float32)
    dense.network.tie_weights()
    dense.save_pretrained(tmp_path / "base")
    whole = make_adapter(
        tmp_path / "base", tmp_path / "whole", target_modules=["q_proj"], modules_to_save=WHOLE
    )
    make_adapter(tmp_path / "base", tmp_path / "plain", seed=1)
    model.load_adapter(whole.folder)
    whole.check(model(IDS).logits)
    native = None if why_not(torch.device("cpu")) else lfm2_fast.load(tiny, **options)
    for each in (model, native):
        if each is None:
            continue
        for name in ("whole", "plain"):
            each.load_adapter(tmp_path / name, name)
        each.set_adapter(None)
        prompt, names = IDS[0].tolist(), ("whole", None, "plain", "whole")
        requests = [Request(prompt, max_tokens=6, adapter=name) for name in names]
        assert run(each, requests) == [run(each, [request])[0] for request in requests]


def test_memory_of_an_unloaded_adapter_is_freed_when_its_requests_end(
    several: dict[str, Any],
) -> None:
    """Without another call: stacks and whole matrices, and the recorded steps that hold them."""
    model = lfm2_fast.load(several["base"], device="cpu", dtype="float32")
    adapters = model.network.adapters
    held = [*adapters.projections.values()]
    for name in "ac":
        model.load_adapter(several[name], name)
    model.set_adapter(None)
    engine = Engine(model)
    for name in "ac":
        engine.add(Request(IDS[0].tolist(), max_tokens=4, adapter=name))
        engine.step()
        model.unload_adapter(name)
    matrices = [weakref.ref(own.weight) for each in held for own in each.replaced.values()]
    assert matrices and any(each.adapters for each in held)
    while engine.busy:
        assert all(event.error is None for event in engine.step())
    assert not any(each.replaced or each.adapters for each in held)
    assert not any(each() is not None for each in matrices)


def test_adapters_that_can_only_be_merged_are_refused(
    several: dict[str, Any], tmp_path: Path
) -> None:
    make_adapter(several["base"], tmp_path, modules_to_save=["embedding_norm"])
    model = lfm2_fast.load(several["base"], device="cpu")
    with pytest.raises(lfm2_fast.CheckpointError, match="replaces model.embedding_norm.weight"):
        model.load_adapter(tmp_path)
    # A tensor that is neither trained whole nor the base's own.
    make_adapter(several["base"], tmp_path / "other", target_modules=["w1"])
    path = tmp_path / "other" / "adapter_model.safetensors"
    norm = {"base_model.model.model.embedding_norm.weight": torch.full((96,), 3.0)}
    save_file(load_file(path) | norm, path)
    with pytest.raises(lfm2_fast.CheckpointError, match="model.embedding_norm.weight that is not"):
        model.load_adapter(tmp_path / "other")
    model.network.adapters.limit(rank=64)
    with pytest.raises(lfm2_fast.CheckpointError, match="replaces .*max_lora_rank=64 keeps no"):
        model.load_adapter(several["c"])
    assert model.adapters() == [] and model.active_adapter is None
    with pytest.raises(ValueError, match="'x' is not loaded.*none"):
        model.set_adapter("x")
    with pytest.raises(TypeError, match="takes one name or None"):
        model.set_adapter(["x"])  # as transformers takes several
    # transformers' name of the argument: the adapter would be called "default".
    with pytest.raises(TypeError, match=r"takes no adapter_name=.*path, name"):
        model.load_adapter(tmp_path, adapter_name="x")
    with pytest.raises(ValueError, match="not empty, got None"):
        model.load_adapter(tmp_path, None)
