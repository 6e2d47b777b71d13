"""Conversion of a request's fields and the defaults to the engine's parameters."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from lfm2_fast.engine.request import Hook, Request
from lfm2_fast.hf.generation_args import resolve_args
from lfm2_fast.ops.sampling import SamplingParams
from lfm2_fast.server.errors import ApiError, of_value_error, refused
from lfm2_fast.server.protocol import Sampled
from lfm2_fast.text.presets import sampling


@dataclass(frozen=True)
class Defaults:
    """Default parameters of requests: the checkpoint's, else its family's preset.

    ``words`` describes them and their origin. ``eos`` are the tokens that end a text.
    """

    sampling: SamplingParams
    eos: tuple[int, ...]
    words: str

    @classmethod
    def of(
        cls, name: str, file: Mapping[str, Any], vocab_size: int, preset: str | None = None
    ) -> Defaults:
        """Return the defaults for a checkpoint's name and generation config. Raises ValueError."""
        arguments, words = sampling(name, preset=preset, file=file)
        asked = resolve_args(arguments, None, file, vocab_size)
        return cls(asked.sampling, asked.eos_token_id, words)


def sampling_of(body: Sampled, defaults: SamplingParams) -> SamplingParams:
    """Return the sampling parameters of a body; a temperature of 0 is greedy."""
    values = {field.name: getattr(defaults, field.name) for field in fields(SamplingParams)}
    if not defaults.do_sample:
        # Without a draw, filters have no effect.
        values |= {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        value = getattr(body, name)
        if value is not None:
            values[name] = value
    values["do_sample"] = values["temperature"] > 0
    # A smaller temperature also leaves one token, and its reciprocal must be finite.
    values["temperature"] = max(values["temperature"], 1e-4) if values["do_sample"] else 1.0
    values["top_k"] = max(values["top_k"], 0)
    # A top-p of 0 would leave no token, but the best one always stays.
    values["top_p"] = max(values["top_p"], 1e-9)
    return SamplingParams(**values)


def stops_of(body: Sampled) -> tuple[str, ...]:
    """Return the strings that end a body's text."""
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def biases_of(body: Sampled, vocab_size: int) -> dict[int, float] | None:
    """Return the bias of each token. Raises ApiError for keys that are not token ids."""
    if not body.logit_bias:
        return None
    found = {}
    for key, value in body.logit_bias.items():
        if not (key.isascii() and key.isdigit() and int(key[:12]) < vocab_size):
            raise ApiError(
                f"logit_bias has the key {key[:40]!r}; keys are token ids from 0 to "
                f"{vocab_size - 1}, as strings",
                param="logit_bias",
                code="invalid_value",
            )
        found[int(key)] = value
    return found


def only(allowed: Sequence[int], vocab_size: int) -> Hook:
    """Return a hook that forbids all other tokens.

    Raises ApiError for ids out of the vocabulary, and for an empty list.
    """
    wrong = [token for token in allowed if token >= vocab_size]
    if wrong or not allowed:
        raise ApiError(
            f"allowed_token_ids must hold ids from 0 to {vocab_size - 1}, got "
            f"{wrong[0] if wrong else 'none'}",
            param="allowed_token_ids",
            code="invalid_value",
        )
    kept = torch.tensor(sorted(set(allowed)))

    def hook(text: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        at = kept.to(logits.device)
        return torch.full_like(logits, float("-inf")).index_copy_(0, at, logits[at])

    return hook


@dataclass(frozen=True)
class Asked:
    """Request without its prompt: ``of_prompt`` makes the engine's request."""

    body: Sampled
    defaults: Defaults
    vocab_size: int
    max_length: int
    max_tokens: int | None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    # Returns the grammar of the reply to a prompt, None without a constraint.
    constraint: Callable[[Sequence[int]], Any] = lambda prompt: None
    seconds: float | None = None
    # Name of the field that has the prompt.
    field: str = "prompt"

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        eos = () if self.body.ignore_eos else self.defaults.eos
        return (*eos, *(self.body.stop_token_ids or ()))

    def of_prompt(self, prompt: Sequence[int], first_row: int, seed: int) -> Request:
        """Return the engine's request. Raises ApiError, also for requests that the engine would
        refuse.
        """
        body, vocab_size = self.body, self.vocab_size
        if body.truncate_prompt_tokens is not None:
            prompt = prompt[-body.truncate_prompt_tokens :]
        self._check_length(len(prompt))
        wrong = [token for token in body.stop_token_ids or () if token >= vocab_size]
        if wrong:
            raise ApiError(
                f"stop_token_ids has {wrong[0]}, which is not in the vocabulary of {vocab_size}",
                param="stop_token_ids",
                code="invalid_value",
            )
        hook = None
        if body.allowed_token_ids is not None:
            hook = only(body.allowed_token_ids, vocab_size)
        most = max(self.max_tokens or self.max_length - len(prompt), 1)
        if (body.min_tokens or 0) > most:
            raise ApiError(
                f"min_tokens={body.min_tokens} is more than the {most} tokens that the answer "
                "may have",
                param="min_tokens",
                code="invalid_value",
            )
        request = Request(
            prompt,
            sampling_of(body, self.defaults.sampling),
            self.ends,
            self.max_tokens,
            min_tokens=body.min_tokens or 0,
            seed=seed,
            first_row=first_row,
            n=self.n,
            logit_bias=biases_of(body, vocab_size),
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            constraint=self.constraint(prompt),
            hook=hook,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            priority=body.priority or 0,
            deadline=None if self.seconds is None else time.monotonic() + self.seconds,
            salt=(body.cache_salt or "").encode(),
            stream=bool(body.stream),
        )
        try:
            request.check(vocab_size, self.max_length)
        except ValueError as error:
            raise of_value_error(error, self.field) from None
        return request

    def _check_length(self, length: int) -> None:
        if length < 1:
            raise ApiError(
                "the prompt has no tokens: give at least one",
                param=self.field,
                code="invalid_value",
            )
        if length + (self.max_tokens or 1) <= self.max_length:
            return
        raise too_long(f"{length}", self.max_tokens, self.max_length, self.field)


def too_long(length: str, max_tokens: int | None, max_length: int, field: str) -> ApiError:
    """Return the error of a prompt that leaves no room for its new tokens."""
    # Clients look for these words, and for the code.
    wanted = f" and {max_tokens} new ones" if max_tokens else " and one new one"
    return refused(
        f"this model's maximum context length is {max_length} tokens, and {length} of the prompt"
        f"{wanted} do not fit; shorten the prompt or lower max_tokens",
        field,
        "context_length_exceeded",
    )


def seed_of(body: Sampled) -> int:
    """Return the seed of a body's draws, or a random one."""
    return secrets.randbits(63) if body.seed is None else body.seed % 2**64
