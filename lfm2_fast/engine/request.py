"""Request: a prompt with the settings of its continuations. Event: a result of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from lfm2_fast.ops.sampling import SamplingParams
from lfm2_fast.weights.adapter_set import LoadedAdapter

# Changes a row's logits ``[V]`` float32, given its text: prompt and new tokens.
Hook = Callable[[Sequence[int], torch.Tensor], torch.Tensor]


class Constraint(Protocol):
    """Rule that allows some of the tokens as the next one of a continuation."""

    def prepare(self, written: Sequence[int]) -> None:
        """Begin to find the tokens that may follow ``written``, while the model runs."""

    def allowed(self, written: Sequence[int]) -> torch.Tensor | None:
        """Return a bit for each token that may follow ``written``, None if all may.

        Token ``i`` is bit ``i % 32`` of word ``i // 32``, of ``[ceil(V / 32)]`` int32 on the host.
        """


@dataclass(frozen=True, eq=False)
class Request:
    """Prompt of at least one token, and the settings of its continuations.

    ``sampling`` chooses the tokens. A draw depends only on ``seed``, the continuation's index among
    the request's ``n``, and the token's position. ``eos`` are the tokens that end the text, from
    ``min_tokens`` new ones on. ``max_tokens`` limits the new tokens (None: the context does).
    ``stop`` is called after every new token, with the new tokens so far. ``first_row`` is added to
    the index in draws, so that requests with one seed draw different tokens.

    ``logit_bias`` is added to the logits of single tokens. ``presence_penalty`` is subtracted from
    those of new tokens that came before, ``frequency_penalty`` as often as each came.
    ``constraint`` is called for each continuation and makes its ``Constraint``, which forbids
    tokens. ``hook`` then changes the logits freely. ``logprobs`` asks for the log-probability of
    each new token and of this many most likely ones, from the model's own logits.
    ``prompt_logprobs`` asks for those of the prompt's tokens.

    Requests of lower ``priority`` run first, equal ones in their order. ``deadline`` is a time of
    ``time.monotonic``. Only requests of equal ``salt`` share pages. With ``stream`` each token
    comes as soon as possible: steps are launched one by one.

    ``prompt_lookup`` is the largest draft in tokens; 0 means none, and None the engine's number. A
    draft is the text that followed an earlier place with the same last ``lookup_ngram`` tokens, or
    fewer. ``assisted`` lets the engine's assistant draft, if it has one. One step verifies a draft.
    The text stays the same, and the engine drafts only if that saves time.

    ``adapter`` names a LoRA adapter that the model has loaded; None is the active one, if any is.

    An exception in ``stop``, ``constraint`` or ``hook`` ends only its continuation. The last event
    has the exception.
    """

    prompt: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos: Sequence[int] = ()
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: Callable[[Sequence[int]], bool] | None = None
    seed: int = 0
    first_row: int = 0
    n: int = 1
    logit_bias: Mapping[int, float] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    constraint: Callable[[], Constraint] | None = None
    hook: Hook | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    deadline: float | None = None
    salt: bytes = b""
    stream: bool = False
    prompt_lookup: int | None = None
    lookup_ngram: int = 3
    assisted: bool = True
    adapter: str | None = None

    def __post_init__(self) -> None:
        # A caller's lists may grow while the request runs.
        object.__setattr__(self, "prompt", tuple(self.prompt))
        object.__setattr__(self, "eos", tuple(self.eos))

    def check(self, vocab_size: int, max_length: int) -> None:
        """Raise ValueError, with field and value, if the request cannot run."""
        length = len(self.prompt)
        if length < 1:
            raise ValueError("prompt has no tokens: give at least one")
        wrong = [t for t in (*self.prompt, *(self.logit_bias or ())) if not 0 <= t < vocab_size]
        if wrong:
            raise ValueError(
                f"token {wrong[0]} is not in this model's vocabulary of {vocab_size}; is the "
                "tokenizer another model's?"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if length + (self.max_tokens or 1) > max_length:
            raise ValueError(
                f"a prompt of {length} tokens and {self.max_tokens or 1} new ones do not fit into "
                f"the context of {max_length}; lower max_tokens or shorten the prompt"
            )
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be a whole number from 0 to 2**64 - 1, got {self.seed!r}")
        if (self.prompt_lookup or 0) < 0 or self.lookup_ngram < 1:
            raise ValueError(
                f"prompt_lookup must be at least 0 and lookup_ngram at least 1, got "
                f"{self.prompt_lookup} and {self.lookup_ngram}"
            )
        if self.min_tokens < 0 or self.min_tokens > (self.max_tokens or max_length):
            raise ValueError(
                f"min_tokens must be from 0 to max_tokens={self.max_tokens}, got {self.min_tokens}"
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= vocab_size:
                raise ValueError(f"{name} must be between 0 and {vocab_size}, got {value}")
        numbers = {"presence_penalty": self.presence_penalty}
        numbers |= {"frequency_penalty": self.frequency_penalty}
        numbers |= {f"logit_bias of {t}": bias for t, bias in (self.logit_bias or {}).items()}
        for name, value in numbers.items():
            if math.isnan(value) or value == math.inf:
                raise ValueError(f"{name} must be a number, got {value}")

    @property
    def changes_every_step(self) -> bool:
        """Return True if every step's logits are changed before ``sampling``."""
        penalties = self.presence_penalty or self.frequency_penalty
        return bool(self.logit_bias or penalties or self.hook or self.constraint)

    @property
    def changes_logits(self) -> bool:
        """Return True if some step's logits are changed before ``sampling``."""
        return self.changes_every_step or self.min_tokens > 0


@dataclass(eq=False)
class Row:
    """One continuation of a request, from its admission to its end, preemptions included.

    ``index`` is its place among the request's ``n``. ``written`` are the new tokens that the host
    has read; ``launched`` counts those whose steps were launched. ``pinned`` is the slot of a
    caller's cache that it must have, or None. ``finish_reason`` is "stop", "length", "cancelled",
    "deadline" or "error" at the end. ``admitted`` is True once the row has had a slot. ``digests``
    are those of its text's first pages, as the prefix index hashes them. ``adapter`` is the one
    that it began with, which stays loaded until it ends. ``prompt_logprobs`` are
    those of the prompt's tokens so far, until an event has them.
    """

    id: int
    request: Request
    index: int
    limit: int
    arrival: int
    adapter: LoadedAdapter | None = None
    slot: int = -1
    pinned: int | None = None
    written: list[int] = field(default_factory=list)
    launched: int = 0
    ended: bool = False
    finish_reason: str | None = None
    error: Exception | None = None
    cached_tokens: int = 0
    admitted: bool = False
    arrived: float = 0.0
    last_token: float = 0.0
    digests: list[bytes] = field(default_factory=list)
    prompt_logprobs: list[LogProbs | None] | None = None
    ends: frozenset[int] = field(init=False)
    constraint: Constraint | None = field(init=False)

    def __post_init__(self) -> None:
        self.ends = frozenset(self.request.eos)
        make = self.request.constraint
        self.constraint = None if make is None else make()

    @property
    def needs_logits(self) -> bool:
        """Return True if its next step must stop at the logits."""
        request = self.request
        early = request.min_tokens > self.launched
        return request.logprobs is not None or early or request.changes_every_step

    @property
    def entry(self) -> int:
        """Entry of its adapter in the stacks, 0 for none."""
        return 0 if self.adapter is None else self.adapter.entry

    @property
    def salt(self) -> bytes:
        """Adapter's number and the request's salt. Only texts of equal salt share pages."""
        number = 0 if self.adapter is None else self.adapter.number
        return number.to_bytes(8, "little") + self.request.salt

    @property
    def start(self) -> int:
        """Number of prompt tokens."""
        return len(self.request.prompt)

    @property
    def length(self) -> int:
        """Number of tokens of the text: prompt and new tokens."""
        return self.start + len(self.written)

    @property
    def text(self) -> Sequence[int]:
        """Prompt and the new tokens."""
        prompt = self.request.prompt
        return [*prompt, *self.written] if self.written else prompt


@dataclass(frozen=True)
class LogProbs:
    """Log-probability of a token, and the most likely tokens with theirs, best first."""

    token: float
    best: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Event:
    """New token of a continuation, or its end, or both.

    ``id`` is the request's, ``index`` the continuation's place among its ``n``. ``token`` is None
    if it ends without another token. ``finish_reason`` is set on its last event, and ``error`` if
    it failed. ``prompt_logprobs`` come with the first event; the first token has none.
    """

    id: int
    index: int
    token: int | None
    finish_reason: str | None = None
    logprobs: LogProbs | None = None
    prompt_logprobs: tuple[LogProbs | None, ...] | None = None
    cached_tokens: int = 0
    error: Exception | None = None
