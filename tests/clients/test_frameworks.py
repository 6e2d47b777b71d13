"""Frameworks on top of OpenAI's API: tools, parsed answers and streams through their own code."""

from __future__ import annotations

from typing import Any, Literal

import pytest

pydantic = pytest.importorskip("pydantic")
WHY = "`make test-clients` installs it"


class Trip(pydantic.BaseModel):
    """A trip."""

    city: Literal["Rome", "Oslo"]
    days: Literal[1, 2, 3]


class Closed(Trip, extra="forbid"):
    """A trip of nothing more, which ends where a small model would go on."""


def test_pydantic_ai(url: str) -> None:
    ai = pytest.importorskip("pydantic_ai", reason=WHY)
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="secret")
    model = OpenAIChatModel("tiny", provider=provider)
    settings = {"max_tokens": 80}
    # Its output tool is required, so that the answer is a call.
    agent = ai.Agent(model, output_type=Trip, model_settings=settings)
    assert isinstance(agent.run_sync("Where to?").output, Trip)
    native = ai.Agent(model, output_type=ai.NativeOutput(Trip), model_settings=settings)
    assert isinstance(native.run_sync("Where to?").output, Trip)

    def weather(city: Literal["Rome", "Oslo"]) -> str:
        """The weather of a city."""
        return f"Rain in {city}."

    # The format of the last answer goes with every request, beside the tools.
    settings = {"max_tokens": 400}
    agent = ai.Agent(
        model, output_type=ai.NativeOutput(Closed), tools=[weather], model_settings=settings
    )
    assert isinstance(agent.run_sync("Where to?").output, Closed)
    plain = ai.Agent(model, model_settings={"max_tokens": 40})
    assert plain.run_sync("Hello!").output == "Hello! Ask me about Python or PostgreSQL."


def test_langchain(url: str) -> None:
    langchain = pytest.importorskip("langchain_openai", reason=WHY)
    model = langchain.ChatOpenAI(
        model="tiny", base_url=f"{url}/v1", api_key="secret", max_tokens=80, max_retries=0
    )
    whole = model.invoke("Hello!")
    assert whole.content == "Hello! Ask me about Python or PostgreSQL."
    assert whole.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in model.stream("Hello!")) == whole.content
    for method in ("function_calling", "json_schema"):
        made = model.with_structured_output(Trip, method=method).invoke("Where to?")
        assert isinstance(made, Trip), method
    bound = model.bind_tools([Trip], tool_choice="Trip", parallel_tool_calls=False)
    (call,) = bound.invoke("Where to?").tool_calls
    assert Trip(**call["args"])


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "RESPONSES_TOOLS"])
def test_instructor(url: str, mode: str) -> None:
    instructor = pytest.importorskip("instructor", reason=WHY)
    openai = pytest.importorskip("openai", reason=WHY)
    own = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
    client = instructor.from_openai(own, mode=instructor.Mode[mode])
    fields = {"model": "tiny", "messages": [{"role": "user", "content": "Where to?"}]}
    made = client.create(response_model=Closed, max_retries=0, **fields)
    assert isinstance(made, Closed)
    if mode in ("TOOLS", "JSON_SCHEMA"):
        *_, last = client.create_partial(response_model=Closed, max_retries=0, **fields)
        assert Closed(**last.model_dump())


def test_litellm(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would be fetched
    litellm = pytest.importorskip("litellm", reason=WHY)
    fields: dict[str, Any] = {
        "model": "openai/tiny",
        "api_base": f"{url}/v1",
        "api_key": "secret",
        "messages": [{"role": "user", "content": "Hello!"}],
        "max_tokens": 40,
    }
    whole = litellm.completion(**fields).choices[0].message.content
    assert whole == "Hello! Ask me about Python or PostgreSQL."
    chunks = litellm.completion(**fields, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    with pytest.raises(litellm.exceptions.ContextWindowExceededError):
        messages = [{"role": "user", "content": "a " * 5000}]
        litellm.completion(**{**fields, "messages": messages}, num_retries=0)
