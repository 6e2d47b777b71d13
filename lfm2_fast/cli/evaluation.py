"""Loss of a model on a text, and the distance of its predictions from another's."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from lfm2_fast.cli.session import summary
from lfm2_fast.cli.terminal import Terminal
from lfm2_fast.engine.decode import LogitsError, why_not_finite
from lfm2_fast.hf.causal_lm import Lfm2ForCausalLM
from lfm2_fast.hf.load import load
from lfm2_fast.hf.loading import check_options
from lfm2_fast.text.tokenizer import load_tokenizer
from lfm2_fast.weights.hub import hub_options


@dataclass(frozen=True)
class Quality:
    """Means over the predicted ``tokens`` of a text.

    ``loss`` is in nats. ``kl`` is the divergence of the model's distributions from the reference's,
    in nats. ``agreement`` is the share of tokens where both have the same most likely token. Both
    are None without a reference.
    """

    tokens: int
    loss: float
    reference_loss: float | None = None
    kl: float | None = None
    agreement: float | None = None

    @property
    def perplexity(self) -> float:
        """Perplexity: ``exp(loss)``."""
        return math.exp(self.loss)


def load_and_evaluate(
    terminal: Terminal,
    name: str,
    text: str,
    *,
    window: int,
    reference: str | None = None,
    dtype: str = "auto",
    quantization: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Load and ``evaluate`` a checkpoint on a text. Return the result, ready for JSON.

    ``reference`` is the dtype of the same weights to compare with. All other options go to
    ``load``. Raises what ``load`` and ``evaluate`` raise, and ValueError for an empty text or a
    reference that is not wider.
    """
    if not text:
        raise ValueError("the text is empty: give a file with text")
    check_options(dtype=dtype, quantization=quantization, **options)
    if reference is not None:
        try:
            check_options(dtype=reference, **options)
        except ValueError as error:
            raise ValueError(f"--reference: {error}") from error
    tokenizer = load_tokenizer(name, **hub_options(options))
    # Only pieces run, so the whole text may be longer than the context.
    encoded = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)
    model = load(name, dtype=dtype, quantization=quantization, **options)
    terminal.note(summary(model))
    other = None if reference is None else load(name, dtype=reference, **options)
    if other is not None and other.config.quantization is not None:
        raise ValueError(
            f"{name} is stored in {other.config.quantization} itself: there is nothing wider to "
            "compare with; leave --reference out"
        )
    found = evaluate(model, encoded.input_ids[0], window=window, reference=other)
    facts = {**asdict(found), "perplexity": found.perplexity}
    return {fact: value for fact, value in facts.items() if value is not None}


@torch.no_grad()
def evaluate(
    model: Lfm2ForCausalLM,
    ids: torch.Tensor,
    *,
    window: int,
    reference: Lfm2ForCausalLM | None = None,
) -> Quality:
    """Evaluate ``ids [T]`` teacher-forced, in independent pieces of ``window`` tokens.

    Each piece predicts all its tokens but the first. An incomplete last piece is left out. A
    terminal shows progress. Raises ValueError for a text that is too short, and LogitsError, which
    names the piece, for a loss that is NaN or infinite.
    """
    if window < 2:
        raise ValueError(f"window must be at least 2, got {window}")
    pieces = ids[: len(ids) // window * window].view(-1, window)
    if not len(pieces):
        raise ValueError(
            f"the text has {len(ids)} tokens, fewer than the window of {window}: lower --window, "
            "or give a longer text"
        )
    each = torch.zeros(len(pieces), 4, dtype=torch.float64, device=model.device)
    progress = tqdm(pieces, desc="evaluating", unit="piece", delay=3.0, leave=False, disable=None)
    for sums, piece in zip(each, progress, strict=True):
        after = piece[None, 1:]
        scores = _log_probabilities(model, piece)
        sums[0] -= scores.gather(-1, after[..., None].to(scores.device)).sum(dtype=torch.float64)
        if reference is not None:
            exact = _log_probabilities(reference, piece).to(scores.device)
            sums[1] -= exact.gather(-1, after[..., None].to(exact.device)).sum(dtype=torch.float64)
            sums[2] += (exact.exp() * (exact - scores)).sum(dtype=torch.float64)
            sums[3] += (exact.argmax(-1) == scores.argmax(-1)).sum()
    tokens = len(pieces) * (window - 1)
    _check_losses(each[:, 0], model, window)
    if reference is not None:
        _check_losses(each[:, 1], reference, window)
    loss, *others = (each.sum(0) / tokens).tolist()
    return Quality(tokens, loss, *others) if reference is not None else Quality(tokens, loss)


def _check_losses(losses: torch.Tensor, model: Lfm2ForCausalLM, window: int) -> None:
    """Raise LogitsError if a piece's loss ``[pieces]`` is NaN or infinite."""
    for piece, loss in enumerate(losses.tolist()):
        if not math.isfinite(loss):
            first, dtype = piece * window, str(model.dtype).removeprefix("torch.")
            raise LogitsError(
                f"the loss of {model.name_or_path} in {dtype} over tokens {first} to "
                f"{first + window - 1} of the text is {loss}: {why_not_finite(model.dtype)}"
            )


def _log_probabilities(model: Lfm2ForCausalLM, piece: torch.Tensor) -> torch.Tensor:
    """Return ``[1, T - 1, V]`` float32, for every token after the first."""
    return model(piece[None]).logits[:, :-1].float().log_softmax(-1)
