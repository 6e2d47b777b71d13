"""The measure of quality, and by it what 8-bit matrices lose on trained weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

import lfm2_fast
from lfm2_fast.cli.app import app
from lfm2_fast.cli.evaluation import Quality, evaluate


@pytest.fixture(scope="module")
def text(tiny: Path) -> torch.Tensor:
    """The held-out text in tokens."""
    held_out = (tiny / "heldout.txt").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    return tokenizer(held_out, add_special_tokens=False, return_tensors="pt").input_ids[0]


@pytest.mark.slow
def test_the_loss_is_hugging_faces(tiny: Path, text) -> None:
    stored = json.loads((tiny / "heldout.json").read_text(encoding="utf-8"))
    model = lfm2_fast.load(tiny, device="cpu", dtype="float32")
    found = evaluate(model, text, window=stored["window"])
    assert found.tokens == stored["tokens"]
    assert found.loss == pytest.approx(stored["loss"], rel=5e-5)
    assert found.kl is None


def both_dtypes(tiny: Path, text, quantization: str) -> list[Quality]:
    """Return the results of bfloat16 and of the quantized model beside float32."""
    exact = lfm2_fast.load(tiny, device="cpu", dtype="float32")
    return [
        evaluate(
            lfm2_fast.load(tiny, device="cpu", dtype="bfloat16", quantization=each),
            text,
            window=256,
            reference=exact,
        )
        for each in (None, quantization)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1024, pytest.param(5120, marks=pytest.mark.nightly)])
def test_eight_bits_lose_little(tiny: Path, text, tokens: int) -> None:
    """Within 1 percent of bfloat16's loss; far nearer to float32 than to anything else."""
    wide, narrow = both_dtypes(tiny, text[:tokens], "int8")
    assert narrow.loss < 1.01 * wide.loss
    assert 0 <= wide.kl < narrow.kl < 0.02
    assert narrow.agreement > 0.93
    assert wide.reference_loss == narrow.reference_loss


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1024, pytest.param(5120, marks=pytest.mark.nightly)])
def test_four_bits_lose_little(tiny: Path, text, tokens: int) -> None:
    """Within 2.5 percent of bfloat16's loss."""
    wide, narrow = both_dtypes(tiny, text[:tokens], "int4")
    assert narrow.loss < 1.025 * wide.loss
    # The loss of GGUF's rule with an exact head, and room for tokens rounded to 8 bits.
    assert 0.01 < narrow.kl < 0.05
    assert narrow.agreement > 0.85


def test_a_reference_that_differs_shows(tiny: Path, text) -> None:
    model = lfm2_fast.load(tiny, device="cpu", dtype="float32")
    same = evaluate(model, text[:600], window=200, reference=model)
    assert same.kl == 0 and same.agreement == 1 and same.loss == same.reference_loss
    other = lfm2_fast.load(tiny, device="cpu", dtype="float32")
    other.network.layers[0].feed_forward.down_proj.weight.zero_()
    changed = evaluate(other, text[:600], window=200, reference=model)
    assert changed.kl > 0.1 and changed.agreement < 0.9
    assert changed.reference_loss == pytest.approx(same.loss)


def test_a_nan_loss_is_reported_with_its_piece(tiny: Path, text, breaking) -> None:
    """The same error comes if only the reference's loss is NaN."""
    model = lfm2_fast.load(tiny, device="cpu", dtype="float32")
    token = next(int(token) for token in text[450:550] if token not in text[:450])
    broken = lfm2_fast.load(breaking(token), device="cpu", dtype="bfloat16")
    place = int((text == token).nonzero()[0]) // 50 * 50
    for given, reference in ((broken, None), (broken, model), (model, broken)):
        message = f"bfloat16 over tokens {place} to {place + 49} of the text is nan: weights are"
        with pytest.raises(lfm2_fast.LogitsError, match=message):
            evaluate(given, text[:600], window=50, reference=reference)
    assert evaluate(broken, text[:450], window=50).loss > 0


@pytest.mark.parametrize(("window", "message"), [(1, "at least 2"), (700, "fewer than the window")])
def test_wrong_windows_are_refused(tiny: Path, text, window: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(lfm2_fast.load(tiny, device="cpu"), text[:600], window=window)


@pytest.mark.slow
def test_the_command(tiny: Path, tmp_path: Path) -> None:
    text = (tiny / "heldout.txt").read_text(encoding="utf-8")[:4000]
    (tmp_path / "text").write_text(text, encoding="utf-8")
    call = ["eval", str(tiny), "--text", str(tmp_path / "text"), "--window", "100"]
    done = CliRunner().invoke(app, [*call, "--quantization", "int8", "--reference", "float32"])
    assert done.exit_code == 0, done.output
    assert "quality.agreement: 0.9" in done.stdout
    done = CliRunner().invoke(app, [*call, "--json"])
    assert set(json.loads(done.stdout)["quality"]) == {"tokens", "loss", "perplexity"}


def test_an_empty_text_is_named_and_nothing_is_loaded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lfm2_fast.weights.checkpoint.load_weights", None)
    (tmp_path / "empty").write_text("\n")
    done = CliRunner().invoke(app, ["eval", str(tiny), "--text", str(tmp_path / "empty")])
    assert str(done.exception) == "the text is empty: give a file with text"
