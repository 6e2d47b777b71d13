"""OpenAI's own client, against a server that it cannot tell from the original."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest

openai = pytest.importorskip("openai", reason="`make test-clients` installs openai")
pydantic = pytest.importorskip("pydantic")

QUESTION = [{"role": "user", "content": "What is an index?"}]


class Trip(pydantic.BaseModel):
    city: Literal["Rome", "Oslo"]
    days: Literal[1, 2, 3]


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "book",
        "parameters": {**Trip.model_json_schema(), "additionalProperties": False},
    },
}
FORCED: dict[str, Any] = {"type": "function", "function": {"name": "book"}}


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_chat_whole_and_streamed(client: Any) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_tokens": 20}
    whole = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    text = whole.choices[0].message.content
    assert text and whole.usage.completion_tokens == len(whole.choices[0].logprobs.content) == 20
    stream = client.chat.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.completion_tokens == 20
    hello = [{"role": "user", "content": "Hello!"}]
    with client.chat.completions.stream(model="tiny", messages=hello) as managed:
        for _ in managed:
            pass
        said = managed.get_final_completion().choices[0].message.content
    assert said == "Hello! Ask me about Python or PostgreSQL."


def test_parsed_answers(client: Any) -> None:
    made = client.chat.completions.parse(
        model="tiny", messages=QUESTION, response_format=Trip, max_tokens=80
    )
    assert isinstance(made.choices[0].message.parsed, Trip)
    response = client.responses.parse(
        model="tiny", input="What is an index?", text_format=Trip, max_output_tokens=80
    )
    assert isinstance(response.output_parsed, Trip)


def test_tool_calls_whole_and_streamed(client: Any) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": list(QUESTION), "max_tokens": 80}
    fields |= {"tools": [TOOL], "tool_choice": FORCED, "parallel_tool_calls": False}
    message = client.chat.completions.create(**fields).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "book" and Trip(**json.loads(call.function.arguments))
    with client.chat.completions.stream(**fields) as stream:
        for _ in stream:
            pass
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments
    fields["messages"] += [message, {"role": "tool", "tool_call_id": call.id, "content": "Done."}]
    assert client.chat.completions.create(**{**fields, "tool_choice": "none"}).choices


def test_completions(client: Any) -> None:
    made = client.completions.create(
        model="tiny", prompt=["The csv module", "To create"], max_tokens=5, logprobs=2, echo=True
    )
    assert [choice.index for choice in made.choices] == [0, 1]
    assert made.choices[0].text.startswith("The csv module")


def test_responses_whole_and_streamed(client: Any) -> None:
    fields: dict[str, Any] = {"model": "tiny", "input": "Hello!"}
    cut = client.responses.create(**fields, max_output_tokens=3)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    whole = client.responses.create(**fields)
    assert whole.status == "completed"
    with client.responses.stream(**fields) as stream:
        said = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == said == whole.output_text
    tool = {"type": "function", **TOOL["function"]}
    made = client.responses.create(
        **fields, tools=[tool], tool_choice={"type": "function", "name": "book"}
    )
    assert made.output[0].type == "function_call" and Trip(**json.loads(made.output[0].arguments))


def test_errors_are_of_their_classes(client: Any, url: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="a " * 5000)
    assert long.value.code == "context_length_exceeded" and long.value.param == "prompt"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()
