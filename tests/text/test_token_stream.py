"""Text taken apart into thinking, tool calls and answers; ids turned into text as they come."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm2_fast.text.segments import MARKERS, Segment, Splitter
from lfm2_fast.text.token_stream import TokenStream

# Markers, parts of them and what looks like them, between words and white space.
PIECES = [
    *sorted(MARKERS),
    "<",
    "<th",
    "ink>",
    "</",
    "<|",
    "<|tool_call",
    "|>",
    "a",
    "b c",
    " ",
    "\n",
]


def passages(pieces: list[str], inside: str | None = None) -> list[tuple[str, str]]:
    """The whole passages that the pieces give."""
    splitter = Splitter(inside)
    segments = [segment for piece in pieces for segment in splitter.feed(piece)] + splitter.close()
    found: list[tuple[str, str]] = []
    for segment in segments:
        if segment.last:
            assert segment[:3] == (found[-1][0], "", False)
            continue
        assert segment.text
        if segment.first:
            found.append((segment.kind, segment.text))
        else:
            kind, text = found.pop()
            assert kind == segment.kind
            found.append((kind, text + segment.text))
    return found


@given(st.data())
def test_any_cut_of_a_text_gives_the_same_passages(data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(PIECES), max_size=12)))
    inside = data.draw(st.sampled_from([None, "<think>", "<|tool_call_start|>"]))
    cuts = [0, *sorted(data.draw(st.sets(st.integers(0, len(text))))), len(text)]
    pieces = [text[a:b] for a, b in pairwise(cuts)]
    whole = passages([text], inside)
    assert passages(pieces, inside) == whole
    assert passages(list(text), inside) == whole
    assert all(passage == passage.strip() for _, passage in whole)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("Hello there.", [("answer", "Hello there.")], id="plain"),
        pytest.param(
            "<think>\nTwo and two.\n</think>\n\nFour.",
            [("thinking", "Two and two."), ("answer", "Four.")],
            id="thinking",
        ),
        pytest.param("<think>\n\n</think>\n\nFour.", [("answer", "Four.")], id="empty-thinking"),
        pytest.param("<think>Two and", [("thinking", "Two and")], id="unfinished-thinking"),
        pytest.param(
            "<|cot_start|>Two.<|cot_end|>Four.",
            [("thinking", "Two."), ("answer", "Four.")],
            id="cot",
        ),
        pytest.param(
            "The marker <think> opens </think>.",
            [("answer", "The marker <think> opens </think>.")],
            id="mentioned",
        ),
        pytest.param(
            'Let me look.<|tool_call_start|>[f(x="<think>")]<|tool_call_end|>\nDone.',
            [("answer", "Let me look."), ("tool call", '[f(x="<think>")]'), ("answer", "Done.")],
            id="tool-call",
        ),
        pytest.param(
            "<|tool_call_start|>[f()]<|tool_call_end|><|tool_call_start|>[g()]<|tool_call_end|>",
            [("tool call", "[f()]"), ("tool call", "[g()]")],
            id="two-tool-calls",
        ),
        pytest.param(
            "<|tool_call_start|>[f('<|tool_call_start|>')]<|tool_call_end|>",
            [("tool call", "[f('<|tool_call_start|>')]")],
            id="marker-in-a-tool-call",
        ),
        pytest.param(
            "<think>a<|tool_call_start|>[f()]<|tool_call_end|> b</think>Four.",
            [
                ("thinking", "a<|tool_call_start|>[f()]<|tool_call_end|> b"),
                ("answer", "Four."),
            ],
            id="tool-call-while-thinking",
        ),
        pytest.param(
            "<think>No <|tool_call_start|> here.</think><|tool_call_start|>[f()]<|tool_call_end|>",
            [("thinking", "No <|tool_call_start|> here."), ("tool call", "[f()]")],
            id="marker-while-thinking",
        ),
        pytest.param("1 <|tool_call", [("answer", "1 <|tool_call")], id="half-a-marker"),
        pytest.param(" \n ", [], id="nothing"),
    ],
)
def test_passages(text: str, expected: list[tuple[str, str]]) -> None:
    assert passages([text]) == expected


def test_a_prompt_may_have_begun_the_thinking() -> None:
    expected = [("thinking", "Two."), ("answer", "Four.")]
    assert passages(["\nTwo.", "</th", "ink>Four."], inside="<think>") == expected


def test_text_is_not_held_back_longer_than_needed() -> None:
    splitter = Splitter()
    assert splitter.feed("a <") == [Segment("answer", "a", True)]
    assert splitter.feed("b") == [Segment("answer", " <b", False)]


def test_only_the_marker_closes_a_passage() -> None:
    closed = Segment("tool call", "", False, last=True)
    text = "<|tool_call_start|>[f()]<|tool_call_end|><|tool_call_start|><|tool_call_end|>"
    for pieces in ([text], list(text)):
        splitter = Splitter()
        segments = [segment for piece in pieces for segment in splitter.feed(piece)]
        assert segments.count(closed) == 1 and segments[-1] == closed
        assert splitter.close() == []
    splitter = Splitter()
    cut = splitter.feed("<|tool_call_start|>[f()]<|tool_call_end") + splitter.close()
    assert cut and not any(segment.last for segment in cut)


def test_what_is_open_can_be_closed() -> None:
    splitter = Splitter()
    for text, closer in (
        ("<think>a", "</think>"),
        ("</think>b", ""),
        ("<|tool_call_start|>", None),
    ):
        splitter.feed(text)
        assert splitter.closer == (closer if closer is not None else "<|tool_call_end|>")


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


def stream(tokenizer: Any, ids: list[int]) -> tuple[list[str], str]:
    """The pieces in which a stream hands over the text of ids, and what it says the text is."""
    pieces: list[str] = []
    tokens = TokenStream(tokenizer, pieces.append)
    for token in ids:
        tokens.put(token)
    tokens.end()
    assert tokens.ids == ids
    return pieces, tokens.text


@given(data=st.data())
def test_streamed_text_is_the_tokenizers(tokenizer: Any, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=20))
    added = tokenizer.added_tokens_decoder
    shown = [i for i in ids if i not in added or added[i].content in MARKERS]
    pieces, text = stream(tokenizer, ids)
    assert text == "".join(pieces) == tokenizer.decode(shown, skip_special_tokens=False)


def test_characters_come_whole_and_at_once(tokenizer: Any) -> None:
    written = "naïve 日本語 👩‍🚀 end"
    ids = tokenizer(written, add_special_tokens=False).input_ids
    pieces, text = stream(tokenizer, ids)
    assert text == written
    assert "\ufffd" not in text
    assert len(pieces) > len(written.split())


def test_special_tokens_are_dropped_but_for_markers(tokenizer: Any) -> None:
    text = "<|startoftext|>a<|tool_call_start|>[f()]<|tool_call_end|><|im_end|>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert stream(tokenizer, ids)[1] == "a<|tool_call_start|>[f()]<|tool_call_end|>"


def test_the_times_of_a_stream_are_those_of_its_tokens(tokenizer: Any) -> None:
    tokens = TokenStream(tokenizer, lambda text: None)
    assert str(tokens.timing) == "no tokens"
    for token in (300, 301):
        tokens.put(token)
    timing = tokens.timing
    assert timing.tokens == 2 and timing.begun <= timing.first < timing.last
