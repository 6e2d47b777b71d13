"""Completions: lists of prompts, ids, echo, log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest

PATH = "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello!"}]}


def texts(answer: Any) -> list[str]:
    assert answer.status == 200, answer
    choices = answer.body["choices"]
    assert [each["index"] for each in choices] == list(range(len(choices)))
    return [each["text"] for each in choices]


def test_prompts_come_as_texts_and_ids_alone_and_in_lists(client) -> None:
    prompts = ["The csv module", "To create a new table,"]
    ids = [client("/tokenize", {"prompt": prompt}).body["tokens"] for prompt in prompts]
    alone = [texts(client.complete(prompt))[0] for prompt in prompts]
    assert texts(client.complete(prompts)) == alone
    assert texts(client.complete(ids)) == alone
    assert texts(client.complete(ids[1])) == alone[1:]
    many = texts(client.complete(prompts, n=2, temperature=1, seed=1))
    assert len(set(many)) == 4


def test_a_bias_keeps_tokens_away(client) -> None:
    fields = {"max_tokens": 20, "ignore_eos": True, "return_token_ids": True}
    likely = set(client.complete(**fields).body["choices"][0]["token_ids"])
    bias = {str(token): -100 for token in likely}
    written = client.complete(**fields, logit_bias=bias).body["choices"][0]["token_ids"]
    assert len(written) == 20 and not likely & set(written)


def test_the_end_of_the_context_ends_a_text(serving, model) -> None:
    client = serving(model, max_rows=1, max_model_len=64)
    body = client("/v1/chat/completions", {**HELLO, "ignore_eos": True}).body
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["total_tokens"] == 64


def test_each_spelling_of_tokenize_has_its_own_servers_default(client) -> None:
    """vLLM's begins a text, llama.cpp's does not, and that one may ask for pieces."""
    text = "An é 媽"
    begun = client("/tokenize", {"prompt": text}).body["tokens"]
    plain = client("/tokenize", {"content": text}).body["tokens"]
    assert begun == [client.service.tokenizer.bos_token_id, *plain]
    assert client("/tokenize", {"content": text, "add_special": True}).body["tokens"] == begun
    assert client("/detokenize", {"tokens": plain}).body["content"] == text
    pieces = client("/tokenize", {"content": text, "with_pieces": True}).body["tokens"]
    assert [each["id"] for each in pieces] == plain
    parts = [each["piece"] for each in pieces]
    assert "An" in parts and any(isinstance(part, list) for part in parts)
    raw = b"".join(part.encode() if isinstance(part, str) else bytes(part) for part in parts)
    assert raw.decode() == text


def test_sixteen_tokens_are_the_default(client) -> None:
    usage = client(PATH, {"prompt": "The csv module", "ignore_eos": True}).body["usage"]
    assert usage["completion_tokens"] == 16


@pytest.mark.parametrize("most", [0, 1, 5])
def test_an_echo_tells_the_prompt_and_its_log_probabilities(client, most: int) -> None:
    ids = client("/tokenize", {"prompt": "The csv module"}).body["tokens"]
    body = client.complete(ids, echo=True, logprobs=1, max_tokens=most).body
    choice = body["choices"][0]
    told = choice["logprobs"]
    assert choice["text"].startswith("<|startoftext|>The csv module")
    assert "".join(told["tokens"]) == choice["text"]
    assert len(told["tokens"]) == len(ids) + most == len(told["token_logprobs"])
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    for token, value, best in zip(
        told["tokens"][1:], told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True
    ):
        assert best[token] == value <= max(best.values())
    assert told["text_offset"][1] == len("<|startoftext|>")
    assert body["usage"]["completion_tokens"] == most
    events = client.stream(PATH, prompt=ids, echo=True, logprobs=1, max_tokens=most)
    assert "".join(each["choices"][0]["text"] for each in events) == choice["text"]
    columns = [each["choices"][0]["logprobs"] for each in events]
    for name in told:
        made = [value for each in columns for value in each[name]]
        if name == "top_logprobs":
            assert [best and sorted(best) for best in made] == [
                best and sorted(best) for best in told[name]
            ]
        elif name == "token_logprobs":
            assert made[0] is told[name][0] is None
            assert made[1:] == pytest.approx(told[name][1:], rel=1e-4)
        else:
            assert made == told[name]


def test_an_echo_shows_a_text_as_it_was_given(client) -> None:
    for fields in ({}, {"max_tokens": 0}):
        whole = client.complete("The csv module", echo=True, **fields).body["choices"][0]["text"]
        events = client.stream(
            PATH, prompt="The csv module", echo=True, **{"max_tokens": 12, **fields}
        )
        assert whole.startswith("The csv module")
        assert "".join(each["choices"][0]["text"] for each in events) == whole


def test_prompt_logprobs_without_an_echo(client) -> None:
    body = client.complete(prompt_logprobs=0).body["choices"][0]
    assert body["prompt_logprobs"][0] is None and len(body["prompt_logprobs"]) == 6


def test_a_prompt_is_cut_where_that_is_asked_for(client) -> None:
    ids = client("/tokenize", {"prompt": "The csv module"}).body["tokens"]
    cut = texts(client.complete("The csv module", truncate_prompt_tokens=3))
    assert cut == texts(client.complete(ids[-3:]))


def test_special_tokens_are_shown_where_that_is_asked_for(client) -> None:
    prompt = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    plain = texts(client.complete(prompt, max_tokens=40, ignore_eos=True))[0]
    shown = texts(
        client.complete(prompt, max_tokens=40, ignore_eos=True, skip_special_tokens=False)
    )[0]
    assert "<|im_end|>" in shown and "<|im_end|>" not in plain


def test_characters_of_several_tokens_come_whole(client) -> None:
    """Bytes that never become a character are shown too."""
    ids = client("/tokenize", {"prompt": "é", "add_special_tokens": False}).body["tokens"]
    assert len(ids) == 2
    for token, pieces in ((ids[0], ["\ufffd"] * 3), (ids[1], ["\ufffd"] * 3)):
        fields = {"prompt": "The csv module", "allowed_token_ids": [token], "max_tokens": 3}
        whole = client("/v1/completions", {**fields, "logprobs": 0}).body["choices"][0]
        assert whole["text"] == "".join(pieces)
        assert whole["logprobs"]["tokens"] == pieces
        events = client.stream(PATH, **fields)
        assert "".join(each["choices"][0]["text"] for each in events) == whole["text"]
    both = {"allowed_token_ids": ids, "max_tokens": 40, "temperature": 1, "seed": 4}
    whole = client("/v1/completions", {"prompt": "The", **both, "return_token_ids": True}).body
    made = b"".join(map(client.service.texts.bytes_of, whole["choices"][0]["token_ids"]))
    assert whole["choices"][0]["text"] == made.decode(errors="replace")
    assert "é" in whole["choices"][0]["text"]
    events = client.stream(PATH, prompt="The", **both)
    said = "".join(each["choices"][0]["text"] for each in events)
    assert said == whole["choices"][0]["text"]


WRONG: list[tuple[dict[str, Any], str | None, str]] = [
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": [[]]}, "prompt", "invalid_value"),
    ({"prompt": [1, "a"]}, "prompt", "invalid_value"),
    ({"prompt": [4096]}, "prompt", "invalid_value"),
    ({"prompt": [-1]}, "prompt", "invalid_value"),
    ({"prompt": {"a": 1}}, "prompt", "invalid_value"),
    ({"prompt": "a " * 4000}, "prompt", "context_length_exceeded"),
    ({"prompt": "a " * 4000, "stream": True}, "prompt", "context_length_exceeded"),
    ({"prompt": "a" * 300_000}, "prompt", "context_length_exceeded"),
    ({"logprobs": True}, "logprobs", "invalid_value"),
    ({"suffix": "x"}, "suffix", "unsupported_parameter"),
    ({"best_of": 3}, "best_of", "unsupported_parameter"),
]


@pytest.mark.parametrize(("fields", "param", "code"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_fields_are_named(client, fields: dict[str, Any], param: str, code: str) -> None:
    client.refused(client.complete(**fields), param, code)


def test_a_missing_prompt_is_named(client) -> None:
    client.refused(client(PATH, {}), "prompt", "missing_required_parameter")
