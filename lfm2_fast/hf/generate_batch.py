"""generate_batch(): any number of prompts, each with its own settings, on one engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch

from lfm2_fast.cache.page_memory import pages_of
from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.request import Event
from lfm2_fast.hf.batch_request import NEEDS_ALL_ROWS, Generated, Maker
from lfm2_fast.hf.generate import seed_of
from lfm2_fast.hf.generate_call import progress_bar
from lfm2_fast.hf.hooks import check_generates
from lfm2_fast.hf.pretrained import Lfm2PreTrainedModel

# Number of prompts, for each row, that are read ahead of the first one without an answer.
AHEAD = 4
# Tokens of context for which each row has pages, without memory=.
CONTEXT = 4096


def generate_batch(
    model: Lfm2PreTrainedModel,
    prompts: Iterable[Any] | Mapping[str, Any],
    *,
    tokenizer: Any = None,
    max_batch_size: int = 16,
    memory: int | str | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    errors: str = "raise",
    progress: bool = True,
    **settings: Any,
) -> Iterator[Generated]:
    """Continue any number of prompts and yield a ``Generated`` of each, in order.

    A prompt is token ids (a list, or a tensor ``[T]``), a text, or a conversation (a list of
    messages with a role and a content). Texts and conversations need the ``tokenizer``. A prompt
    may also be a mapping with one of these as "prompt", and with its own settings. A tokenizer's
    result is accepted too. ``settings`` are those of all prompts: arguments of ``generate`` that
    can differ by row, with ``logits_processor``, which then sees one row.

    ``max_batch_size`` rows are written at the same time. When one ends, the next prompt takes its
    place. Prompts share the pages of a common beginning. ``prompts`` are read when they are needed,
    a few for each row ahead, so memory does not grow with their number. ``memory`` is that of
    ``Engine``: bytes, "8GB" or "80%", taken at once. Without it there are pages for 4,096 tokens a
    row, or for one full context if that is more.

    ``seed`` or ``generator`` decides the draws, as in one call of ``generate`` with all prompts. A
    prompt with its own seed draws as if it were alone. ``progress`` shows a bar on a terminal.

    A prompt that is refused or fails raises at its turn, after the answers of the prompts before
    it. With ``errors="return"`` its answer has the ``error``, and the others continue. Raises
    ValueError or TypeError at once for arguments that are wrong for any prompt.
    """
    if not hasattr(model, "generate") or not isinstance(model, Lfm2PreTrainedModel):
        raise TypeError(
            f"generate_batch() takes a model of lfm2_fast.load(), not {type(model).__name__}"
        )
    if errors not in ("raise", "return"):
        raise ValueError(f"errors must be 'raise' or 'return', got {errors!r}")
    if max_batch_size < 1:
        raise ValueError(f"max_batch_size must be at least 1, got {max_batch_size}")
    for name in settings:
        if name in NEEDS_ALL_ROWS:
            raise ValueError(f"{name} is not supported by generate_batch(): call generate()")
    check_generates(model)
    maker = Maker(model, tokenizer, settings, seed_of(seed, generator))
    return _run(maker, _one_by_one(prompts), max_batch_size, memory, errors == "raise", progress)


def _one_by_one(prompts: Iterable[Any] | Mapping[str, Any]) -> Iterable[Any]:
    """Return the prompts one by one; of a tokenizer's answer, the ids without padding."""
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of prompts, got one text: put it into a list")
    if not isinstance(prompts, Mapping):
        return prompts
    if "input_ids" not in prompts:
        raise ValueError("prompts must be a list of prompts, got a mapping: put it into a list")
    ids, masks = prompts["input_ids"], prompts.get("attention_mask")
    if masks is None:
        return ids
    pairs = zip(map(list, ids), masks, strict=True)
    return [[t for t, kept in zip(row, mask, strict=True) if kept] for row, mask in pairs]


def _run(
    maker: Maker,
    prompts: Iterable[Any],
    rows: int,
    memory: int | str | None,
    raises: bool,
    progress: bool,
) -> Iterator[Generated]:
    model, source = maker.model, iter(prompts)
    pages = None
    if memory is None:
        limit = model.max_length
        pages = max(rows * pages_of(min(CONTEXT, limit)), pages_of(limit))
    engine = Engine(model, max_rows=rows, max_length=model.max_length, memory=memory, pages=pages)
    bar = progress_bar(len(prompts) if isinstance(prompts, Sized) else None) if progress else None
    # Prompts that were read and whose answers are not yielded, by place, and running requests.
    pending: dict[int, Generated] = {}
    running: dict[int, Generated] = {}
    count, exhausted = 0, False
    try:
        while True:
            while not exhausted and len(pending) < AHEAD * rows:
                try:
                    item = next(source)
                except StopIteration:
                    exhausted = True
                    break
                made = pending[count] = Generated(count)
                try:
                    request = maker.request(item, engine.max_length, made)
                    running[engine.add(request)] = made
                except Exception as error:
                    pending[count] = Generated(count, made.prompt, error=error)
                count += 1
            if not pending:
                return
            first = pending[min(pending)]
            if None not in first.finish_reasons:
                del pending[first.index]
                if bar is not None:
                    bar.update()
                if first.error is not None and raises:
                    raise _with_index(first.error, first.index)
                yield maker.decoded(first)
                continue
            for event in engine.step():
                _note(event, running)
    finally:
        engine.close()
        if bar is not None:
            bar.close()


def _note(event: Event, running: dict[int, Generated]) -> None:
    """Write an event into the answer of its prompt."""
    made = running[event.id]
    if event.token is not None:
        made.sequences[event.index].append(event.token)
    if event.finish_reason is not None:
        made.finish_reasons[event.index] = event.finish_reason
        made.error = made.error or event.error
        if None not in made.finish_reasons:
            del running[event.id]


def _with_index(error: Exception, index: int) -> Exception:
    """Return an error that names the prompt. It has the same class if that is one of ours."""
    made: Exception
    if isinstance(error, ValueError | TypeError):
        made = type(error)(f"prompt {index}: {error}")
        made.__cause__ = error
        return made
    return error
