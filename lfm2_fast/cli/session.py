"""Checkpoint as the commands use it: model, tokenizer and sampling, loaded and described."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import typer

from lfm2_fast.cli.options import loading_options
from lfm2_fast.cli.terminal import Terminal
from lfm2_fast.hf.causal_lm import Lfm2ForCausalLM
from lfm2_fast.hf.generation_args import resolve_args
from lfm2_fast.hf.load import load
from lfm2_fast.hf.loading import check_options
from lfm2_fast.text.conversation import Answer, Conversation, check_template, stream_answer
from lfm2_fast.text.presets import SAMPLING, sampling
from lfm2_fast.text.tokenizer import load_tokenizer
from lfm2_fast.weights.hub import hub_options


@dataclass
class Session:
    """Model with its tokenizer, and the sampling arguments for ``generate``."""

    model: Lfm2ForCausalLM
    tokenizer: Any
    arguments: dict[str, Any]

    def conversation(self, system: str | None, max_new_tokens: int | None) -> Conversation:
        """Start a new conversation. Raises ValueError if there is no chat template."""
        return Conversation(
            self.model,
            self.tokenizer,
            system=system,
            max_new_tokens=max_new_tokens,
            arguments=self.arguments,
        )

    def continuation(
        self,
        text: str,
        sink: Callable[[str], None],
        max_new_tokens: int,
        stopped: Callable[[], bool],
    ) -> Answer:
        """Continue a text without a template; see ``stream_answer``."""
        return stream_answer(
            self.model,
            self.tokenizer,
            self.tokenizer(text).input_ids,
            sink,
            max_new_tokens=max_new_tokens,
            arguments=self.arguments,
            stopped=stopped,
        )


def open_session(
    terminal: Terminal,
    name: str,
    *,
    chat: bool = False,
    preset: str | None = None,
    given: Mapping[str, Any] | None = None,
    stop: list[str] | None = None,
    seed: int | None = None,
    **options: Any,
) -> Session:
    """Load a checkpoint, and write notes about the model and its sampling.

    ``preset`` and ``given`` are as in ``presets.sampling``, ``options`` go to ``load``; ``seed`` is
    torch's. Wrong options raise before the checkpoint is looked up. A missing tokenizer raises
    before the weights are loaded; for ``chat``, so does a missing template.
    """
    arguments, _ = sampling(name, preset=preset, given=given)
    if stop:
        arguments["stop_strings"] = stop
    resolve_args(arguments, None, {}, vocab_size=1)
    check_options(**options)
    model, tokenizer = load_both(terminal, name, chat=chat, **options)
    file = model.generation_defaults()
    arguments = chosen(terminal, name, preset=preset, file=file, given=given, stop=stop, seed=seed)
    return Session(model, tokenizer, arguments)


def chosen(
    terminal: Terminal,
    name: str,
    *,
    preset: str | None,
    file: Mapping[str, Any] | None,
    given: Mapping[str, Any] | None,
    stop: list[str] | None,
    seed: int | None,
) -> dict[str, Any]:
    """Return the arguments of sampling and stopping, and write a note about the former.

    ``preset``, ``file`` and ``given`` are as in ``presets.sampling``; ``seed`` is torch's.
    """
    arguments, words = sampling(name, preset=preset, file=file, given=given)
    terminal.note(f"sampling: {words}")
    if stop:
        arguments["stop_strings"] = stop
    if seed is not None:
        torch.manual_seed(seed)
    return arguments


def load_both(
    terminal: Terminal, name: str, *, chat: bool = False, **options: Any
) -> tuple[Lfm2ForCausalLM, Any]:
    """Return a checkpoint's model and tokenizer, and write a note about the model.

    ``options`` go to ``load``. A missing tokenizer raises before the weights are loaded; for
    ``chat``, so does a missing template.
    """
    terminal.note(f"loading {name}")
    tokenizer = load_tokenizer(name, **hub_options(options))
    if chat:
        check_template(tokenizer, name)
    model = load(name, **options)
    terminal.note(summary(model))
    return model, tokenizer


def summary(model: Lfm2ForCausalLM) -> str:
    """Describe a model in a line: its size, its device and its backend."""
    dtype = str(model.dtype).removeprefix("torch.")
    size = millions(model.num_parameters())
    numbers = (
        f"{model.network.config.quantization} and {dtype}"
        if model.network.config.quantization
        else dtype
    )
    return f"{size} parameters in {numbers}, on {model.device} with backend {model.ops.name}"


def millions(count: int) -> str:
    """Write a count of parameters in words: "3.6 million"."""
    return f"{count / 1e6:.3g} million" if count < 999.5e6 else f"{count / 1e9:.3g} billion"


def session_of(terminal: Terminal, context: typer.Context, *, chat: bool) -> Session:
    """Open a session with a command's options."""
    asked = context.params
    return open_session(
        terminal,
        asked["model"],
        chat=chat,
        preset=asked["preset"],
        given={name: asked[name] for name in SAMPLING},
        stop=asked["stop"],
        seed=asked["seed"],
        **loading_options(context),
    )
