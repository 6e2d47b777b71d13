"""Chat completions: whole and in chunks, and what fields change."""

from __future__ import annotations

from typing import Any

import pytest

PATH = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "What is an index?"}]


def expected(model: Any, tokenizer: Any, messages: Any, count: int) -> str:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    made = model.generate([ids], max_new_tokens=count, do_sample=False)
    return tokenizer.decode(made[0][len(ids) :], skip_special_tokens=True)


@pytest.fixture(scope="session")
def tokenizer(client) -> Any:
    return client.service.tokenizer


def test_the_answer_is_what_generate_writes(client, model, tokenizer) -> None:
    answer = client.chat()
    assert answer.status == 200
    body = answer.body
    message = body["choices"][0]["message"]
    assert message == {
        "role": "assistant",
        "content": expected(model, tokenizer, QUESTION, 12),
        "refusal": None,
    }
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["object"] == "chat.completion" and body["model"] == "tiny"
    assert body["usage"]["prompt_tokens"] == 17 and body["usage"]["completion_tokens"] == 12
    assert body["usage"]["total_tokens"] == 29


def test_a_stream_says_the_same_in_pieces(client) -> None:
    whole = client.chat(n=2, seed=3, temperature=0.9).body
    events = client.stream(
        PATH,
        messages=QUESTION,
        max_tokens=12,
        n=2,
        seed=3,
        temperature=0.9,
        stream_options={"include_usage": True},
    )
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    assert events[-1]["choices"] == []
    usage = events.pop()["usage"]
    assert {event["usage"] for event in events} == {None}
    assert usage["completion_tokens"] == whole["usage"]["completion_tokens"] == 24
    for index, choice in enumerate(whole["choices"]):
        own = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        said = "".join(each["delta"].get("content", "") for each in own)
        assert said == choice["message"]["content"]
        reasons = [each["finish_reason"] for each in own]
        assert reasons == [None] * (len(own) - 1) + ["length"]
    assert whole["choices"][0]["message"] != whole["choices"][1]["message"]


def test_the_text_ends_at_the_end_token(client) -> None:
    body = client.chat("Hello!", max_tokens=40).body
    assert body["choices"][0]["message"]["content"] == "Hello! Ask me about Python or PostgreSQL."
    assert body["choices"][0]["finish_reason"] == "stop"
    ignored = client.chat("Hello!", max_tokens=40, ignore_eos=True).body
    assert ignored["usage"]["completion_tokens"] == 40
    least = client.chat("Hello!", max_tokens=40, min_tokens=30).body
    assert least["usage"]["completion_tokens"] >= 30


@pytest.mark.parametrize("keep", [False, True])
def test_stop_strings_end_a_text_between_and_inside_tokens(client, keep: bool) -> None:
    """Both ways: the string begins and ends inside of tokens, and its text is never sent."""
    whole = client.chat(max_tokens=30).body["choices"][0]["message"]["content"]
    stop = whole[21:29]
    fields = {"max_tokens": 30, "stop": ["never", stop], "include_stop_str_in_output": keep}
    body = client.chat(**fields).body
    cut = whole[: whole.index(stop) + len(stop) * keep]
    assert body["choices"][0]["message"]["content"] == cut
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] < 30
    events = client.stream(PATH, messages=QUESTION, **fields)
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == cut


def test_log_probabilities_of_every_token(client) -> None:
    body = client.chat(logprobs=True, top_logprobs=3).body
    content = body["choices"][0]["logprobs"]["content"]
    assert len(content) == 12
    text = "".join(each["token"] for each in content)
    assert text == body["choices"][0]["message"]["content"]
    for each in content:
        assert bytes(each["bytes"]).decode() == each["token"]
        assert len(each["top_logprobs"]) == 3
        best = each["top_logprobs"][0]
        assert (best["token"], best["logprob"]) == (each["token"], each["logprob"])  # greedy
    events = client.stream(
        PATH, messages=QUESTION, max_tokens=12, logprobs=True, top_logprobs=3, stop=["table zz"]
    )
    told = [e["choices"][0]["logprobs"] for e in events]
    assert [each for one in told if one for each in one["content"]] == content


def test_prompt_logprobs_tell_of_each_token_but_the_first(client) -> None:
    body = client.chat(prompt_logprobs=1, return_token_ids=True).body
    ids, told = body["prompt_token_ids"], body["prompt_logprobs"]
    assert len(ids) == len(told) == 17 and told[0] is None
    for token, given in zip(ids[1:], told[1:], strict=True):
        assert given[str(token)]["logprob"] <= 0
    assert len(body["choices"][0]["token_ids"]) == 12


def test_bias_penalties_and_allowed_tokens_choose_other_words(client) -> None:
    plain = client.chat().body["choices"][0]["message"]["content"]
    token = client("/tokenize", {"prompt": " table", "add_special_tokens": False}).body["tokens"][0]
    biased = client.chat(logit_bias={str(token): -100}).body["choices"][0]["message"]["content"]
    assert " table" in plain and " table" not in biased
    penalised = client.chat(presence_penalty=2, frequency_penalty=2).body
    assert penalised["choices"][0]["message"]["content"] != plain
    only = client.chat(allowed_token_ids=[token], max_tokens=3).body
    assert only["choices"][0]["message"]["content"] == " table" * 3


def test_the_same_seed_draws_the_same_text(client) -> None:
    drawn = [
        client.chat(temperature=1.2, seed=seed).body["choices"][0]["message"]["content"]
        for seed in (5, 5, 6, -1)
    ]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    filtered = client.chat(temperature=1.2, seed=5, top_k=1).body["choices"][0]["message"]
    assert filtered["content"] == client.chat().body["choices"][0]["message"]["content"]


def test_parts_of_text_developer_and_tool_messages_are_read(client) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "an index?"}]
    one = client.chat(messages=[{"role": "user", "content": parts}]).body
    assert one["choices"][0]["message"] == client.chat().body["choices"][0]["message"]
    template = client("/apply-template", {"messages": [{"role": "developer", "content": "Be."}]})
    assert template.body["prompt"].startswith("<|startoftext|><|im_start|>system\nBe.<|im_end|>")


def test_a_prompt_may_stop_before_the_answer(client) -> None:
    ends = {}
    for add in (True, False):
        fields = {"messages": QUESTION, "add_generation_prompt": add}
        ends[add] = client("/apply-template", fields).body["prompt"]
    assert ends[True] == f"{ends[False]}<|im_start|>assistant\n"


THINKING = """
{%- for message in messages -%}
    {{- "<|im_start|>" ~ message.role ~ "\n" ~ message.content ~ "<|im_end|>\n" -}}
{%- endfor -%}
{{- "<|im_start|>assistant\n" ~ ("" if enable_thinking is false else "<think>\n") -}}
"""


def test_thinking_that_the_template_opens_is_separated(serving, model) -> None:
    client = serving(model, max_rows=2, chat_template=THINKING)
    given = {"ignore_eos": True}
    body = client.chat(**given).body
    message = body["choices"][0]["message"]
    assert message["reasoning"] and message["reasoning"] == message["reasoning_content"]
    assert message["content"] == ""
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 12
    deltas = [
        e["choices"][0]["delta"]
        for e in client.stream(PATH, messages=QUESTION, max_tokens=12, **given)
    ]
    for name in ("reasoning", "reasoning_content"):
        assert "".join(delta.get(name, "") for delta in deltas) == message["reasoning"]
    assert not any(delta.get("content") for delta in deltas)
    hidden = client.chat(include_reasoning=False, **given).body["choices"][0]["message"]
    assert hidden.keys() == {"role", "content", "refusal"}
    for fields in (
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ):
        plain = client.chat(**fields).body["choices"][0]["message"]
        assert plain["content"] and "reasoning" not in plain
    item = client(
        "/v1/responses", {"input": "What is an index?", "max_output_tokens": 12, **given}
    ).body
    assert [each["type"] for each in item["output"]] == ["reasoning"]
    assert item["output"][0]["content"][0]["text"] == message["reasoning"]


def test_the_final_message_goes_on(client) -> None:
    messages = [*QUESTION, {"role": "assistant", "content": "A table"}]
    body = client.chat(messages=messages, continue_final_message=True, max_tokens=4).body
    plain = client.chat(max_tokens=6).body["choices"][0]["message"]["content"]
    assert "A table" + body["choices"][0]["message"]["content"] == plain
    both = client.chat(messages=messages, continue_final_message=True, add_generation_prompt=True)
    client.refused(both, "add_generation_prompt", "invalid_value")


def test_hits_of_the_prefix_cache_are_reported(client) -> None:
    long = [{"role": "user", "content": "Tell me of commits. " * 40}]
    first = client.chat(messages=long, cache_salt="one").body["usage"]
    again = client.chat(messages=long, cache_salt="one").body["usage"]
    other = client.chat(messages=long, cache_salt="two").body["usage"]
    cached = [each["prompt_tokens_details"]["cached_tokens"] for each in (first, again, other)]
    assert cached[0] == cached[2] == 0 and cached[1] >= 128


WRONG: list[tuple[dict[str, Any], str | None, str]] = [
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "Hi"}, "messages", "invalid_value"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "judge", "content": "Hi"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_value"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "messages[0].content[0]",
        "invalid_value",
    ),
    ({"max_tokens": "5"}, "max_tokens", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": 5000}, "messages", "context_length_exceeded"),
    ({"temperature": -1}, "temperature", "invalid_value"),
    ({"temperature": "hot"}, "temperature", "invalid_value"),
    ({"top_p": 2}, "top_p", "invalid_value"),
    ({"repetition_penalty": 5e-324}, "repetition_penalty", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 129}, "n", "invalid_value"),
    ({"n": True}, "n", "invalid_value"),
    ({"stop": [""]}, "stop", "invalid_value"),
    ({"stop": ["x"] * 65}, "stop", "invalid_value"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"4096": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"4": 101}}, "logit_bias", "invalid_value"),
    ({"logit_bias": [1]}, "logit_bias", "invalid_value"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
    ({"seed": 1.5}, "seed", "invalid_value"),
    ({"seed": 2**64}, "seed", "invalid_value"),
    ({"min_tokens": 50}, "min_tokens", "invalid_value"),
    ({"stop_token_ids": [9999]}, "stop_token_ids", "invalid_value"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "invalid_value"),
    ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
    ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
    ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
    ({"web_search_options": {}}, "web_search_options", "unsupported_parameter"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "unsupported_parameter"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "unsupported_parameter"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"tools": [{"type": "web"}]}, "tools[0]", "unsupported_parameter"),
    ({"tools": [{"type": "function"}]}, "tools[0]", "invalid_value"),
    ({"continue_final_message": 1}, "continue_final_message", "invalid_value"),
]


@pytest.mark.parametrize(("fields", "param", "code"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_fields_are_named(client, fields: dict[str, Any], param: str, code: str) -> None:
    client.refused(client.chat(**fields), param, code)


def test_fields_without_effect_are_accepted(client) -> None:
    from lfm2_fast.server.protocol import WITHOUT_EFFECT

    plain = client.chat().body["choices"]
    assert client.chat(**dict.fromkeys(WITHOUT_EFFECT, "x"), unknown=[1]).body["choices"] == plain
    neutral = {"functions": [], "function_call": "none", "use_beam_search": False, "audio": None}
    assert client.chat(**neutral, modalities=["text"]).body["choices"] == plain
