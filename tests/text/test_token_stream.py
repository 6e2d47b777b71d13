"""Token ids turned into text as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm2_fast.text.markers import MARKERS
from lfm2_fast.text.token_stream import TokenStream


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
