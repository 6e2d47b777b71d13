"""Markers: tokens or text around thinking and tool calls, and which of them a model writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

Kind = Literal["thinking", "call"]

THINKING_PAIRS = (("<think>", "</think>"), ("<|cot_start|>", "<|cot_end|>"))
CALL_PAIR = ("<|tool_call_start|>", "<|tool_call_end|>")
XML_PAIR = ("<tool_call>", "</tool_call>")
TURN = "<|im_start|>"
MARKERS = frozenset(text for pair in (*THINKING_PAIRS, CALL_PAIR, XML_PAIR) for text in pair)


def overlap(text: str, marker: str) -> int:
    """Return the length of the longest beginning of the marker that ends the text, but not all."""
    longest = min(len(marker) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)


class Marker(NamedTuple):
    """Marker: its text, its token ``id`` or None, and ``partner``, the text that opens its pair."""

    text: str
    id: int | None
    kind: Kind
    closes: bool
    partner: str


def template_of(tokenizer: Any) -> str:
    """Return the tokenizer's chat template; several are joined, and "" means none."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return "\n".join(map(str, template.values()))
    return template if isinstance(template, str) else ""


def writes_xml(tokenizer: Any) -> bool:
    """Return True if the chat template has the markers of calls in XML."""
    return XML_PAIR[0] in template_of(tokenizer)


def markers_of(tokenizer: Any) -> tuple[Marker, ...]:
    """Return the markers of thinking and of tool calls that this tokenizer's model writes."""
    ids = {token.content: id for id, token in tokenizer.added_tokens_decoder.items()}
    call = XML_PAIR if writes_xml(tokenizer) else CALL_PAIR
    pairs: list[tuple[tuple[str, str], Kind]] = [(pair, "thinking") for pair in THINKING_PAIRS]
    pairs.append((call, "call"))
    return tuple(
        Marker(text, ids.get(text), kind, closes, pair[0])
        for pair, kind in pairs
        for text, closes in zip(pair, (False, True), strict=True)
    )


def open_passage(
    tokenizer: Any, prompt_ids: Sequence[int], markers: Sequence[Marker]
) -> tuple[Marker | None, str]:
    """Return the marker of an open passage in the prompt's last turn, and the passage so far.

    The marker is None if no passage is open. In a prompt without turns only a marker at its end
    counts.
    """
    turn = tokenizer.added_tokens_encoder.get(TURN)
    ids = list(prompt_ids)
    begin = next((at for at in range(len(ids) - 1, -1, -1) if ids[at] == turn), None)
    tail = ids[-64:] if begin is None else ids[begin + 1 :]
    text = tokenizer.backend_tokenizer.decode(tail, skip_special_tokens=False)
    by_text = {marker.text: marker for marker in markers}
    opened: Marker | None = None
    after = 0
    for found in re.finditer("|".join(map(re.escape, by_text)) or r"(?!)", text):
        marker = by_text[found[0]]
        if opened is None and not marker.closes:
            opened, after = marker, found.end()
        elif opened is not None and marker.closes and marker.partner == opened.partner:
            opened = None
    said = text[after:].lstrip() if opened is not None else ""
    return (None, "") if begin is None and said else (opened, said)
