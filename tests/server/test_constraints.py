"""Structured output and tool calls over HTTP, where a grammar makes the outcome certain."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="the extra 'server' is not installed")

CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "clock.now", "parameters": {"type": "object"}}},
]
QUESTION = [{"role": "user", "content": "What is the weather?"}]


def is_trip(text: str) -> bool:
    told = json.loads(text)
    return told.keys() == {"city", "days"} and told["city"] in ("Rome", "Oslo")


def is_object(text: str) -> bool:
    return isinstance(json.loads(text), dict)


def is_word(text: str) -> bool:
    return re.fullmatch("[a-c]{3}", text) is not None


WORD = "[a-c]{3}"
LARK, GBNF = "start: /[a-c]{3}/", "root ::= [a-c] [a-c] [a-c]"
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA}}
FIELDS: list[tuple[dict[str, Any], Any]] = [
    ({"response_format": JSON_SCHEMA}, is_trip),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, is_trip),
    ({"response_format": {"type": "regex", "pattern": WORD}}, is_word),
    ({"response_format": {"type": "grammar", "grammar": LARK}}, is_word),
    ({"structured_outputs": {"json": SCHEMA}}, is_trip),
    ({"structured_outputs": {"regex": WORD}}, is_word),
    ({"structured_outputs": {"choice": ["abc", "bca"]}}, is_word),
    ({"structured_outputs": {"grammar": GBNF}}, is_word),
    ({"guided_json": json.dumps(SCHEMA)}, is_trip),
    ({"guided_regex": WORD}, is_word),
    ({"guided_choice": ["abc"]}, is_word),
    ({"guided_grammar": LARK}, is_word),
    ({"grammar": GBNF}, is_word),
    ({"json_schema": SCHEMA}, is_trip),
]


@pytest.mark.parametrize(
    ("fields", "fits"), FIELDS, ids=lambda value: getattr(value, "__name__", str(value)[:50])
)
def test_a_reply_is_what_its_grammar_says(client, fields: dict[str, Any], fits: Any) -> None:
    body = client.chat(**fields, max_tokens=60).body
    choice = body["choices"][0]
    assert choice["finish_reason"] == "stop" and fits(choice["message"]["content"]), choice
    body = client.complete(**fields, max_tokens=60, temperature=2, seed=1).body
    assert fits(body["choices"][0]["text"])


def test_a_json_object_is_one(client) -> None:
    bias = {str(token): 20 for token in client("/tokenize", {"prompt": "}"}).body["tokens"][1:]}
    fields = {"response_format": {"type": "json_object"}, "logit_bias": bias, "max_tokens": 60}
    assert is_object(client.chat(**fields).body["choices"][0]["message"]["content"])


def test_required_calls_come_with_arguments_that_fit(client) -> None:
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    body = client.chat(messages=QUESTION, **fields, max_tokens=60).body
    choice = body["choices"][0]
    call = choice["message"]["tool_calls"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert is_object(call["function"]["arguments"])
    assert call["function"]["name"] in ("weather", "clock.now")


def test_a_named_call_comes_whole_in_a_stream(client) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    fields = {"messages": QUESTION, "tools": TOOLS, "tool_choice": choice, "max_tokens": 60}
    events = client.stream(CHAT, **fields, parallel_tool_calls=False)
    deltas = [event["choices"][0]["delta"] for event in events]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0]
    assert calls[0]["function"]["name"] == "weather"
    assert is_trip(calls[0]["function"]["arguments"])
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_reply_is_a_call_or_json_where_both_may_come(client) -> None:
    """Agents send a format for their last answer with every request."""
    (start,) = client(
        "/tokenize", {"prompt": "<|tool_call_start|>", "add_special_tokens": False}
    ).body["tokens"]
    fields = {"tools": TOOLS, "response_format": JSON_SCHEMA, "max_tokens": 80}
    for bias, reason in ((100, "tool_calls"), (-100, "stop")):
        body = client.chat(messages=QUESTION, logit_bias={str(start): bias}, **fields).body
        choice = body["choices"][0]
        assert choice["finish_reason"] == reason, choice
        calls = choice["message"].get("tool_calls", [])
        assert bool(calls) is (bias > 0)
        assert all(is_object(call["function"]["arguments"]) for call in calls)
        assert calls or is_trip(choice["message"]["content"])
    none = client.chat(messages=QUESTION, tool_choice="none", **fields).body["choices"][0]
    assert is_trip(none["message"]["content"]) and "tool_calls" not in none["message"]
    needed = client.chat(messages=QUESTION, tool_choice="required", **fields).body
    assert needed["choices"][0]["finish_reason"] == "tool_calls"
    wrong = {"response_format": {"type": "json_object", "schema": {"type": "hiccup"}}}
    client.refused(client.chat(tools=TOOLS, **wrong), "response_format", "invalid_grammar")


def test_a_conversation_with_calls_goes_on(client) -> None:
    """Arguments of past calls are text in a body, and a mapping in a template."""
    call = {"name": "weather", "arguments": '{"city": "Rome", "days": 1}'}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function"}]},
        {"role": "tool", "tool_call_id": "a", "content": "Rain."},
    ]
    messages[1]["tool_calls"][0]["function"] = call
    answer = client.chat(messages=messages, tools=TOOLS)
    assert answer.status == 200
    text = client("/apply-template", {"messages": messages, "tools": TOOLS}).body["prompt"]
    assert "List of tools: " in text and 'weather(city="Rome", days=1)' in text
    call["arguments"] = "{"
    client.refused(
        client.chat(messages=messages),
        "messages[1].tool_calls[0].function.arguments",
        "invalid_value",
    )


def test_a_response_has_items(client) -> None:
    tool = {"type": "function", **TOOLS[0]["function"]}
    fields = {
        "input": "What is the weather?",
        "instructions": "Be short.",
        "tools": [tool],
        "tool_choice": {"type": "function", "name": "weather"},
        "parallel_tool_calls": False,
        "max_output_tokens": 60,
    }
    body = client("/v1/responses", fields).body
    assert body["object"] == "response" and body["status"] == "completed"
    (call,) = body["output"]
    assert (call["type"], call["name"]) == ("function_call", "weather")
    assert is_trip(call["arguments"])
    assert body["usage"]["total_tokens"] == (
        body["usage"]["input_tokens"] + body["usage"]["output_tokens"]
    )
    events = client.stream("/v1/responses", **fields)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert [event["sequence_number"] for event in events] == list(range(7))
    assert events[-1]["response"]["output"][0]["arguments"] == call["arguments"]
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "What is the weather?"}]},
        {"type": "function_call", "call_id": "a", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "Rain."},
    ]
    assert client("/v1/responses", {"input": items, "max_output_tokens": 3}).status == 200


def test_a_response_streams_its_text(client) -> None:
    fields = {"input": "What is an index?", "max_output_tokens": 8}
    events = client.stream("/v1/responses", **fields)
    said = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
    last = events[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    item = last["response"]["output"][0]
    assert item["content"][0]["text"] == said and item["status"] == "incomplete"
    assert last["response"]["id"].startswith("resp_") and item["id"].startswith("msg_")
    chat = client.chat(max_tokens=8).body["choices"][0]["message"]["content"]
    assert said == chat
    whole = client("/v1/responses", {**fields, "text": {"format": {"type": "text"}}}).body
    assert whole["output"][0]["content"][0]["text"] == said
    told = {"format": {"type": "json_schema", "name": "trip", "schema": SCHEMA}}
    body = client("/v1/responses", {**fields, "max_output_tokens": 60, "text": told}).body
    assert is_trip(body["output"][0]["content"][0]["text"])


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
    ({"response_format": {"type": "regex", "pattern": "("}}, "response_format", "invalid_grammar"),
    ({"guided_regex": "a" * 300_000}, "guided_regex", "invalid_grammar"),
    ({"guided_grammar": "start: nothing"}, "guided_grammar", "invalid_grammar"),
    ({"guided_regex": "a", "guided_grammar": LARK}, "guided_grammar", "invalid_value"),
    (
        {"structured_outputs": {"structural_tag": "x"}},
        "structured_outputs",
        "unsupported_parameter",
    ),
    ({"guided_regex": "a", "tools": TOOLS}, "guided_regex", "unsupported_parameter"),
    ({"tools": TOOLS, "tool_choice": {"type": "x"}}, "tool_choice", "invalid_value"),
]


@pytest.mark.parametrize(("fields", "param", "code"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_grammars_are_named(client, fields: dict[str, Any], param: str, code: str) -> None:
    client.refused(client.chat(**fields), param, code)


def test_numbers_that_json_lacks_are_refused(client) -> None:
    for number in (b"NaN", b"1e999"):
        body = b'{"input": "Hi", "metadata": {"a": %s}}' % number
        client.refused(client("/v1/responses", body), "metadata", "invalid_value")


def test_a_request_that_allows_no_token_is_the_clients_fault(client) -> None:
    end = client.service.defaults.eos[0]
    for fields in (
        {"guided_regex": "a", "allowed_token_ids": [500]},
        {"allowed_token_ids": [end], "min_tokens": 3},
    ):
        client.refused(client.chat(**fields), "allowed_token_ids", "invalid_value")
        (first, *_, last) = client.stream(CHAT, messages=QUESTION, max_tokens=9, **fields)
        assert first["choices"] and last["error"]["param"] == "allowed_token_ids"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "x"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ],
    ids=str,
)
def test_responses_refuse_what_needs_a_memory(client, fields: dict[str, Any], param: str) -> None:
    answer = client("/v1/responses", {"input": "Hi", **fields})
    client.refused(answer, param, "unsupported_parameter")
