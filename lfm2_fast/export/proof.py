"""Proof of an export: its logits and greedy tokens beside those of the eager model.

An export runs a text of 64 tokens at once and 32 tokens that it chooses itself, one at a time. The
eager model, in float32, runs the same 96 tokens. The error at a position is the norm of the
logits' difference, relative to the norm of the eager logits.

- With unquantized weights it is at most LIMIT at every position, and the tokens are equal.
- With rounded weights an error is expected. The eager model is rounded alike, and its error is
  measured. The export's may be FACTOR times as large, or LIMIT, over the prompt and over the
  steps. The same graph is proven with unquantized weights first, so that a small fault cannot hide
  there.
- With static shapes, as an NPU has them, a runtime may keep keys and values in float16. The same
  file is run on the same tokens. Its distance from the first run is at most that of the eager model
  in float16, which rounds these and all else, or LIMIT.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lfm2_fast.export.errors import ExportError

PROMPT, STEPS = 64, 32
# Largest relative error of an export whose weights are not rounded.
LIMIT = 1e-3
# OpenVINO's error is 1.01 times that of the rounding here. Other rules for scales differ more, and
# some runtimes round activations to 8 bits besides.
FACTOR = 2.0

TEXT = (
    "The server keeps one connection for each client and closes it after a minute without "
    "requests. To change this limit, edit the configuration file and start the service again. "
    "If the file has an error, the old values stay, and a message in the log names the line. "
    "A list of all settings, with their types and defaults, is printed by the command help. "
)


class Runs(Protocol):
    """Runs tokens, one text at a time, and returns logits; see ``Runtime.feed``."""

    def feed(self, ids: list[int], *, restart: bool = False, every: bool = False) -> torch.Tensor:
        """Return logits ``[rows, V]`` of the last token or of ``every`` one."""


@dataclass(frozen=True)
class Outcome:
    """Tokens and logits of an export: the prompt's, and those of the steps after it.

    ``ids`` are the 96 tokens, ``logits [96, V]`` float32 follow them.
    """

    ids: list[int]
    logits: torch.Tensor


@dataclass(frozen=True)
class Proof:
    """Measured errors: the largest, the mean squares' roots, and how many tokens are equal.

    ``expected_prompt_error`` and ``expected_steps_error`` are those of the eager model with
    rounded weights, or None.
    """

    largest_error: float
    prompt_error: float
    steps_error: float
    equal_tokens: int
    expected_prompt_error: float | None = None
    expected_steps_error: float | None = None


def proof_ids(tokenizer: Any) -> list[int]:
    """Return the ids of the proof's text, 64 of them."""
    ids: list[int] = []
    while len(ids) < PROMPT:
        ids += tokenizer(TEXT).input_ids
    return ids[:PROMPT]


def outcome(export: Runs, ids: list[int]) -> Outcome:
    """Run the prompt ``ids`` at once, then 32 greedy tokens of the export's own choice."""
    parts, written = [export.feed(ids, restart=True, every=True)], list(ids)
    if parts[0].shape[0] != len(ids):
        raise ExportError(f"the export gave {parts[0].shape[0]} rows of logits for {len(ids)}")
    for _ in range(STEPS):
        token = int(parts[-1][-1].argmax())
        written.append(token)
        parts.append(export.feed([token]))
    return Outcome(written, torch.cat(parts))


def prove(found: Outcome, expected: torch.Tensor) -> Proof:
    """Return the errors of an export with unquantized weights, beside ``expected [96, V]`` float32.

    Raises ExportError, which says where the export differs, if an error is over LIMIT or a token
    is another one. A token may be another one at a near-tie, which the errors decide.
    """
    errors = relative_errors(found, expected)
    bad = (errors > LIMIT).nonzero().flatten().tolist()
    if bad:
        raise ExportError(
            f"the export does not compute the model: at {_place(bad[0])} its logits differ by "
            f"{errors[bad[0]]:.3g}, relative to their norm, where at most {LIMIT:g} is rounding "
            f"({len(bad)} of {len(errors)} positions); {_suspect(errors)}"
        )
    chosen = expected[PROMPT - 1 : -1].argmax(-1).tolist()
    tokens = found.ids[PROMPT:]
    for step, (ours, theirs) in enumerate(zip(chosen, tokens, strict=True)):
        row = PROMPT - 1 + step
        gap = float(expected[row, ours] - expected[row, theirs])
        if gap > 2 * float((found.logits[row] - expected[row]).abs().max()):
            raise ExportError(
                f"the export chose token {theirs} as new token {step}, not {ours}, with logits "
                f"{gap:.3g} apart, which its errors do not explain"
            )
    return _proof(found, expected, errors)


def prove_rounded(
    found: Outcome, expected: torch.Tensor, rounded: Callable[[], torch.Tensor]
) -> Proof:
    """Return the errors of an export with rounded weights; ``rounded`` gives logits ``[96, V]``.

    Those are of the eager model, its weights rounded the same way. Raises ExportError if the
    export is off by more than FACTOR times as much.
    """
    errors = relative_errors(found, expected)
    usual = relative_errors(Outcome(found.ids, rounded()), expected)
    proof = _proof(found, expected, errors, usual)
    for part, error, own in (
        ("prompt", proof.prompt_error, proof.expected_prompt_error),
        ("steps", proof.steps_error, proof.expected_steps_error),
    ):
        assert own is not None
        if not error <= max(FACTOR * own, LIMIT):
            raise ExportError(
                f"the quantized export is further from the model than rounding explains: over the "
                f"{part} its logits differ by {error:.3g}, relative to their norm, where the "
                f"same rounding gives {own:.3g} here, and {FACTOR:g} times that is allowed; "
                f"it is furthest at {_place(int(errors.argmax()))}"
            )
    return proof


def prove_static(
    static: Runs, found: Outcome, halves: torch.Tensor, expected: torch.Tensor
) -> float:
    """Return the largest error of static shapes on the tokens of ``found``, relative to its logits.

    ``halves [96, V]`` are logits of the eager model in float16, ``expected`` in float32. Only the
    prompt's last token and the steps have logits. Raises ExportError if an error is larger than
    that of float16.
    """
    first, *steps = found.ids[:PROMPT], *found.ids[PROMPT:]
    rows = [static.feed(first, restart=True)]
    rows += [static.feed([token]) for token in steps]
    own = Outcome(found.ids[PROMPT - 1 :], found.logits[PROMPT - 1 :])
    errors = relative_errors(Outcome(own.ids, torch.cat(rows)), own.logits)
    halves, expected = halves[PROMPT - 1 :].float(), expected[PROMPT - 1 :]
    allowed = max(float(relative_errors(Outcome(own.ids, halves), expected).max()), LIMIT)
    if not float(errors.max()) <= allowed:
        place = PROMPT - 1 + int(errors.argmax())
        raise ExportError(
            f"static shapes change the result: at {_place(place)} logits differ by "
            f"{float(errors.max()):.3g} from those of dynamic shapes, relative to their norm, "
            f"where float16 explains {allowed:.3g}"
        )
    return float(errors.max())


def relative_errors(found: Outcome, expected: torch.Tensor) -> torch.Tensor:
    """Return the error at each position, ``[96]`` float64; infinite where a logit is NaN."""
    if found.logits.shape != expected.shape:
        raise ExportError(
            f"the export's logits are {tuple(found.logits.shape)}, the model's "
            f"{tuple(expected.shape)}"
        )
    wide = expected.double()
    errors = (found.logits.double() - wide).norm(dim=-1) / wide.norm(dim=-1)
    return errors.nan_to_num(nan=float("inf"))


def _proof(
    found: Outcome,
    expected: torch.Tensor,
    errors: torch.Tensor,
    usual: torch.Tensor | None = None,
) -> Proof:
    tokens = torch.tensor(found.ids[PROMPT:])
    equal = int((expected[PROMPT - 1 : -1].argmax(-1) == tokens).sum())
    own = (None, None) if usual is None else (_rms(usual[:PROMPT]), _rms(usual[PROMPT:]))
    return Proof(float(errors.max()), _rms(errors[:PROMPT]), _rms(errors[PROMPT:]), equal, *own)


def _rms(errors: torch.Tensor) -> float:
    return float(errors.square().mean().sqrt())


def _place(position: int) -> str:
    if position < PROMPT:
        return f"token {position} of the prompt"
    return f"step {position - PROMPT} after the prompt"


def _suspect(errors: torch.Tensor) -> str:
    """Name the part of the graph to look at: the first wrong logits depend on few parts."""
    bad = errors > LIMIT
    if bad[0]:
        return "the first token is wrong already, before any cache or position plays a part"
    if bad[:PROMPT].any():
        return "the first token is right: look at attention, positions and convolutions"
    return "the prompt is right: look at the caches between calls"
