"""Fields of requests: their types, and the reasons if one is refused or has no effect.

Unknown fields are ignored. A field that would change an answer, but is not supported, is refused by
name, unless its value has no effect.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from lfm2_fast.server.errors import ApiError, of_validation, refused

Text = Annotated[str, Field(min_length=1, max_length=1024)]
Token = Annotated[int, Field(ge=0)]
Tokens = Annotated[list[Token], Field(fail_fast=True)]
Count = Annotated[int, Field(ge=0, le=20)]
Whole = Annotated[int, Field(ge=0, le=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
# Objects that are read elsewhere, as the OpenAPI document shows them.
_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"enum": ["text"]}, "text": {"type": "string"}},
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "null"}, {"type": "array", "items": _PART}]}
_ROLES = ["system", "developer", "user", "assistant", "tool"]
_NAMED = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "description": {"type": "string"},
        "parameters": {"type": "object"},
    },
}
Message = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "required": ["role"],
            "properties": {"role": {"enum": _ROLES}, "content": _CONTENT},
        }
    ),
]
Tool = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "required": ["type", "function"],
            "properties": {"type": {"enum": ["function"]}, "function": _NAMED},
        }
    ),
]

# Fields with an effect in other servers and none here, with the reason.
WITHOUT_EFFECT = {
    "user": "no account is kept",
    "safety_identifier": "no account is kept",
    "metadata": "nothing is stored",
    "store": "nothing is stored",
    "service_tier": "there is one tier",
    "prompt_cache_key": "every prompt finds the pages of those that begin alike",
    "prompt_cache_retention": "pages stay until others need them",
    "prediction": "a hint for speed",
    "verbosity": "the models have no such setting",
    "length_penalty": "it belongs to beam search",
    "cache_prompt": "prompts are always cached",
    "spaces_between_special_tokens": "the tokenizers of these models add none",
    "mm_processor_kwargs": "there are no images or sounds to process",
    "request_id": "the header X-Request-Id names a request",
}
# Fields that would change the answer: their values without effect, and advice.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), "this model writes only text"),
    "functions": (([],), "use tools"),
    "function_call": (("none", "auto"), "use tool_choice"),
    "web_search_options": ((), "this server opens no pages; give the model a tool that does"),
    "suffix": (("",), "these models were not trained to fill gaps"),
    "echo": ((False,), "a chat completion holds the answer alone; /v1/completions echoes"),
    "use_beam_search": ((False,), "sample n answers and choose"),
    "best_of": ((), "ask for n and choose"),
    "bad_words": (([],), "use logit_bias"),
    "chat_template": ((), "a template is code: give it to the server as --chat-template"),
    "documents": (([],), "put them into a message"),
    "thinking_token_budget": ((), "bound the whole answer by max_completion_tokens"),
    "structural_tag": ((), "use response_format, structured_outputs or tools"),
    "adapter": ((), "name the adapter as model"),
    "lora": (([],), "name the adapter as model"),
    "kv_transfer_params": ((), "pages stay in this process"),
    "prompt_embeds": ((), "send text or token ids"),
}

M = TypeVar("M", bound=BaseModel)


class Body(BaseModel):
    """Body of a request: strict types; unknown fields are kept, to name refused ones in errors."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampled(Body):
    """Fields that chat, completions and responses have in common."""

    model: str | None = None
    stream: bool | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[Tokens, Field(max_length=64)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Whole | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: Tokens | None = None
    prompt_logprobs: Count | None = None
    return_token_ids: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    grammar: str | None = Field(None, description="A grammar in GBNF, as llama.cpp takes it.")
    json_schema: dict[str, Any] | None = None


class Choices(Sampled):
    """Fields of endpoints with several choices."""

    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream_options: StreamOptions | None = None


class ChatBody(Choices):
    """Body of a chat completion."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    tools: Annotated[list[Tool], Field(max_length=1024)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    modalities: list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None


class CompletionBody(Choices):
    """Body of a completion."""

    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=2048)]
        | Annotated[Tokens, Field(min_length=1)]
        | Annotated[list[Tokens], Field(fail_fast=True, min_length=1, max_length=2048)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    echo: bool | None = None
    logprobs: Count | None = None
    add_special_tokens: bool | None = None


class TokenizeBody(Body):
    """Body of /tokenize: a text, or messages in the chat template."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = Field(None, description="llama.cpp's name for prompt.")
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None
    with_pieces: bool | None = Field(None, description="llama.cpp's: each id beside its text.")


class DetokenizeBody(Body):
    """Body of /detokenize."""

    model: str | None = None
    tokens: Tokens


def parse(kind: type[M], data: bytes | str) -> M:
    """Return a checked body. Raises ApiError for wrong and for refused fields."""
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        raise of_validation(error.errors(include_url=False, include_input=False)) from None
    except (RecursionError, ValueError) as error:
        raise ApiError(f"the body cannot be read: {error}", code="invalid_json") from None
    check_refused(body)
    return body


def check_refused(body: BaseModel) -> None:
    """Raise ApiError for a field of REFUSED with a value that would have an effect."""
    for name, value in (body.model_extra or {}).items():
        neutral, advice = REFUSED.get(name, ((value,), ""))
        if value is not None and value not in neutral:
            raise refused(f"{name} is not supported: {advice}", name)
