"""RoPE scaling of every type, against transformers' Lfm2 class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast
from lfm2_fast.cache.batch import Batch
from lfm2_fast.config import ROPE_TYPES, Config
from lfm2_fast.config_values import CheckpointError
from lfm2_fast.engine import model_runner
from lfm2_fast.engine.model_runner import ModelRunner
from lfm2_fast.models.rope import RopeFrequencies
from lfm2_fast.ops import native_library

ORIGINAL = 24
THETA = 1e4
SIZES = {
    "vocab_size": 9, "hidden_size": 96, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 6, "num_key_value_heads": 2,
}  # fmt: skip


def scaled(kind: str, pairs: int = 8, **changed: Any) -> dict[str, Any]:
    """A config's RoPE of one type, whose original context is ``ORIGINAL`` tokens."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": THETA, "factor": 7.3}
    if kind in ("yarn", "longrope", "llama3"):
        rope["original_max_position_embeddings"] = ORIGINAL
    if kind == "longrope":
        rope["short_factor"] = [1 + 0.05 * i for i in range(pairs)]
        rope["long_factor"] = [2 + 0.3 * i for i in range(pairs)]
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "proportional":
        rope["partial_rotary_factor"] = 0.5
    return {"max_position_embeddings": ORIGINAL, "rope_parameters": {**rope, **changed}}


YARN = {"beta_fast": 20.0, "beta_slow": 2.0, "truncate": False}
ROPES = {
    **{kind: scaled(kind) for kind in ROPE_TYPES},
    "attention_factor": scaled("yarn", attention_factor=1.4),
    "mscale": scaled("yarn", mscale=1.0, mscale_all_dim=0.7, **YARN),
    "yarn_of_the_ratio": scaled("yarn", factor=None, original_max_position_embeddings=6),
    "longrope_of_the_ratio": scaled("longrope", factor=None, original_max_position_embeddings=6),
}
BY_LENGTH = ("dynamic", "longrope")
needs_native = pytest.mark.skipif(
    native_library.why_not(torch.device("cpu")) is not None, reason="no extension"
)
BACKENDS = ["eager", pytest.param("native", marks=needs_native)]


def ids(*shape: int, seed: int = 1, vocab: int = 307) -> torch.Tensor:
    return torch.randint(8, vocab, shape, generator=torch.Generator().manual_seed(seed))


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal up to float32 rounding through a few layers, relative to the largest logit."""
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < 2e-5, f"relative error {error:.2e}"


def frequencies(values: dict[str, Any], head_dim: int = 16) -> RopeFrequencies:
    config = Config.from_dict({"model_type": "lfm2", **SIZES, "head_dim": head_dim, **values})
    return RopeFrequencies(config, torch.device("cpu"), torch.float32)


LENGTHS = [1, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 60, 175, 1000, 128_000]


@pytest.mark.parametrize("values", ROPES.values(), ids=ROPES)
def test_frequencies_are_transformers_to_the_bit(values: dict[str, Any]) -> None:
    from transformers import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2RotaryEmbedding

    config = Lfm2Config(**{**SIZES, "head_dim": 16, **values})
    theirs, ours = Lfm2RotaryEmbedding(config), frequencies(values)
    assert ours.scale == theirs.attention_scaling
    for length in LENGTHS:
        batch = Batch.prepare([1], [length - 1], [0], "cpu")
        theirs(torch.zeros(1), batch.positions[None])
        assert torch.equal(ours.of(batch).view(-1), theirs.inv_freq), length


def test_plain_rope_is_transformers_too() -> None:
    from transformers import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2RotaryEmbedding

    ours, theirs = frequencies({}), Lfm2RotaryEmbedding(Lfm2Config(**SIZES, head_dim=16))
    assert torch.equal(ours.inv_freq, theirs.inv_freq) and ours.scale == 1.0


@pytest.mark.parametrize("kind", BY_LENGTH)
@pytest.mark.parametrize("head_dim", [16, 24, 64])
def test_a_rows_frequencies_do_not_depend_on_the_other_rows(kind: str, head_dim: int) -> None:
    """Frequencies are bit-identical for any number of rows and any place of a row."""
    ours = frequencies(scaled(kind, head_dim // 2), head_dim)
    lengths = torch.randint(1, 400, (70,), generator=torch.Generator().manual_seed(0)).int()
    every = ours.of_lengths(lengths)
    for count in range(1, 70):
        assert torch.equal(ours.of_lengths(lengths[-count:]), every[-count:])


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_every_token_has_the_frequencies_of_its_rows_end(kind: str) -> None:
    """Cases are rows of several tokens, a prompt in chunks, padding, and no tokens."""
    ours = frequencies(scaled(kind))
    batch = Batch.prepare([3, 0, 1, 30], [0, 9, 40, 2], [2, 1, 0, 3], "cpu")
    rows = ours.of_lengths(torch.tensor([3, 41, 32]))
    expected = rows.repeat_interleave(torch.tensor([3, 1, 30]), 0)
    assert torch.equal(ours.of(batch), expected)
    chunk = Batch.prepare([3, 1], [0, 40], [0, 1], "cpu", [100, 41])
    rows = ours.of_lengths(torch.tensor([100, 41]))
    assert torch.equal(ours.of(chunk), rows.repeat_interleave(torch.tensor([3, 1]), 0))
    padded = Batch(
        torch.zeros(8).long(), batch.cu_seqlens[:2], batch.slots[:1], batch.lengths[:1], 8
    )
    assert torch.equal(ours.of(padded), ours.of_lengths(torch.tensor([3])).expand(8, -1))
    assert ours.of(Batch.prepare([], [], [], "cpu")).shape == (0, 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("values", ROPES.values(), ids=ROPES)
def test_logits_equal_hugging_face(
    random_checkpoint, pair, values: dict[str, Any], backend: str
) -> None:
    theirs, ours = pair(random_checkpoint(**values), backend=backend)
    for length in (20, ORIGINAL, ORIGINAL + 1, 130):
        tokens = ids(1, min(length, ours.max_length))
        with torch.no_grad():
            assert_same(ours(tokens).logits, theirs(tokens, use_cache=False).logits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_steps_across_the_boundary_equal_hugging_face(
    random_checkpoint, pair, kind: str, backend: str
) -> None:
    """A prompt, a second turn and single tokens on one cache, whose keys stay as written."""
    theirs, ours = pair(random_checkpoint(**scaled(kind)), backend=backend)
    their_cache = our_cache = None
    for tokens in ids(1, 46).split([15, 6, *[1] * 9, 7, *[1] * 9], dim=1):
        with torch.no_grad():
            expected = theirs(tokens, past_key_values=their_cache, use_cache=True)
        answer = ours(tokens, past_key_values=our_cache)
        their_cache, our_cache = expected.past_key_values, answer.past_key_values
        assert_same(answer.logits, expected.logits)


@pytest.fixture
def trained(tiny: Path) -> Iterator[Callable[..., tuple[Any, Any]]]:
    """The small trained checkpoint with a config of its own, in both classes, in float32."""

    def load(values: dict[str, Any], **options: Any) -> tuple[Any, Any]:
        from transformers import Lfm2ForCausalLM

        config = lfm2_fast.Lfm2Config.from_pretrained(tiny)
        config.update(values)
        theirs = Lfm2ForCausalLM.from_pretrained(
            tiny, config=config.to_transformers(), dtype=torch.float32
        )
        options = {"device": "cpu", "dtype": "float32", **options}
        return theirs.eval(), lfm2_fast.load(tiny, config=config, **options)

    yield load


PROMPTS = [ids(1, n, seed=n, vocab=4000)[0].tolist() for n in (20, ORIGINAL, 3, 40)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_rows_that_are_written_together_write_hugging_faces_tokens(
    trained, kind: str, backend: str
) -> None:
    """Every row as if alone: of a batch, transformers gives all rows the longest one's length."""
    theirs, ours = trained(scaled(kind, pairs=16), backend=backend)
    ask = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    found = ours.generate(PROMPTS, **ask)
    for row, prompt in zip(found, PROMPTS, strict=True):
        # Else theirs keeps the frequencies of the longest context so far.
        theirs(torch.tensor([[1]]))
        expected = theirs.generate(torch.tensor([prompt]), **ask)[0]
        assert row[-12:].tolist() == expected[-12:].tolist()


@pytest.mark.parametrize("kind", BY_LENGTH)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_touches_nothing(random_checkpoint, pair, kind: str, side: str) -> None:
    theirs, ours = pair(random_checkpoint(**scaled(kind)))
    lengths, width = (20, 25, 60), 64
    tokens, mask = ids(3, width), torch.zeros(3, width, dtype=torch.long)
    spans = [slice(width - n, width) if side == "left" else slice(0, n) for n in lengths]
    for row, span in enumerate(spans):
        mask[row, span] = 1
    answer = ours(tokens, attention_mask=mask).logits
    for row, span in enumerate(spans):
        with torch.no_grad():
            alone = theirs(tokens[row : row + 1, span]).logits
        assert_same(answer[row : row + 1, span], alone)


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_a_prompt_in_chunks_is_that_prompt_at_once(
    random_checkpoint, pair, kind: str, monkeypatch
) -> None:
    """Beside others, with chunks that end on both sides of the boundary, and one after a turn."""
    theirs, ours = pair(random_checkpoint(**scaled(kind)))
    prompts = [ids(1, n, seed=n) for n in (18, 90, 3)]
    monkeypatch.setattr(model_runner, "CHUNK", 20)
    runner = ModelRunner(ours.network, ours.new_cache(3))
    found = runner.prefill([prompt[0].tolist() for prompt in prompts], [2, 0, 1])
    for prompt, logits in zip(prompts, found, strict=True):
        with torch.no_grad():
            assert_same(logits, theirs(prompt).logits[0, -1])
    turn = ids(1, 45, seed=9)
    with torch.no_grad():
        cache = theirs(prompts[2], use_cache=True).past_key_values
        expected = theirs(turn, past_key_values=cache).logits[0, -1]
    assert_same(runner.prefill([turn[0].tolist()], [1])[0], expected)


def break_scale(model: Any) -> None:
    model.network.rope_frequencies.scale = 1.0


def break_length(model: Any) -> None:
    model.network.rope_frequencies.follows_length = False


@pytest.mark.parametrize(
    ("kind", "mutate"),
    [
        ("yarn", break_scale),
        ("longrope", break_scale),
        ("longrope", break_length),
        ("dynamic", break_length),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mutation_turns_the_comparison_red(trained, kind, mutate, backend: str) -> None:
    theirs, ours = trained(scaled(kind, pairs=16), backend=backend)
    tokens = ids(1, 60, vocab=4000)
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert_same(ours(tokens).logits, expected)
    mutate(ours)
    with pytest.raises(AssertionError, match="relative error"):
        assert_same(ours(tokens).logits, expected)


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_cast_models_keep_exact_frequencies(random_checkpoint, kind: str) -> None:
    """Frequencies keep their 32 bits; in float64 they are those of float32."""
    folder = random_checkpoint(**scaled(kind))
    cast = lfm2_fast.load(folder, device="cpu", dtype="float32").to(torch.bfloat16)
    loaded = lfm2_fast.load(folder, device="cpu", dtype="bfloat16")
    assert torch.equal(cast(ids(1, 60)).logits, loaded(ids(1, 60)).logits)
    lengths = torch.tensor([3, 60])
    narrow = cast.network.rope_frequencies.of_lengths(lengths)
    wide = cast.to(torch.float64).network.rope_frequencies.of_lengths(lengths)
    assert (narrow.dtype, wide.dtype) == (torch.float32, torch.float64)
    assert torch.equal(narrow.double(), wide)


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_bf16_is_no_further_from_fp32_than_hugging_faces(
    trained, kind: str, as_close_to_fp32: Callable, tiny: Path
) -> None:
    from transformers import AutoTokenizer, Lfm2ForCausalLM

    exact, ours = trained(scaled(kind, pairs=16), dtype="bfloat16")
    theirs = Lfm2ForCausalLM.from_pretrained(tiny, config=exact.config, dtype=torch.bfloat16)
    text = (tiny / "heldout.txt").read_text(encoding="utf-8")
    found = AutoTokenizer.from_pretrained(tiny)(text, return_tensors="pt").input_ids
    as_close_to_fp32(exact, theirs.eval(), ours, found[:, : 8 * 170].view(8, 1, 170))


@pytest.mark.parametrize(
    "values",
    [
        {**scaled("dynamic"), "head_dim": 2},
        scaled("yarn", rope_theta=1.0),
        scaled("longrope", original_max_position_embeddings=1, factor=2.0),
        scaled("longrope", short_factor=[1e-45] * 8),
        scaled("longrope", long_factor=[1e-45] * 8),
    ],
)
def test_numbers_that_give_no_frequencies_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"rope_parameters \{.*no frequencies"):
        frequencies(values)
