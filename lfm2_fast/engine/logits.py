"""Changes to logits outside of the sampling operation, and log-probabilities of chosen tokens."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from lfm2_fast.cache.batch import on_device
from lfm2_fast.engine.request import Hook, LogProbs, Row


def adjusted(logits: torch.Tensor, rows: Sequence[tuple[Row, int]]) -> torch.Tensor:
    """Return ``logits [B, V]`` in float32, with all changes of the rows' requests.

    ``rows`` is in the order of the batch. Penalties come first, then the bias, the constraint,
    ``min_tokens`` and the hook. If a constraint or a hook raises, or a hook returns another shape,
    the row's ``error`` is set. Its logits become NaN, so it has no token to choose.
    """
    prepare(row for row, _ in rows)
    changed = [(row, place) for row, place in rows if row.request.changes_logits]
    if not changed:
        return logits
    logits = logits.float().clone()
    for row, place in changed:
        request, own = row.request, logits[place]
        counts = Counter(row.written)
        if counts and (request.presence_penalty or request.frequency_penalty):
            often = on_device(list(counts.values()), own.dtype, own.device)
            less = request.presence_penalty + request.frequency_penalty * often
            own[_at(list(counts), own)] -= less
        if request.logit_bias:
            bias = on_device(list(request.logit_bias.values()), own.dtype, own.device)
            own[_at(list(request.logit_bias), own)] += bias
    _constrain(logits, changed)
    for row, place in changed:
        request, own = row.request, logits[place]
        try:
            if len(row.written) < request.min_tokens and request.eos:
                _without_end(row, own)
            if request.hook is not None and row.error is None:
                own.copy_(_hooked(request.hook, row, own))
        except Exception as error:
            row.error = error
        if row.error is not None:
            own.fill_(math.nan)
    return logits


def prepare(rows: Iterable[Row]) -> None:
    """Let the constraints of rows find their allowed tokens. Their errors are raised later, by
    ``allowed``.
    """
    for row in rows:
        if row.constraint is not None:
            with contextlib.suppress(Exception):
                row.constraint.prepare(row.written)


def _constrain(logits: torch.Tensor, rows: Sequence[tuple[Row, int]]) -> None:
    """Set ``logits [B, V]`` of forbidden tokens to -inf, in one operation for all rows."""
    places, masks = [], []
    for row, place in rows:
        try:
            mask = None if row.constraint is None else row.constraint.allowed(row.written)
        except Exception as error:
            row.error = error
            continue
        if mask is not None:
            places.append(place)
            masks.append(mask)
    if not masks:
        return
    words = torch.stack(masks).to(logits.device, non_blocking=True)
    # torch's platforms are little-endian, so the bytes of words are in the order of the tokens. A
    # table look-up by byte and an addition are several times faster than unpacking bits.
    byte = torch.arange(256, device=logits.device)[:, None]
    allows = (byte >> torch.arange(8, device=logits.device)) & 1
    terms = torch.where(allows == 1, 0.0, -math.inf)
    added = torch.nn.functional.embedding(words.view(torch.uint8).int(), terms)
    added = added.view(len(masks), -1)[:, : logits.shape[1]]
    if places == list(range(len(logits))):
        logits += added
    else:
        logits.index_add_(0, _at(places, logits), added)


def _without_end(row: Row, own: torch.Tensor) -> None:
    """Forbid end tokens before ``min_tokens``, unless a constraint allows nothing else."""
    without = own.index_fill(0, _at(list(row.request.eos), own), -math.inf)
    if row.constraint is None or bool((without > -math.inf).any()):
        own.copy_(without)


def _hooked(hook: Hook, row: Row, own: torch.Tensor) -> torch.Tensor:
    made = hook(row.text, own)
    if made.shape != own.shape:
        raise ValueError(
            f"hook returned logits of shape {tuple(made.shape)}, expected {tuple(own.shape)}: "
            "those of one row"
        )
    return made


def log_probs(logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[LogProbs]:
    """Return the log-probabilities of ``tokens`` in ``logits [B, V]``, and of each row's best
    ``counts[i]``.
    """
    scores = logits.float().log_softmax(-1)
    own = scores.gather(1, _at(list(tokens), scores)[:, None])[:, 0].tolist()
    best = scores.topk(max(max(counts, default=0), 1))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        LogProbs(value, tuple(zip(ids[:count], values[:count], strict=True)))
        for value, (ids, values), count in zip(own, pairs, counts, strict=True)
    ]


def requested_log_probs(
    rows: Sequence[tuple[Row, int]], tokens: Sequence[int], logits: torch.Tensor
) -> dict[Row, LogProbs]:
    """Return the log-probabilities of rows that ask for them, by ``logits [B, V]``.

    Each row has a place, which is that of its logits and of its new token in ``tokens``.
    """
    asking = [(row, at) for row, at in rows if row.request.logprobs is not None]
    if not asking:
        return {}
    places = [at for _, at in asking]
    counts = [row.request.logprobs or 0 for row, _ in asking]
    # A row without a token to choose has the log-probability of token 0, which is NaN.
    own = [max(tokens[at], 0) for at in places]
    found = log_probs(logits[places], own, counts)
    return dict(zip((row for row, _ in asking), found, strict=True))


def _at(tokens: list[int], like: torch.Tensor) -> torch.Tensor:
    return on_device(tokens, torch.int64, like.device)
