"""Rows without a token to choose: an error that names the step, and nothing broken after it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lfm2_fast
from lfm2_fast.ops import native_library

Model = lfm2_fast.Lfm2ForCausalLM
PROMPTS = [[1, 40, 41, 42], [1, 50], [1, 60, 61, 62, 63, 64, 65]]
ENDLESS = {"max_new_tokens": 14, "eos_token_id": None, "do_sample": False}


@pytest.fixture(scope="module")
def healthy(tiny: Path) -> Model:
    return lfm2_fast.load(tiny, device="cpu", dtype="float32", backend="eager")


@pytest.fixture(scope="module")
def step(healthy: Model) -> int:
    """Return the number of tokens of the second row up to the one that breaks only this row."""
    texts = healthy.generate(PROMPTS, **ENDLESS).tolist()
    others = {token for row in (0, 2) for token in texts[row]}
    written = texts[1][7:]
    for place in range(3, 9):
        if written[place] not in {*others, *written[:place], *PROMPTS[1]}:
            return place + 1
    raise AssertionError("the small checkpoint writes no token of its own in that row")


@pytest.fixture(scope="module", params=["eager", "native"])
def broken(
    request: pytest.FixtureRequest,
    healthy: Model,
    step: int,
    breaking: Callable[..., Path],
) -> Model:
    """A model that has no logits after the second row's token number ``step``."""
    if request.param == "native" and (reason := native_library.why_not(torch.device("cpu"))):
        pytest.skip(reason)
    token = int(healthy.generate(PROMPTS[1:2], **ENDLESS)[0, 2 + step - 1])
    folder = breaking(token)
    return lfm2_fast.load(folder, device="cpu", dtype="float32", backend=request.param)


class Puts:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[list[Any]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


def same(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores


THREE = ("greedy", "drawn", "processed")
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"do_sample": True, "top_k": 1},
    "filtered": {"do_sample": True, "temperature": 0.01, "top_p": 0.1, "min_p": 0.5},
    "penalized": {"repetition_penalty": 1.0000001},
    "processed": {"logits_processor": [same]},
    "processed and drawn": {"logits_processor": [same], "do_sample": True, "top_k": 1},
    "with scores": {"output_scores": True, "return_dict_in_generate": True},
    "stopped by Python": {"stopping_criteria": [lambda ids, scores: False]},
    "at least": {"min_new_tokens": 2},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_the_error_names_row_token_and_position(broken: Model, step: int, way: dict) -> None:
    """The broken row is in a batch of good rows, or alone, several times."""
    kwargs = {**ENDLESS, **way}
    for prompts, row in ((PROMPTS, 1), (PROMPTS[1:2], 0), (PROMPTS[1:2], 0)):
        message = f"^row {row} has no token to choose as its new token {step + 1}, at position "
        with pytest.raises(lfm2_fast.LogitsError, match=f"{message}{2 + step}: .*weights are"):
            broken.generate(prompts, **kwargs)


@pytest.mark.parametrize("way", [WAYS[name] for name in THREE], ids=THREE)
def test_later_calls_are_right(broken: Model, healthy: Model, way: dict) -> None:
    with pytest.raises(lfm2_fast.LogitsError):
        broken.generate(PROMPTS, **{**ENDLESS, **way})
    expected = healthy.generate(PROMPTS[::2], **ENDLESS)
    assert torch.equal(broken.generate(PROMPTS[::2], **ENDLESS), expected)


def test_earlier_tokens_were_streamed_and_the_stream_ends(
    broken: Model, healthy: Model, step: int
) -> None:
    for way in ({}, {"logits_processor": [same]}):
        streamer = Puts()
        with pytest.raises(lfm2_fast.LogitsError):
            broken.generate(PROMPTS[1:2], **ENDLESS, **way, streamer=streamer)
        expected = healthy.generate(PROMPTS[1:2], **ENDLESS)[0, 2:].tolist()
        assert streamer.got == [[PROMPTS[1]], *([token] for token in expected[:step])][:]
        assert streamer.ended == 1


@pytest.mark.parametrize("way", [WAYS[name] for name in THREE], ids=THREE)
def test_a_callers_cache_says_what_it_holds(
    broken: Model, healthy: Model, step: int, way: dict
) -> None:
    """The cache counts all tokens that ran, of every row. Good rows continue."""
    kwargs = {**ENDLESS, **way}
    cache = broken.new_cache(3)
    with pytest.raises(lfm2_fast.LogitsError):
        broken.generate(PROMPTS, **kwargs, past_key_values=cache)
    texts = healthy.generate(PROMPTS, **ENDLESS).tolist()
    for slot, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        whole = prompt + text[7:]
        assert cache.history[slot] == whole[: len(prompt) + step]
        assert cache.lengths[slot] == len(prompt) + step
    turns = [cache.history[0] + [33], PROMPTS[0], [*cache.history[2], 34, 35]]
    expected = healthy.generate(turns, **ENDLESS)
    assert torch.equal(broken.generate(turns, **kwargs, past_key_values=cache), expected)


def test_rows_that_wait_are_given_up(broken: Model, healthy: Model, step: int) -> None:
    prompts = [PROMPTS[0], *PROMPTS]
    with pytest.raises(lfm2_fast.LogitsError, match=f"^row 2 .* new token {step + 1}, "):
        broken.generate(prompts, **ENDLESS, max_batch_size=1)
    expected = healthy.generate(PROMPTS[:1], **ENDLESS)
    assert torch.equal(broken.generate(PROMPTS[:1], **ENDLESS, max_batch_size=1), expected)


def test_a_row_that_ends_before_it_breaks_is_no_error(
    broken: Model, healthy: Model, step: int
) -> None:
    """The breaking token is the text's last one, which never runs."""
    for ending in ({"max_new_tokens": step}, {"eos_token_id": broken_token(healthy, step)}):
        kwargs = {**ENDLESS, **ending}
        expected = healthy.generate(PROMPTS[1:2], **kwargs)
        assert expected.shape[1] == 2 + step
        assert torch.equal(broken.generate(PROMPTS[1:2], **kwargs), expected)
        whole = {**kwargs, "max_new_tokens": 14} if "eos_token_id" in ending else kwargs
        found = broken.generate(PROMPTS, **whole)
        assert torch.equal(found, healthy.generate(PROMPTS, **whole))


def broken_token(healthy: Model, step: int) -> int:
    return int(healthy.generate(PROMPTS[1:2], **ENDLESS)[0, 2 + step - 1])


def test_the_first_token_of_a_prompt(broken: Model, healthy: Model, step: int) -> None:
    prompt = [1, 40, broken_token(healthy, step)]
    for way in WAYS.values():
        with pytest.raises(lfm2_fast.LogitsError, match="new token 1, at position 3: "):
            broken.generate([PROMPTS[0], prompt], **{**ENDLESS, **way})


def test_forward_gives_logits_as_they_are(broken: Model, healthy: Model, step: int) -> None:
    """Logits and the loss may be NaN, as in Hugging Face's class."""
    ids = torch.tensor([[1, 40, broken_token(healthy, step), 41]])
    out = broken(ids, labels=ids)
    assert out.logits[0, 2:].isnan().all()
    assert out.loss.isnan()


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True}], ids=str)
def test_processors_that_leave_nothing_to_choose(healthy: Model, sampling: dict) -> None:
    """The second row has no choice at its third token. Minus infinity elsewhere is normal."""

    def leaving(value: float, places: slice) -> Callable[..., torch.Tensor]:
        def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if ids.shape[1] == 7 + 2:
                scores[1, places] = value
            return scores

        return processor

    kwargs = {**ENDLESS, **sampling, "seed": 1}
    message = "^row 1 .* new token 3, at position 4: .*logits processors leave no token"
    for value, places in ((math.nan, slice(70, 71)), (-math.inf, slice(None))):
        with pytest.raises(lfm2_fast.LogitsError, match=message):
            healthy.generate(PROMPTS, **kwargs, logits_processor=[leaving(value, places)])
    masked = healthy.generate(PROMPTS, **kwargs, logits_processor=[leaving(-math.inf, slice(9))])
    assert masked.shape == (3, 7 + 14) and int(masked[1, 9]) >= 9


@pytest.mark.slow
def test_a_score_of_infinity_forces_a_token_as_in_hugging_face(tiny: Path, pair: Callable) -> None:
    """This holds in greedy decoding. In both classes a draw from infinite scores fails."""
    theirs, ours = pair(tiny)

    def force(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, [77, 90]] = torch.inf
        return scores

    ids = torch.tensor(PROMPTS[:1])
    kwargs = {"max_new_tokens": 3, "eos_token_id": None, "logits_processor": [force]}
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **kwargs)
    assert expected[0, 4:].tolist() == [77] * 3
    assert torch.equal(ours.generate(ids, do_sample=False, **kwargs), expected)
    for model in (theirs, ours):
        with pytest.raises(RuntimeError):
            model.generate(ids, do_sample=True, **kwargs)


def test_logits_that_processors_repair_are_not_an_error(
    broken: Model, healthy: Model, step: int
) -> None:
    from transformers import InfNanRemoveLogitsProcessor

    processors = [InfNanRemoveLogitsProcessor()]
    text = broken.generate(PROMPTS[1:2], **ENDLESS, logits_processor=processors)
    expected = healthy.generate(PROMPTS[1:2], **ENDLESS)
    assert torch.equal(text[:, : 2 + step], expected[:, : 2 + step])


def test_no_more_end_tokens_than_there_are_tokens(healthy: Model) -> None:
    every = list(range(healthy.config.vocab_size))
    with pytest.raises(lfm2_fast.LogitsError, match="new token 1, .*logits processors"):
        healthy.generate(PROMPTS, max_new_tokens=3, min_new_tokens=1, eos_token_id=every)


def test_a_temperature_near_zero_is_named(healthy: Model) -> None:
    with pytest.raises(lfm2_fast.LogitsError, match=r"temperature=1e-40 makes .* greedily"):
        healthy.generate(PROMPTS, max_new_tokens=3, do_sample=True, temperature=1e-40)


def test_numbers_that_outgrow_float16(tiny: Path, tmp_path: Path) -> None:
    """Well in float32: the message says what to do."""
    folder = shutil.copytree(tiny, tmp_path / "large")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.feed_forward.w2.weight"] *= 2.0**14
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    wide = lfm2_fast.load(folder, device="cpu", dtype="float32")
    assert wide.generate(PROMPTS, **ENDLESS).shape == (3, 7 + 14)
    narrow = lfm2_fast.load(folder, device="cpu", dtype="float16")
    with pytest.raises(lfm2_fast.LogitsError, match="outgrow float16, .* dtype float32 or bf"):
        narrow.generate(PROMPTS, **ENDLESS)


@pytest.mark.parametrize(
    ("backend", "quantization"), [("eager", None), ("native", None), ("native", "int8")]
)
def test_nan_in_any_weight_is_reported(
    random_checkpoint: Callable[..., Path], backend: str, quantization: str | None
) -> None:
    """One weight is NaN, at any place. No implementation loses it on the way to the logits."""
    if backend == "native" and (reason := native_library.why_not(torch.device("cpu"))):
        pytest.skip(reason)
    model = lfm2_fast.load(
        random_checkpoint(conv_bias=True),
        device="cpu",
        dtype="float32",
        backend=backend,
        quantization=quantization,
    )
    prompt = [[1, *range(20, 60)]]
    tensors = [*model.network.named_parameters(), *model.network.named_buffers()]
    tensors = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
    for number, (name, tensor) in enumerate(tensors):
        flat = tensor.data.view(-1)
        place = len(flat) // 2
        kept = flat[place].clone()
        flat[place] = math.nan
        with pytest.raises(lfm2_fast.LogitsError):
            model.generate(prompt, max_new_tokens=3, do_sample=bool(number % 2))
            pytest.fail(name)
        flat[place] = kept
    assert len(tensors) >= 5 * 4
    assert model.generate(prompt, **ENDLESS).shape == (1, 41 + 14)
