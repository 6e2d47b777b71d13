"""The proof finds what was found in real exports: wrong wiring, caches, positions, rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lfm2_fast.export.errors import ExportError
from lfm2_fast.export.proof import (
    FACTOR,
    LIMIT,
    STEPS,
    Outcome,
    outcome,
    prove,
    prove_rounded,
    prove_static,
    relative_errors,
)
from lfm2_fast.export.rounding import Rounding, round_weights
from tests.export.conftest import Here, Model, load_eager, logits_of

INT4 = Rounding(4, 64, tables=8)


def prove_beside(tiny: Path, model: Model, ids: list[int]) -> None:
    found = outcome(Here(model), ids)
    prove(found, logits_of(load_eager(tiny), found.ids))


def test_the_model_itself_passes(tiny: Path, ids: list[int]) -> None:
    found = outcome(Here(load_eager(tiny)), ids)
    proof = prove(found, logits_of(load_eager(tiny), found.ids))
    assert proof.largest_error < 1e-5 and proof.equal_tokens == STEPS


def test_a_head_on_the_wrong_norm_is_found(tiny: Path, ids: list[int]) -> None:
    model = load_eager(tiny)
    seen: list[torch.Tensor] = []
    first = model.network.layers[0]
    # As ONNX Runtime GenAI 0.18 connects it: the head reads the first layer's feed-forward norm.
    first.register_forward_hook(lambda mod, args, out: seen.append(out))
    last = model.network.layers[-1]
    last.register_forward_hook(lambda mod, args, out: seen[-1][-len(out) :])
    with pytest.raises(ExportError, match="token 0 of the prompt.*the first token is wrong"):
        prove_beside(tiny, model, ids)


def test_wrong_positions_are_found(tiny: Path, ids: list[int]) -> None:
    model = load_eager(tiny)
    model.network.rope_frequencies.inv_freq.mul_(1.2)
    with pytest.raises(ExportError, match="token [1-9]\\d* of .* look at attention, positions"):
        prove_beside(tiny, model, ids)


def test_a_lost_cache_is_found(tiny: Path, ids: list[int]) -> None:
    class Forgets(Here):
        def feed(self, ids: list[int], *, restart: bool = False, every: bool = False):  # type: ignore[no-untyped-def]
            return super().feed(ids, restart=True, every=every)

    found = outcome(Forgets(load_eager(tiny)), ids)
    with pytest.raises(ExportError, match="step 0 after the prompt.*look at the caches"):
        prove(found, logits_of(load_eager(tiny), found.ids))


def test_another_token_than_the_logits_explain_is_found(tiny: Path, ids: list[int]) -> None:
    found = outcome(Here(load_eager(tiny)), ids)
    other = Outcome([*found.ids[:80], 5, *found.ids[81:]], found.logits)
    expected = found.logits.clone()
    with pytest.raises(ExportError, match="chose token 5 as new token 16"):
        prove(other, expected)


def test_missing_logits_are_found(tiny: Path, ids: list[int]) -> None:
    found = outcome(Here(load_eager(tiny)), ids)
    broken = found.logits.clone()
    broken[3, 7] = float("nan")
    with pytest.raises(ExportError, match="token 3 of the prompt its logits differ by inf"):
        prove(Outcome(found.ids, broken), found.logits)
    with pytest.raises(ExportError, match="gave 1 rows of logits for 64"):
        outcome(LastRow(load_eager(tiny)), ids)


class LastRow(Here):
    def feed(self, ids: list[int], *, restart: bool = False, every: bool = False) -> torch.Tensor:
        return super().feed(ids, restart=restart)


def quantized(tiny: Path, rounding: Rounding) -> Model:
    model = load_eager(tiny)
    round_weights(model.network, rounding)
    return model


@pytest.mark.parametrize("rounding", [Rounding(8), INT4], ids=["int8", "int4"])
def test_rounding_is_allowed_its_own_error(tiny: Path, ids: list[int], rounding: Rounding) -> None:
    found = outcome(Here(quantized(tiny, rounding)), ids)
    expected = logits_of(load_eager(tiny), found.ids)
    own = logits_of(quantized(tiny, rounding), found.ids)
    proof = prove_rounded(found, expected, lambda: own)
    assert proof.expected_steps_error is not None
    assert LIMIT < proof.steps_error < 1.01 * proof.expected_steps_error


def test_coarser_weights_than_asked_for_are_found(tiny: Path, ids: list[int]) -> None:
    found = outcome(Here(quantized(tiny, INT4)), ids)
    expected = logits_of(load_eager(tiny), found.ids)
    own = logits_of(quantized(tiny, Rounding(8)), found.ids)
    with pytest.raises(ExportError, match=f"and {FACTOR:g} times that is allowed"):
        prove_rounded(found, expected, lambda: own)


def test_static_shapes_may_round_to_float16_and_no_more(tiny: Path, ids: list[int]) -> None:
    right = Here(load_eager(tiny))
    found = outcome(right, ids)
    expected = found.logits
    halves = expected + 0.01 * expected.norm(dim=-1, keepdim=True) / expected.shape[1] ** 0.5
    assert prove_static(right, found, halves, expected) < 1e-5

    def off(by: float) -> Callable[[], float]:
        class Off(Here):
            def feed(self, *args, **kwargs):  # type: ignore[no-untyped-def]
                return super().feed(*args, **kwargs) * (1 + by)

        return lambda: prove_static(Off(right.model), found, halves, expected)

    assert off(0.009)() == pytest.approx(0.009, rel=1e-3)
    with pytest.raises(
        ExportError, match="static shapes change the result: at .* 0.011 .* explains 0.01"
    ):
        off(0.011)()


def test_errors_are_relative_to_the_norm() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    found = Outcome([0, 0], torch.tensor([[3.0, 4.5], [0.0, 2.0]]))
    assert relative_errors(found, expected).tolist() == [0.1, 0.0]
    with pytest.raises(ExportError, match=r"logits are \(2, 2\), the model's \(2, 3\)"):
        relative_errors(found, torch.zeros(2, 3))
