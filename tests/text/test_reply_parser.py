"""Replies taken apart by token ids, however they come."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_fast.text.markers import markers_of, open_passage
from lfm2_fast.text.messages import normalize_messages
from lfm2_fast.text.reply_parser import Delta, ReplyParser

START, END = "<|tool_call_start|>", "<|tool_call_end|>"
TURN = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def spelling(tokenizer: Any) -> Any:
    """A tokenizer whose template writes calls in XML, with markers that are no tokens."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = "{{ '<tool_call><function=' }}" + tokenizer.chat_template
    return changed


@pytest.fixture(scope="module")
def xml(spelling: Any) -> Any:
    """The same with markers that are tokens, though no special ones."""
    changed = copy.deepcopy(spelling)
    changed.add_tokens(["<tool_call>", "</tool_call>"])
    return changed


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def parsed(
    tokenizer: Any,
    reply: str | Sequence[int],
    *,
    prompt: str = TURN,
    tools: bool = True,
    thinking: bool | None = None,
    cuts: Sequence[int] | None = None,
    **more: Any,
) -> tuple[list[tuple[str, Any]], ReplyParser]:
    """Return the parts of a reply: kinds with joined texts, or calls with their arguments."""
    ids = ids_of(tokenizer, reply) if isinstance(reply, str) else list(reply)
    numbers = itertools.count()
    parser = ReplyParser(
        tokenizer,
        tools=tools,
        thinking=thinking,
        prompt_ids=ids_of(tokenizer, prompt),
        new_id=lambda: f"call_{next(numbers)}",
        **more,
    )
    places = range(len(ids) + 1) if cuts is None else [0, *sorted(cuts), len(ids)]
    deltas = [delta for a, b in pairwise(places) for delta in parser.feed(ids[a:b])]
    deltas += parser.finish()
    assert parser.finish() == []
    return joined(deltas), parser


def joined(deltas: Sequence[Delta]) -> list[tuple[str, Any]]:
    made: list[tuple[str, Any]] = []
    calls = 0
    for delta in deltas:
        if delta.kind == "tool_call":
            assert (delta.index, delta.id, delta.text) == (calls, f"call_{calls}", "")
            calls += 1
            made.append((delta.name or "", json.loads(delta.arguments)))
        else:
            assert delta.text and not (delta.id or delta.name or delta.arguments)
            if made and made[-1][0] == delta.kind:
                made[-1] = (delta.kind, made[-1][1] + delta.text)
            else:
                made.append((delta.kind, delta.text))
    return made


@pytest.mark.parametrize(
    ("reply", "gives"),
    [
        ("", []),
        ("  Hello!\n ", [("text", "  Hello!\n ")]),
        (" \n", [("text", " \n")]),
        ("Hello<|im_end|>", [("text", "Hello")]),
        ("a < b, [1, 2]", [("text", "a < b, [1, 2]")]),
        (f"{START}[f(a=1)]{END}<|im_end|>", [("f", {"a": 1})]),
        (f"{START}[f(a=1), g()]{END} Done. ", [("f", {"a": 1}), ("g", {}), ("text", "Done. ")]),
        (f"Wait.\n{START}[f()]{END}\n{START}[g()]{END}", [("text", "Wait."), ("f", {}), ("g", {})]),
        (f'{START}[{{"name": "f", "arguments": {{"a": "é"}}}}]{END}', [("f", {"a": "é"})]),
        (f"{START}[]{END}", []),
        (f"{START}{END}", []),
        # Cut short, and bad.
        (f"{START}[f(a=1), g(b='x", [("text", "g(b='x"), ("f", {"a": 1})]),
        (f"{START}[f(a=1), g(b)]{END}", [("text", "g(b)"), ("f", {"a": 1})]),
        (f"{START}[f()]{START}[g()]{END}", [("f", {}), ("g", {})]),
        # Thinking.
        ("<think>So.\n</think>\n\nYes. ", [("reasoning", "So."), ("text", "Yes. ")]),
        (" <think> a </think>b", [("reasoning", "a"), ("text", "b")]),
        ("<think></think>b", [("text", "b")]),
        ("<think>cut", [("reasoning", "cut")]),
        ("<think>a <think> b</think>c", [("reasoning", "a <think> b"), ("text", "c")]),
        ("<|cot_start|>a</think>b<|cot_end|>c", [("reasoning", "a</think>b"), ("text", "c")]),
        ("say <think>x</think>", [("text", "say <think>x</think>")]),
        ("x</think>y", [("text", "x</think>y")]),
        (f"<think>a</think>{START}[f()]{END}", [("reasoning", "a"), ("f", {})]),
        (
            f"<think>{START}[f()]{END}</think>b",
            [("reasoning", f"{START}[f()]{END}"), ("text", "b")],
        ),
        (f"{START}[f(a='<think>x</think>')]{END}", [("f", {"a": "<think>x</think>"})]),
        # Markers that are missing, and calls that are said twice.
        ("<think>a</think>[f(a=1), g()]", [("reasoning", "a"), ("f", {"a": 1}), ("g", {})]),
        ("[f(a=1)]", [("f", {"a": 1})]),
        ('[{"name": "f"}]', [("f", {})]),
        (f"[f(a=1)]{END}", [("f", {"a": 1})]),
        (f"{START}[f(a=1)]{END}[f(a=1)]{END}", [("f", {"a": 1})]),
        (f"{START}[f(a=1)]{END}\n[f(a=1)]", [("f", {"a": 1})]),
        (f"{START}[f(a=1)]{END}[f(a=2)]{END}", [("f", {"a": 1}), ("f", {"a": 2})]),
        (f"{START}[f()]{END}[g()]", [("f", {}), ("text", "[g()]")]),
        (f"[f(a=1)]{START}[g()]{END}", [("text", "[f(a=1)]"), ("g", {})]),
        ("[f(a=1)] is how", [("text", "[f(a=1)] is how")]),
        ("[f(a=1", [("text", "[f(a=1")]),
        ("[a link](to)", [("text", "[a link](to)")]),
        ('[{"a": 1}]', [("text", '[{"a": 1}]')]),
        ("Use [f(a=1)]", [("text", "Use [f(a=1)]")]),
        (f"a{END}b", [("text", "ab")]),
    ],
)
def test_a_reply_is_taken_apart(tokenizer: Any, reply: str, gives: list[tuple[str, Any]]) -> None:
    assert parsed(tokenizer, reply)[0] == gives


def test_markers_without_their_option_are_text(tokenizer: Any) -> None:
    reply = f"<think>a</think>\n {START}[f(a=1)]{END} b "
    assert parsed(tokenizer, reply, tools=False)[0] == [
        ("reasoning", "a"),
        ("text", "[f(a=1)] b "),
    ]
    assert parsed(tokenizer, reply, thinking=False)[0] == [
        ("text", "<think>a</think>"),
        ("f", {"a": 1}),
        ("text", "b "),
    ]
    assert parsed(tokenizer, " [f(a=1)] ", tools=False)[0] == [("text", " [f(a=1)] ")]


@pytest.mark.parametrize(
    ("prompt", "reply", "gives"),
    [
        (f"{TURN}<think>", "\nSo.</think>Yes.", [("reasoning", "So."), ("text", "Yes.")]),
        (f"{TURN}<think>\n", "So.", [("reasoning", "So.")]),
        (f"{TURN}<think>I", " see</think> Yes.", [("reasoning", " see"), ("text", "Yes.")]),
        (f"{TURN}<think></think>\n", "Yes.", [("text", "Yes.")]),
        (f"{TURN}<|cot_start|>", "a<|cot_end|>b", [("reasoning", "a"), ("text", "b")]),
        (f"{TURN}{START}", f"[f()]{END}", [("f", {})]),
        (f"{TURN}{START}[f(", f"a=1)]{END}", [("f", {"a": 1})]),
        ("<|im_start|>user\n<think><|im_end|>\n" + TURN, "Yes.", [("text", "Yes.")]),
        ("a <think> b", "Yes.", [("text", "Yes.")]),
        ("a <think>", "Yes.", [("reasoning", "Yes.")]),
    ],
)
def test_a_passage_may_begin_in_the_prompt(
    tokenizer: Any, prompt: str, reply: str, gives: list[tuple[str, Any]]
) -> None:
    assert parsed(tokenizer, reply, prompt=prompt)[0] == gives


def test_thinking_begins_at_once_if_the_caller_says_so(tokenizer: Any) -> None:
    for reply in ("So.</think>Yes.", "<think>So.</think>Yes.", " So.<|cot_end|>\nYes."):
        made, _ = parsed(tokenizer, reply, thinking=True)
        assert made == [("reasoning", "So."), ("text", "Yes.")]


def test_tokens_of_thinking_are_counted(tokenizer: Any) -> None:
    _, parser = parsed(tokenizer, "<think>one two</think>three")
    assert parser.reasoning_tokens == len(ids_of(tokenizer, "<think>one two</think>"))
    assert parsed(tokenizer, "three")[1].reasoning_tokens == 0


def test_thinking_and_text_come_as_they_are_written(tokenizer: Any) -> None:
    parser = ReplyParser(tokenizer, tools=True, thinking=None, prompt_ids=[])
    said = {"reasoning": 0, "text": 0}
    for token in ids_of(tokenizer, "<think>one two three four</think>five six seven eight nine"):
        for delta in parser.feed([token]):
            said[delta.kind] += 1
    assert min(said.values()) > 3


def test_calls_come_when_their_passage_closes(tokenizer: Any) -> None:
    parser = ReplyParser(tokenizer, tools=True, thinking=None, prompt_ids=[])
    *most, last = ids_of(tokenizer, f"{START}[f(a=1), g()]{END}")
    assert parser.feed(most) == []
    first, second = parser.feed([last])
    assert (first.name, second.name) == ("f", "g") and first.id != second.id
    assert first.id is not None and first.id.startswith("call_")


@pytest.mark.parametrize("text", ["😀 é 中文 🏳️‍🌈", "a\ufffdb"])
def test_characters_of_several_tokens_come_whole(tokenizer: Any, text: str) -> None:
    ids = ids_of(tokenizer, text)
    parser = ReplyParser(tokenizer, tools=True, thinking=None, prompt_ids=[])
    pieces = [delta.text for token in ids for delta in parser.feed([token])]
    assert "".join(pieces + [delta.text for delta in parser.finish()]) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_is_sent_at_the_end(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, "ok 😀")
    start = ids_of(tokenizer, START)
    assert len(ids) > 4  # the last character takes several tokens
    assert parsed(tokenizer, ids[:-1])[0] == [("text", tokenizer.decode(ids[:-1]))]
    made, _ = parsed(tokenizer, [*ids[:-1], *start, *ids_of(tokenizer, f"[f()]{END}")])
    assert made == [("text", tokenizer.decode(ids[:-1])), ("f", {})]


CALL = "\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n"


@pytest.mark.parametrize("kind", ["xml", "spelling"])
def test_calls_in_xml_are_chosen_by_the_template(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    reply = f"<think>a</think>Well <tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>"
    calls = [("f", {"a": 1})] * 2
    assert parsed(tokenizer, reply)[0] == [("reasoning", "a"), ("text", "Well"), *calls]
    assert parsed(tokenizer, f"a <tool_ca{START}x")[0] == [("text", "a <tool_cax")]
    assert parsed(tokenizer, f"<tool_call>{CALL}")[0] == calls[:1]
    assert parsed(tokenizer, CALL)[0] == calls[:1]
    assert parsed(tokenizer, f"a<tool_call>{CALL}", tools=False)[0] == [
        ("text", f"a<tool_call>{CALL}")
    ]
    tool = {"type": "function", "function": {"name": "f"}}
    tool["function"]["parameters"] = {"properties": {"a": {"type": "string"}}}
    made, _ = parsed(tokenizer, f"<tool_call>{CALL}</tool_call>", functions=[tool])
    assert made == [("f", {"a": "1"})]


def test_text_that_spells_a_token_is_text(tokenizer: Any) -> None:
    ids = [id for piece in (*"<think>", "a") for id in ids_of(tokenizer, piece)]
    assert parsed(tokenizer, ids)[0] == [("text", "<think>a")]
    ids = [id for piece in (*START, "[f()]") for id in ids_of(tokenizer, piece)]
    assert parsed(tokenizer, ids)[0] == [("text", f"{START}[f()]")]


TOKENS = st.lists(
    st.integers(0, 15) | st.integers(0, 4200) | st.sampled_from([10, 10, 11, 11, 14, 15]),
    max_size=24,
)
PHRASES = ["<think>", "</think>", START, END, "<tool_call>", "</tool_call>", "[f(a=1)]", "[", "f("]
PHRASES += [CALL, "<function=", " ", "\n", "text", "<", "</", "<tool", "😀", "é", "{'name': 'f'}"]


@pytest.mark.parametrize("kind", ["tokenizer", "xml", "spelling"])
def test_any_cut_of_any_ids_gives_the_same(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    words = st.lists(st.sampled_from(PHRASES), max_size=10).map("".join)
    replies = TOKENS | words.map(lambda text: ids_of(tokenizer, text))

    @settings(max_examples=150, deadline=None)
    @given(
        ids=replies,
        data=st.data(),
        tools=st.booleans(),
        thinking=st.sampled_from([None, None, True, False]),
        prompt=st.sampled_from([TURN, f"{TURN}<think>", f"{TURN}{START}", ""]),
    )
    def check(
        ids: list[int], data: st.DataObject, tools: bool, thinking: bool | None, prompt: str
    ) -> None:
        cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=4))
        given_ = {"tools": tools, "thinking": thinking, "prompt": prompt}
        one, parser = parsed(tokenizer, ids, **given_)
        other, again = parsed(tokenizer, ids, cuts=cuts, **given_)
        assert one == other and parser.reasoning_tokens == again.reasoning_tokens
        whole, _ = parsed(tokenizer, ids, cuts=[], **given_)
        assert one == whole

    check()


def test_plain_text_is_the_decoders_own(tokenizer: Any) -> None:
    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(16, 4095), max_size=24))
    def check(ids: list[int]) -> None:
        made, _ = parsed(tokenizer, ids, tools=False)
        assert "".join(text for _, text in made) == tokenizer.decode(ids)

    check()


def test_a_prompts_open_passage_is_found_in_its_last_turn(tokenizer: Any) -> None:
    markers = markers_of(tokenizer)
    ids = ids_of(tokenizer, f"{TURN}<think>a</think>b<|im_end|>\n{TURN}<think>")
    opened, said = open_passage(tokenizer, ids, markers)
    assert opened is not None and opened.text == "<think>" and not said
    assert open_passage(tokenizer, [], markers) == (None, "")


def test_messages_are_brought_into_one_form() -> None:
    given_ = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"text": "b"}]},
        {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": [{"id": "1"}]},
        {"role": "tool", "tool_call_id": "1", "content": "4"},
    ]
    given_[1]["tool_calls"][0]["function"] = {"name": "f", "arguments": '{"x": [1, null]}'}
    before = copy.deepcopy(given_)
    made = normalize_messages(given_)
    assert given_ == before
    assert made[0] == {"role": "system", "content": "ab"}
    function = {"name": "f", "arguments": {"x": [1, None]}}
    assert made[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "function": function}],
        **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "r"),
    }
    assert made[2] == given_[2]
    assert normalize_messages(given_, "{{ message.tool_calls }}") == made
    assert normalize_messages(made) == made


def test_calls_are_written_where_a_template_reads_none(tokenizer: Any) -> None:
    call = {"function": {"name": "f", "arguments": '{\'x\': True, "y": "a\'b"}'}}
    messages = [{"role": "assistant", "content": "Then.", "tool_calls": [call, call]}]
    made = normalize_messages(messages, tokenizer.chat_template)
    written = 'f(x=True, y="a\'b")'
    assert made[0]["content"] == f"{START}[{written}, {written}]{END}Then."
    text = tokenizer.apply_chat_template(made, tokenize=False)
    assert f"{START}[{written}" in text


@pytest.mark.parametrize("arguments", ["", " ", "{}", None, {}])
def test_no_arguments_are_an_empty_mapping(arguments: Any) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    made = normalize_messages([{"role": "assistant", "tool_calls": [call]}])
    assert made[0]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("text", r"messages\[0\] must be an object, got str"),
        ({"content": "a"}, r"messages\[0\]\.role must be a string, got None"),
        ({"role": "user", "content": 3}, r"content must be a string or a list"),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            r"content\[0\] is of type 'image_url', and this model reads only text",
        ),
        ({"role": "user", "content": ["a"]}, r"content\[0\] is of type 'str'"),
        ({"role": "assistant", "tool_calls": "f"}, r"tool_calls must be a list, got str"),
        ({"role": "assistant", "tool_calls": [{}]}, r"tool_calls\[0\]\.function must be an object"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{a"}}]},
            r"arguments must be the text of a JSON object: a value is missing at character 1",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            r"arguments must be a JSON object, got list",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{} x"}}]},
            r"text follows the object at character 2",
        ),
    ],
)
def test_messages_that_cannot_be_read_are_named(message: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        normalize_messages([message])
