"""The model against Hugging Face's, and against itself run another way."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast
from lfm2_fast.engine.model_runner import run_batch

VARIANTS = {
    "plain": {},
    "width_2": {"conv_L_cache": 2},
    "width_5_bias": {"conv_L_cache": 5, "conv_bias": True},
    "untied": {"tie_word_embeddings": False},
    "adjusted_ff": {"block_auto_adjust_ff_dim": True, "intermediate_size": 200},
    "one_group": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "attention_only": {"layer_types": ["full_attention"] * 5},
    "conv_only": {"layer_types": ["conv"] * 5},
}


def ids(*shape: int, seed: int = 1, vocab: int = 307) -> torch.Tensor:
    return torch.randint(8, vocab, shape, generator=torch.Generator().manual_seed(seed))


def assert_same_fp32(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal up to float32 rounding through a few layers, relative to the largest logit."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < 2e-5, f"relative error {error:.2e}"


@pytest.mark.parametrize("changed", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("length", [1, 2, 3, 4, 17, 130])
def test_logits_equal_hugging_face(random_checkpoint, pair, changed: dict, length: int) -> None:
    theirs, ours = pair(random_checkpoint(**changed))
    tokens = ids(2, length)
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
    assert_same_fp32(ours(tokens).logits, expected)


def test_head_size_need_not_divide_hidden(random_checkpoint, pair) -> None:
    theirs, ours = pair(random_checkpoint(head_dim=24))
    tokens = ids(1, 9)
    with torch.no_grad():
        assert_same_fp32(ours(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("width", [2, 3, 5])
@pytest.mark.parametrize("chunks", [(1, 1, 1, 1), (5, 1, 2, 3), (2, 7), (3, 1, 70), (66, 3, 1)])
def test_every_split_equals_one_prefill(random_checkpoint, pair, chunks, width: int) -> None:
    """A second prefill on a cached conversation, and chunks shorter than the conv width."""
    _, ours = pair(random_checkpoint(conv_L_cache=width))
    tokens = ids(2, sum(chunks))
    whole = ours(tokens).logits
    cache, parts = None, []
    for part in tokens.split(list(chunks), dim=1):
        answer = ours(part, past_key_values=cache)
        cache = answer.past_key_values
        parts.append(answer.logits)
    assert cache.lengths == [sum(chunks)] * 2
    assert_same_fp32(torch.cat(parts, dim=1), whole)


def test_second_turn_equals_hugging_face(random_checkpoint, pair) -> None:
    theirs, ours = pair(random_checkpoint())
    first, second, third = ids(1, 11), ids(1, 6, seed=2), ids(1, 1, seed=3)
    their_cache = our_cache = None
    for turn in (first, second, third):
        with torch.no_grad():
            expected = theirs(turn, past_key_values=their_cache, use_cache=True)
        answer = ours(turn, past_key_values=our_cache)
        their_cache, our_cache = expected.past_key_values, answer.past_key_values
        assert_same_fp32(answer.logits, expected.logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [(4,), (1, 9, 5), (7, 7, 2)])
def test_padding_touches_nothing(random_checkpoint, pair, side: str, lengths) -> None:
    """Every row of a padded batch, a batch of one included, equals that row alone."""
    _, ours = pair(random_checkpoint())
    width = max(lengths) + 2
    tokens, mask = ids(len(lengths), width), torch.zeros(len(lengths), width, dtype=torch.long)
    spans = [slice(width - n, width) if side == "left" else slice(0, n) for n in lengths]
    for row, span in enumerate(spans):
        mask[row, span] = 1
    answer = ours(tokens, attention_mask=mask)
    assert answer.past_key_values.lengths == list(lengths)
    following = ours(ids(len(lengths), 1, seed=5), past_key_values=answer.past_key_values).logits
    for row, span in enumerate(spans):
        alone = ours(tokens[row : row + 1, span])
        assert_same_fp32(answer.logits[row : row + 1, span], alone.logits)
        after = ours(
            ids(len(lengths), 1, seed=5)[row : row + 1], past_key_values=alone.past_key_values
        )
        assert_same_fp32(following[row : row + 1], after.logits)
    assert not answer.logits[mask == 0].any()


def test_left_padding_equals_hugging_face(random_checkpoint, pair) -> None:
    theirs, ours = pair(random_checkpoint())
    tokens = ids(2, 8)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=mask).logits
    answer = ours(tokens, attention_mask=mask).logits
    assert_same_fp32(answer[mask == 1], expected[mask == 1])


def test_packed_batch_of_mixed_work_equals_each_alone(random_checkpoint, pair) -> None:
    """Prefill, a chunk and a decode step in one batch, slots permuted, one slot untouched."""
    _, ours = pair(random_checkpoint())
    cache = ours.new_cache(4)
    histories = {3: ids(5, seed=1), 0: ids(70, seed=2)}
    for slot, tokens in histories.items():
        run_batch(ours.network, tokens, cache.next_batch([len(tokens)], [slot], "cpu"), cache)
    work = {3: ids(4, seed=3), 1: ids(9, seed=4), 0: ids(1, seed=5)}
    counts = [len(tokens) for tokens in work.values()]
    batch = cache.next_batch(counts, list(work), "cpu")
    logits = run_batch(ours.network, torch.cat(list(work.values())), batch, cache)
    assert cache.lengths == [71, 9, 0, 9]
    for (slot, tokens), got in zip(work.items(), logits.split(counts), strict=True):
        context = torch.cat([histories.get(slot, tokens[:0]), tokens])
        alone = ours(context[None]).logits[0, -len(tokens) :]
        assert_same_fp32(got, alone)


def test_empty_rows_and_batches(random_checkpoint, pair) -> None:
    _, ours = pair(random_checkpoint())
    assert ours(ids(0, 5)).logits.shape == (0, 5, 307)
    assert ours(ids(2, 0)).logits.shape == (2, 0, 307)
    answer = ours(ids(2, 3), attention_mask=torch.tensor([[0, 0, 0], [1, 1, 1]]))
    assert answer.past_key_values.lengths == [0, 3]


def test_logits_to_keep(random_checkpoint, pair) -> None:
    _, ours = pair(random_checkpoint())
    tokens = ids(2, 6)
    full = ours(tokens).logits
    last = ours(tokens, logits_to_keep=1).logits
    assert_same_fp32(last, full[:, -1:])
    assert last.untyped_storage().nbytes() == last.nbytes, "room was made for those left out"
    chosen = torch.tensor([0, 4])
    assert_same_fp32(ours(tokens, logits_to_keep=chosen).logits, full[:, chosen])


def test_answer_is_read_as_hugging_faces(random_checkpoint, pair) -> None:
    _, ours = pair(random_checkpoint())
    answer = ours(ids(1, 3))
    assert answer[0] is answer.logits is answer["logits"]
    assert ours(ids(1, 3), use_cache=False).past_key_values is None
    logits, cache = ours(ids(1, 3), return_dict=False)
    assert logits.shape == (1, 3, 307) and cache.lengths == [3]
    assert ours.device.type == "cpu" and ours.dtype == torch.float32
    assert ours.eval() is ours and len(list(ours.parameters())) > 10


def test_to_moves_and_casts(random_checkpoint) -> None:
    folder = random_checkpoint()
    cast = lfm2_fast.load(folder, device="cpu", dtype="float32").to(torch.bfloat16)
    loaded = lfm2_fast.load(folder, device="cpu", dtype="bfloat16")
    assert cast.network.rope_frequencies.inv_freq.dtype == torch.float32
    assert torch.equal(cast(ids(1, 5)).logits, loaded(ids(1, 5)).logits)
    assert cast.to(torch.float64)(ids(1, 5)).logits.dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.tensor([[3, 307]])), r"input_ids\[0, 1\] is 307"),
        (lambda m: m(torch.tensor([[-1]])), r"input_ids\[0, 0\] is -1"),
        (lambda m: m(torch.tensor([1, 2])), r"shape \[batch, tokens\]"),
        (lambda m: m(torch.zeros(1, 2)), "must be integers"),
        (lambda m: m(ids(1, 3), attention_mask=torch.tensor([[1, 0, 1]])), "row 0 has zeros"),
        (lambda m: m(ids(1, 3), attention_mask=torch.ones(1, 2)), "at least as many columns"),
        (lambda m: m(ids(2, 3), past_key_values=m.new_cache(3)), "2 rows"),
    ],
)
def test_bad_input_is_named(random_checkpoint, pair, call: Callable, message: str) -> None:
    _, ours = pair(random_checkpoint())
    with pytest.raises(ValueError, match=message):
        call(ours)


def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


def held_out(tiny: Path, count: int) -> torch.Tensor:
    text = (tiny / "heldout.txt").read_text(encoding="utf-8")
    return tokenizer(tiny)(text, return_tensors="pt").input_ids[:, :count]


@pytest.mark.slow
def test_held_out_loss_is_hugging_faces(tiny: Path, pair) -> None:
    """The loss that Hugging Face's class had on the held-out text, stored when it was trained."""
    stored = json.loads((tiny / "heldout.json").read_text(encoding="utf-8"))
    text = (tiny / "heldout.txt").read_text(encoding="utf-8")
    _, ours = pair(tiny)
    ids = tokenizer(tiny)(text, add_special_tokens=False, return_tensors="pt").input_ids
    size = stored["window"]
    windows = ids[:, : ids.shape[1] // size * size].view(-1, size)
    logits = ours(windows).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert windows[:, 1:].numel() == stored["tokens"]
    assert loss.item() == pytest.approx(stored["loss"], rel=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("windows", [7, pytest.param(15, marks=pytest.mark.nightly)])
def test_bf16_is_no_further_from_fp32_than_hugging_faces(
    windows: int, tiny: Path, pair, as_close_to_fp32: Callable
) -> None:
    """Teacher-forced on trained weights."""
    exact, _ = pair(tiny)
    ids = held_out(tiny, windows * 256).view(1, windows, 256)
    as_close_to_fp32(exact, *pair(tiny, torch.bfloat16), ids)


def zero(*path: str) -> Callable[[lfm2_fast.Lfm2ForCausalLM], None]:
    def apply(model: lfm2_fast.Lfm2ForCausalLM) -> None:
        module = model.network
        for name in path[:-1]:
            module = getattr(module, name)
        getattr(module, path[-1]).zero_()

    return apply


def zero_gate(model: lfm2_fast.Lfm2ForCausalLM) -> None:
    hidden = model.config.hidden_size
    model.network.layers[0].conv.in_proj.weight[hidden : 2 * hidden] = 0


def zero_one_head(model: lfm2_fast.Lfm2ForCausalLM) -> None:
    model.network.layers[-1].self_attn.qkv_proj.weight[: model.config.head_dim] = 0


def zero_oldest_tap(model: lfm2_fast.Lfm2ForCausalLM) -> None:
    model.network.layers[0].conv.conv.weight[:, 0] = 0


MUTATIONS = {
    "gate": zero_gate,
    "oldest_tap": zero_oldest_tap,
    "conv": zero("layers", "0", "conv", "conv", "weight"),
    "rope": zero("rope_frequencies", "inv_freq"),
    "one_head": zero_one_head,
    "q_norm": zero("layers", "2", "self_attn", "q_layernorm", "weight"),
    "final_norm": zero("embedding_norm", "weight"),
    "ffn_norm": zero("layers", "1", "ffn_norm", "weight"),
    "down": zero("layers", "1", "feed_forward", "down_proj", "weight"),
}


@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_mutation_turns_the_comparison_red(tiny: Path, pair, mutate: Callable) -> None:
    """Without any one part the comparison with Hugging Face must fail, or it proves nothing."""
    theirs, ours = pair(tiny)
    tokens = held_out(tiny, 64)
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert_same_fp32(ours(tokens).logits, expected)
        mutate(ours)
        with pytest.raises(AssertionError, match="relative error"):
            assert_same_fp32(ours(tokens).logits, expected)


def test_without_the_window_decoding_goes_wrong(tiny: Path, pair) -> None:
    _, ours = pair(tiny)
    tokens = held_out(tiny, 64)
    expected = ours(tokens).logits[:, -1:]
    cache = ours(tokens[:, :-1]).past_key_values
    kept = copy.deepcopy(cache)
    assert_same_fp32(ours(tokens[:, -1:], past_key_values=kept).logits, expected)
    for layer in cache.layers:
        if hasattr(layer, "rows"):
            layer.rows.zero_()
    with pytest.raises(AssertionError, match="relative error"):
        assert_same_fp32(ours(tokens[:, -1:], past_key_values=cache).logits, expected)


def test_the_answer_is_a_mapping_as_hugging_faces_is(tiny: Path, pair: Callable) -> None:
    theirs, ours = (model(ids(1, 4)) for model in pair(tiny))
    assert list(ours) == list(ours.keys()) == list(theirs.keys()) == list(theirs)
    assert "logits" in ours and "loss" not in ours and ours.loss is None and len(ours) == 2
    assert dict(**ours)["logits"] is ours.logits is ours["logits"] is ours[0]
    assert ours[:1] == ours.to_tuple()[:1] == (ours.logits,)
    with pytest.raises(KeyError):
        ours["loss"]
