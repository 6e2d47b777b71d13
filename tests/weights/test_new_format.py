"""A format that no implementation knows: every backend falls back to what the format means."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import lfm2_fast
from lfm2_fast.ops.select import why_not
from lfm2_fast.weights import formats
from lfm2_fast.weights.formats import Format, Parts, Projection
from tests.batches import logits_of

# A prompt beside a short one, then steps of one token.
STEPS = [{1: 40, 0: 3}, {0: 1, 1: 1}, {1: 1}]


class HalfPairs(Format):
    """A float16 number and what float16 leaves of it, which is another float16 number."""

    name = "half_pairs"
    file = "model.half_pairs.safetensors"

    def parts(self, shape: tuple[int, ...]) -> Parts:
        return {"": (shape, torch.float16), "_rest": (shape, torch.float16)}

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = weight.float()
        numbers = wide.half()
        return numbers, (wide - numbers.float()).half()

    def dequantize(self, parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        numbers, rest = parts
        return (numbers.float() + rest.float()).to(dtype)


@pytest.fixture
def half_pairs(monkeypatch: pytest.MonkeyPatch) -> Format:
    made = HalfPairs()
    monkeypatch.setitem(formats.FORMATS, made.name, made)
    return made


@pytest.mark.interpreter
@pytest.mark.parametrize("backend", ["eager", "native", "triton"])
def test_every_backend_runs_it(
    random_checkpoint, half_pairs, kernel_device, within_budget, backend
) -> None:
    if backend == "triton" or kernel_device.type == "cpu":
        reason = why_not(backend, kernel_device, torch.float32)
        if reason is not None:
            pytest.skip(reason)
    folder = random_checkpoint(tie_word_embeddings=False)

    def load(backend: str, dtype: str) -> lfm2_fast.Lfm2ForCausalLM:
        options = {"device": kernel_device, "quantization": half_pairs.name}
        return lfm2_fast.load(folder, dtype=dtype, backend=backend, **options)

    model = load(backend, "float32")
    matrices = [part for part in model.modules() if isinstance(part, Projection)]
    assert matrices and all(part.format is half_pairs for part in matrices)
    exact, plain = (
        logits_of(load("eager", "float64"), STEPS),
        logits_of(load("eager", "float32"), STEPS),
    )
    for ours, a, b in zip(logits_of(model, STEPS), exact, plain, strict=True):
        within_budget(ours, a, b)


def test_its_numbers_are_those_of_the_dense_model(random_checkpoint, half_pairs) -> None:
    folder, ids = random_checkpoint(), torch.arange(20, 60)[None]
    pairs = lfm2_fast.load(folder, device="cpu", quantization=half_pairs.name, dtype="float64")
    dense = lfm2_fast.load(folder, device="cpu", dtype="float64")
    matrices = {
        name: part for name, part in pairs.network.named_modules() if isinstance(part, Projection)
    }
    for name, part in dense.network.named_modules():
        if isinstance(part, Projection):
            part.weight.data = matrices[name].dequantized(torch.float64)
    assert torch.equal(pairs(ids).logits, dense(ids).logits)


def test_it_is_saved_and_loaded(tiny, half_pairs, tmp_path) -> None:
    model = lfm2_fast.load(tiny, device="cpu", quantization=half_pairs.name)
    model.save_pretrained(tmp_path)
    assert (tmp_path / half_pairs.file).is_file()
    again = lfm2_fast.load(tmp_path, device="cpu")
    assert again.network.config.quantization == half_pairs.name
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
