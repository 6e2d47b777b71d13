"""Several tokens of a slot in one step: each has the bits of a step of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast
from lfm2_fast.cache.batch import Batch, HostBatch
from lfm2_fast.cache.kv_cache import Cache, ConvWindow
from lfm2_fast.engine.model_runner import run_batch
from lfm2_fast.ops import native_library
from tests.batches import sequence_of, text

native = pytest.mark.skipif(
    native_library.why_not(torch.device("cpu")) is not None, reason="there is no extension"
)
# Tokens that slots run in one step, some of them alone; 13 tokens are in the few-token limits.
DRAFTED = {2: 8, 0: 1, 1: 3, 3: 1}
PROMPTS = {0: 5, 1: 63, 2: 511, 3: 1}


def flat(cache: Cache, counts: Mapping[int, int]) -> Batch:
    """Return the step that runs the next ``counts[slot]`` tokens of slots, a row for each."""
    places = [(slot, cache.lengths[slot] + i) for slot, n in counts.items() for i in range(n)]
    slots, positions = zip(*places, strict=True)
    at = torch.tensor(positions)
    return Batch(
        positions=at,
        cu_seqlens=torch.arange(len(places) + 1, dtype=torch.int32),
        slots=torch.tensor(slots),
        lengths=(at + 1).int(),
        max_query=1,
        host=HostBatch(slots, positions, (1,) * len(places)),
    )


def prefilled(model: lfm2_fast.Lfm2ForCausalLM, prompts: Mapping[int, int] = PROMPTS) -> Cache:
    """Return a cache with prompts of the given lengths in its slots."""
    cache = model.new_cache(4, spare=8)
    for slot, count in prompts.items():
        batch = cache.next_batch([count], [slot], "cpu")
        run_batch(model.network, torch.tensor(text(count, slot)), batch, cache)
    return cache


def verified(
    model: lfm2_fast.Lfm2ForCausalLM, cache: Cache, texts: Mapping[int, Sequence[int]]
) -> torch.Tensor:
    """Run the next tokens of all slots in one step; logits of each token."""
    network = model.network
    cache.make_room({slot: cache.lengths[slot] + len(tokens) for slot, tokens in texts.items()})
    tokens = torch.tensor([token for each in texts.values() for token in each])
    batch = flat(cache, {slot: len(tokens) for slot, tokens in texts.items()})
    return network(tokens, batch, cache, ops=network.ops.for_verification)


def by_steps(
    model: lfm2_fast.Lfm2ForCausalLM, cache: Cache, texts: Mapping[int, Sequence[int]]
) -> torch.Tensor:
    """Run the same tokens one by one, each in a step of its own."""
    found = []
    for slot, tokens in texts.items():
        for token in tokens:
            batch = cache.next_batch([1], [slot], "cpu")
            found.append(run_batch(model.network, torch.tensor([token]), batch, cache))
    return torch.cat(found)


@pytest.mark.parametrize(
    ("backend", "dtype", "quantization"),
    [
        ("eager", torch.float32, None),
        ("eager", torch.bfloat16, "int8"),
        ("eager", torch.float64, None),
        *(
            pytest.param("native", dtype, quantization, marks=native)
            for dtype in (torch.float32, torch.bfloat16)
            for quantization in (None, "int8", "int4")
        ),
    ],
)
def test_a_step_of_many_tokens_has_the_bits_of_many_steps(
    random_checkpoint, backend, dtype, quantization, threads
) -> None:
    folder = random_checkpoint(
        conv_L_cache=4,
        conv_bias=True,
        vocab_size=1000,
        intermediate_size=160,
        max_position_embeddings=1024,
    )
    model = lfm2_fast.load(
        folder, device="cpu", dtype=dtype, backend=backend, quantization=quantization
    )
    texts = {slot: text(count, 10 + slot) for slot, count in DRAFTED.items()}
    cache, other = prefilled(model), prefilled(model)
    found, wanted = verified(model, cache, texts), by_steps(model, other, texts)
    assert found.isfinite().all() and torch.equal(found, wanted)
    # Two tokens of slot 2 are kept, and the others taken back: a length says it all.
    kept = {slot: tokens[: 2 if slot == 2 else None] for slot, tokens in texts.items()}
    for slot, tokens in kept.items():
        cache.lengths[slot] += len(tokens)
    other = prefilled(model)
    by_steps(model, other, kept)
    again = {2: text(3, 99), 1: text(1, 98)}
    assert torch.equal(verified(model, cache, again), by_steps(model, other, again))
    for ours, theirs in zip(cache.layers, other.layers, strict=True):
        if isinstance(ours, ConvWindow):
            continue
        for slot in kept:
            pairs = zip(
                sequence_of(cache, ours, slot), sequence_of(other, theirs, slot), strict=True
            )
            length = cache.lengths[slot]
            assert all(torch.equal(a[:, :length], b[:, :length]) for a, b in pairs)


def three_layers(random_checkpoint: Callable[..., Path], **changed: Any) -> Path:
    layers = ["conv", "full_attention", "conv"]
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return random_checkpoint(
        vocab_size=1000, layer_types=layers, num_hidden_layers=3, conv_bias=True, **sizes, **changed
    )


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [
        pytest.param(torch.float32, None, marks=pytest.mark.nightly),
        pytest.param(torch.float16, None, marks=pytest.mark.nightly),
        # The interpreter's bfloat16 is wrong; the code of both is the same.
        pytest.param(torch.float16, "int8", marks=pytest.mark.slow),
    ],
)
def test_kernels_give_the_bits_of_many_steps(
    random_checkpoint, quick_interpreter, grid_order, monkeypatch, dtype, quantization
) -> None:
    """With contexts of one split and of two, on either side of where a split begins."""
    monkeypatch.setattr("lfm2_fast.kernels.flash_decode.SHORTEST_SPLIT", 16)
    monkeypatch.setattr("lfm2_fast.kernels.flash_decode.keys_of_block", lambda *_: 16)
    folder = three_layers(random_checkpoint, intermediate_size=100, scale=2.0)
    model = lfm2_fast.load(
        folder, device="cpu", dtype=dtype, backend="triton", quantization=quantization
    )
    assert model.network.verified_tokens == 16
    prompts, drafted = {0: 3, 2: 14}, {2: 5, 0: 1, 1: 2}
    texts = {slot: text(count, 10 + slot) for slot, count in drafted.items()}
    found = verified(model, prefilled(model, prompts), texts)
    assert found.isfinite().all()
    assert torch.equal(found, by_steps(model, prefilled(model, prompts), texts))


@pytest.mark.interpreter
def test_no_steps_are_verified_where_kernels_do_not_multiply(
    random_checkpoint, quick_interpreter
) -> None:
    """Rows of 150 bytes begin at no word, and the bits of PyTorch's product depend on its rows."""
    folder = three_layers(random_checkpoint, intermediate_size=150)
    model = lfm2_fast.load(
        folder, device="cpu", dtype=torch.float32, backend="triton", quantization="int8"
    )
    assert model.network.verified_tokens == 0
