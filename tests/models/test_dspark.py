"""DSpark drafters: equal to a plain reading of their description, and without effect on texts."""

from __future__ import annotations

import copy
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import lfm2_fast
from bench.cpu.drafters import BLOCK, DEPTH, MASK, write_drafter
from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.config_values import CheckpointError
from lfm2_fast.engine.draft_length import Acceptance, Budget, StepCosts
from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.model_runner import ModelRunner, new_cache
from lfm2_fast.engine.request import Request
from lfm2_fast.ops import native_library
from lfm2_fast.ops.sampling import SamplingParams
from tests.batches import events_by_request, sequence_of, text

DRAWN = SamplingParams(do_sample=True, temperature=0.7, top_k=8)


def plain_block(
    weights: dict[str, torch.Tensor], target: Any, streams: torch.Tensor, last: int
) -> torch.Tensor:
    """Logits of a block without the Markov head, ``[BLOCK, V]``, as the description has it.

    ``streams [n, 2 * H]`` are those of the tokens before the ``last`` one.
    """
    config = target.config
    width, kv_heads = config.head_dim, config.num_key_value_heads

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], weights[name], 1e-5)

    def rotated(x: torch.Tensor, first: int) -> torch.Tensor:
        """Rotate neighbours: x [n, heads, D], of tokens from ``first`` on."""
        places = torch.arange(first, first + len(x), dtype=torch.float64)
        # Frequencies are float32's, as everywhere in the family.
        inv_freq = 1.0 / 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        angle = places[:, None] * inv_freq
        cos, sin = (each[:, None].to(x.dtype) for each in (angle.cos(), angle.sin()))
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    known = len(streams)
    context = norm(streams @ weights["fc.weight"].T, "hidden_norm.weight")
    ids = torch.tensor([last] + [MASK] * (BLOCK - 1))
    x = target.embed_tokens.weight[ids]
    for number in range(DEPTH):
        at = f"layers.{number}."
        inside = f"{at}self_attn."

        def heads(y: torch.Tensor, name: str, inside: str = inside) -> torch.Tensor:
            return (y @ weights[f"{inside}{name}_proj.weight"].T).unflatten(-1, (-1, width))

        y = norm(x, f"{at}input_layernorm.weight")
        q = rotated(norm(heads(y, "q"), f"{inside}q_norm.weight"), known)
        before = norm(heads(context, "k"), f"{inside}k_norm.weight")
        own = norm(heads(y, "k"), f"{inside}k_norm.weight")
        k = torch.cat([rotated(before, 0), rotated(own, known)])
        v = torch.cat([heads(context, "v"), heads(y, "v")])
        group = q.shape[1] // kv_heads
        k, v = (each.repeat_interleave(group, 1).transpose(0, 1) for each in (k, v))
        made = F.scaled_dot_product_attention(q.transpose(0, 1), k, v)
        x = x + made.transpose(0, 1).flatten(1) @ weights[f"{inside}o_proj.weight"].T
        y = norm(x, f"{at}post_attention_layernorm.weight")
        gate, up = (y @ weights[f"{at}mlp.{each}_proj.weight"].T for each in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ weights[f"{at}mlp.down_proj.weight"].T
    return norm(x, "norm.weight") @ target.lm_head.weight.T


@pytest.fixture
def eager(tiny: Path, tmp_path: Path) -> Any:
    model = lfm2_fast.load(tiny, device="cpu", dtype="float64", backend="eager")
    model.load_drafter(write_drafter(tmp_path / "drafter", model.network.config))
    return model


def test_a_block_has_the_logits_of_the_description(eager, tmp_path) -> None:
    """The text runs in two chunks and single steps; NaN stands where nothing was written."""
    network = eager.network
    ids = text(70, 5)
    cache = new_cache(network, 2, 200)
    cache.make_room({0: 1, 1: 80})
    for layer in cache.draft_layers:
        layer.k.fill_(math.nan)
        layer.v.fill_(math.nan)
    runner = ModelRunner(network, cache)
    for chunk in (ids[:40], ids[40:67], ids[67:68], ids[68:69]):
        runner.prefill([chunk], [1])
    states: list[torch.Tensor] = []
    fresh = new_cache(network, 1, 200)
    batch = fresh.next_batch([69], [0], "cpu")
    fresh.reserve(batch)
    network.run_blocks(torch.tensor(ids[:69]), batch, fresh, collected=states)
    streams = torch.cat([states[1], states[-2]], -1)
    weights = {
        name: each.double()
        for name, each in load_file(tmp_path / "drafter" / "model.safetensors").items()
    }
    expected = plain_block(weights, network, streams, ids[69])
    cache.make_room({1: 69 + BLOCK})
    drafter = network.drafter
    found = drafter.run_block(network, cache, [ids[69]], [1], [69], BLOCK)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    before = torch.tensor([7])
    added = drafter.add_markov(found[:1], before, network.ops)
    w1, w2 = (weights[f"markov_head.markov_w{n}.weight"] for n in (1, 2))
    torch.testing.assert_close(added, found[:1] + w1[7] @ w2.T)


def written(engine: Engine) -> list[list[Any]]:
    """Tokens and ends of requests that share prefixes, two of which are the same."""
    asked = [
        Request(text(60, 1), max_tokens=9),
        Request(text(60, 1) + text(9, 4), DRAWN, max_tokens=9, seed=3, n=2),
        Request(text(60, 1), SamplingParams(repetition_penalty=1.2), max_tokens=7),
        Request(text(12, 2), max_tokens=9, eos=(5, 9), min_tokens=4, logprobs=2),
    ]
    return [
        [(event.token, event.finish_reason) for event in sorted(events, key=lambda e: e.index)]
        for events in events_by_request(engine, asked)
    ]


_lacking = native_library.why_not(torch.device("cpu"))


@pytest.mark.parametrize(
    ("backend", "dtype", "quantization"),
    [
        ("eager", "float64", None),
        *[
            pytest.param(
                "native", *each, marks=pytest.mark.skipif(_lacking is not None, reason="native")
            )
            for each in (("float32", None), ("bfloat16", "int8"), ("bfloat16", "int4"))
        ],
    ],
)
def test_drafts_change_no_text(
    tiny, tmp_path, monkeypatch, backend: str, dtype: str, quantization: str | None
) -> None:
    """Rows share pages, and some are preempted. Random drafts are made in every step."""
    monkeypatch.setattr(StepCosts, "of", lambda self, tokens: 1.0 + 0.01 * tokens)
    monkeypatch.setattr(Acceptance, "chance", lambda *_: 0.9)
    monkeypatch.setattr(Acceptance, "rests", lambda *_: False)
    monkeypatch.setattr(Budget, "note", lambda *_, **__: None)
    model = lfm2_fast.load(
        tiny, device="cpu", dtype=dtype, backend=backend, quantization=quantization
    )
    plain = written(Engine(model, max_rows=3, pages=4))
    model.load_drafter(write_drafter(tmp_path / "drafter", model.network.config))
    engine = Engine(model, max_rows=3, pages=4)
    # The second time, prompts are found in the cache, with the drafter's keys.
    for _ in range(2):
        assert written(engine) == plain
    statistics = engine.statistics
    assert statistics.drafted > 20 and statistics.preemptions and statistics.prefix_hits
    model.unload_drafter()
    drafted = statistics.drafted
    assert written(engine) == plain
    assert statistics.drafted == drafted


def test_a_drafter_that_knows_the_text_is_accepted(eager, monkeypatch) -> None:
    """Blocks are told the plain text, so that every draft is accepted."""
    plain = eager.generate([text(20, 3)], max_new_tokens=20, eos_token_id=[])[0].tolist()
    drafter = eager.network.drafter

    def told(target, cache, tokens, slots, positions, size) -> torch.Tensor:
        following = [plain[at + 1 : at + 1 + size] for at in positions]
        padded = [each + [0] * (size - len(each)) for each in following]
        return F.one_hot(torch.tensor(padded), 4096) * 1e6

    monkeypatch.setattr(drafter, "run_block", told)
    engine = Engine(eager, max_rows=1)
    engine.add(Request(text(20, 3), max_tokens=20))
    tokens = []
    while engine.busy:
        tokens += [event.token for event in engine.step()]
    assert text(20, 3) + tokens == plain
    told_of = engine.statistics
    assert told_of.drafted == told_of.accepted > 10 and told_of.steps < 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "it is not a DSpark drafter"),
        ({"markov_head_type": "rnn"}, "markov_head_type='rnn' is not supported"),
        ({"vocab_size": 4000}, "vocab_size=4000 is that of another model"),
        ({"num_key_value_heads": 1}, "do not fit into the model's pages"),
        ({"dflash_config": {"mask_token_id": 3, "num_target_layers": 4}}, "target_layer_ids must"),
        (
            {"dflash_config": {"target_layer_ids": [2, 0], "num_target_layers": 4}},
            "target_layer_ids must be layers of the 4",
        ),
        ({"dflash_config": {"target_layer_ids": [0], "num_target_layers": 99}}, "mask_token_id"),
        ({"is_causal": True}, "is_causal=True is not supported"),
        ({"intermediate_size": 64}, "gate_proj.weight has shape"),
        ({"markov_rank": 0}, "markov_rank must be a positive"),
        ({"layer_types": ["conv", "conv"]}, "layer_types must be"),
    ],
)
def test_another_drafter_is_refused_by_name(tiny, tmp_path, changes, message: str) -> None:
    model = lfm2_fast.load(tiny, device="cpu", dtype="float32", backend="eager")
    folder = write_drafter(tmp_path / "drafter", model.network.config, **changes)
    with pytest.raises(CheckpointError, match=message):
        model.load_drafter(folder)
    assert model.network.drafter is None


def test_tensors_that_are_missing_or_unknown_are_named(tiny, tmp_path) -> None:
    model = lfm2_fast.load(tiny, device="cpu", dtype="float32", backend="eager")
    folder = write_drafter(tmp_path / "drafter", model.network.config)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"gate.weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"gate\.weight"):
        model.load_drafter(folder)
    del tensors["fc.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks fc\.weight"):
        model.load_drafter(folder)
    with pytest.raises(CheckpointError, match="no folder"):
        model.load_drafter(tmp_path / "nowhere")


def taken(engine: Engine) -> int:
    """Bytes of an engine's cache, and of what its drafter has not read."""
    return engine.cache.nbytes + engine.decode.speculation.late.rows.nbytes


def room_for_more(engine: Engine) -> int:
    """Bytes of a page, and of two rows: what is counted may be more than what is taken."""
    ring, windows = engine.decode.speculation.late.rows, engine.cache.windows
    rows = 2 * (ring.nbytes + windows.nbytes) // engine.max_rows
    return engine.cache.pool.memory.page_bytes + rows


def test_an_engines_memory_has_room_for_the_drafters_pages(eager) -> None:
    engine = Engine(eager, max_rows=2, memory="4MB")
    assert 4e6 - room_for_more(engine) < taken(engine) <= 4e6
    eager.unload_drafter()
    assert Engine(eager, max_rows=2, memory="4MB").tokens > engine.tokens


def test_an_engine_that_begins_again_has_room_for_a_later_drafter(
    tiny, tmp_path, monkeypatch
) -> None:
    """Pages are larger then. So there are fewer of them, and texts are shorter."""
    model = lfm2_fast.load(tiny, device="cpu", dtype="float32", backend="eager")
    engine = Engine(model, max_rows=2, memory="4MB")
    before = engine.tokens, engine.max_length
    assert engine.cache.nbytes <= 4e6
    model.load_drafter(write_drafter(tmp_path / "drafter", model.network.config))
    held = weakref.ref(engine.cache)
    made: list[bool] = []
    monkeypatch.setattr(
        "lfm2_fast.engine.engine.new_cache",
        lambda *given, **named: (made.append(held() is None), new_cache(*given, **named))[1],
    )
    engine.reset()
    # The cache before is gone when the new one is made.
    assert made == [True]
    assert 4e6 - room_for_more(engine) < taken(engine) <= 4e6
    assert engine.tokens < before[0] and engine.max_length <= engine.tokens
    model.unload_drafter()
    engine.reset()
    assert (engine.tokens, engine.max_length) == before


def context(cache: Cache, slot: int, tokens: int) -> list[torch.Tensor]:
    """Keys and values of the drafter's layers of a slot's first tokens."""
    return [
        each[:, :tokens] for layer in cache.draft_layers for each in sequence_of(cache, layer, slot)
    ]


@pytest.mark.parametrize("drafts", [True, False])
@pytest.mark.parametrize("callers", [True, False])
def test_a_context_is_complete_where_later_texts_find_it(
    eager, monkeypatch, drafts: bool, callers: bool
) -> None:
    """The drafter reads tokens late, many together: at full pages, at ends and before drafts."""
    network = eager.network
    read = []
    remember = network.drafter.remember

    def counted(streams: torch.Tensor, *rest: Any) -> None:
        read.append(len(streams))
        remember(streams, *rest)

    monkeypatch.setattr(network.drafter, "remember", counted)
    if drafts:
        monkeypatch.setattr(StepCosts, "of", lambda self, tokens: 1.0 + 0.01 * tokens)
        monkeypatch.setattr(Acceptance, "chance", lambda *_: 0.9)
        monkeypatch.setattr(Acceptance, "rests", lambda *_: False)
        monkeypatch.setattr(Budget, "note", lambda *_, **__: None)
    prompt = text(40, 3)
    if callers:
        cache = new_cache(network, 2, 400)
        engine = Engine(network, cache=cache)
        engine.add(Request(prompt, max_tokens=100, assisted=drafts), [1])
        engine.add(Request(prompt[:20], max_tokens=5, assisted=drafts), [0])
    else:
        engine = Engine(network, max_rows=2, max_length=400)
        cache = engine.cache
        engine.add(Request(prompt, max_tokens=100, assisted=drafts))
    written = list(prompt)
    while engine.busy:
        written += [event.token for event in engine.step() if event.id == 1]
    assert (engine.statistics.drafted > 20) == drafts
    if not drafts:
        # Prompts, full pages at 64 and 128 tokens, and the rests of both texts.
        assert sorted(read) == ([4, 11, 24, 60, 64] if callers else [24, 40, 64])
    slot, held = 1, len(written) - 1
    if not callers:
        engine.add(Request([*written, 5], max_tokens=9))
        engine.step()
        slot, held = engine.decode.rows[0].slot, 128
        assert engine.statistics.prefix_hits == held
    fresh = new_cache(network, 1, 400)
    ModelRunner(network, fresh).prefill([written[:held]], [0])
    for found, wanted in zip(context(cache, slot, held), context(fresh, 0, held), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_calls_that_cannot_draft_have_nothing_for_the_drafter(eager, monkeypatch) -> None:
    """With an assistant, beams or logits processors: caches and passes are those without it."""

    def fail(*_: Any) -> None:
        raise AssertionError("the drafter read a text that it will not draft")

    monkeypatch.setattr(eager.network.drafter, "remember", fail)
    options: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": []}
    eager.generate([text(9, 3)], assistant_model=eager, **options)
    eager.generate([text(9, 3)], num_beams=2, **options)
    eager.generate([text(9, 3)], no_repeat_ngram_size=2, **options)
    engine = Engine(eager, max_rows=1, assistant=eager)
    assert not engine.cache.draft_layers


def test_a_cast_model_drafts_on(eager) -> None:
    model = eager.to(torch.float32)
    plain = model.generate([text(20, 3)], max_new_tokens=8, eos_token_id=[])
    engine = Engine(model, max_rows=1)
    engine.add(replace(Request(text(20, 3)), max_tokens=8))
    tokens = []
    while engine.busy:
        tokens += [event.token for event in engine.step()]
    assert text(20, 3) + tokens == plain[0].tolist()


def test_a_caches_own_drafter_alone_is_used(eager, tmp_path) -> None:
    """Caches of a drafter of another depth, of none, and of a model where drafters do not run."""
    ids, options = [text(12, 3)], {"max_new_tokens": 6, "eos_token_id": []}
    cache = eager.new_cache(1, spare=8)
    expected = eager.generate(ids, past_key_values=cache, **options)
    config = eager.network.config
    eager.load_drafter(write_drafter(tmp_path / "deeper", config, depth=DEPTH + 1))
    cache.reset()
    assert not eager.network.drafts_on(cache)
    assert torch.equal(eager.generate(ids, past_key_values=cache, **options), expected)
    eager.unload_drafter()
    bare = eager.new_cache(1, spare=8)
    assert torch.equal(eager.generate(ids, past_key_values=bare, **options), expected)
    eager.load_drafter(tmp_path / "deeper")
    eager.network.ops.captures = True
    assert eager.network.draft_layers == 0 and not eager.network.drafts_on(bare)


def test_a_copy_of_a_drafter_has_tensors_of_its_own(eager) -> None:
    copied = copy.deepcopy(eager.network).drafter
    for block, own in zip(copied.layers, copied._keys_values, strict=True):
        whole = block.self_attn.qkv_proj.weight
        assert own.weight.data_ptr() == whole[-len(own.weight) :].data_ptr()
