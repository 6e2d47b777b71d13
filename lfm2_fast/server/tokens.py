"""``/tokenize``, ``/detokenize`` and ``/apply-template``."""

from __future__ import annotations

from typing import Any

from lfm2_fast.server.chat import variables_of
from lfm2_fast.server.errors import ApiError
from lfm2_fast.server.protocol import ChatBody, DetokenizeBody, TokenizeBody, parse
from lfm2_fast.server.service import Service, in_thread
from lfm2_fast.server.tools import tools_of


async def tokenize(service: Service, data: bytes) -> dict[str, Any]:
    """Return the token ids of a text, or of messages in the chat template. Raises ApiError."""
    body = parse(TokenizeBody, data)
    service.check_model(body.model)
    special = body.add_special if body.add_special_tokens is None else body.add_special_tokens
    text = body.content if body.prompt is None else body.prompt
    if special is None:
        # Each spelling has its own server's default.
        special = body.prompt is not None
    if body.messages is not None:
        text = await service.chat_prompt(body, body.tools or (), body.chat_template_kwargs)
    if text is None:
        raise ApiError(
            "prompt or messages is required", param="prompt", code="missing_required_parameter"
        )
    ids = await service.tokens_of(text, special=special, room=False)
    strings = [service.texts.text(id) for id in ids] if body.return_token_strs else None
    return {
        "count": len(ids),
        "max_model_len": service.max_length,
        "tokens": [_piece(service, id) for id in ids] if body.with_pieces else ids,
        "token_strs": strings,
    }


def _piece(service: Service, id: int) -> dict[str, Any]:
    """Return an id beside its text, or beside its bytes where these are no whole characters."""
    found = service.texts.bytes_of(id)
    try:
        return {"id": id, "piece": found.decode()}
    except UnicodeDecodeError:
        return {"id": id, "piece": list(found)}


async def detokenize(service: Service, data: bytes) -> dict[str, Any]:
    """Return the text of token ids, special tokens included. Raises ApiError."""
    body = parse(DetokenizeBody, data)
    service.check_model(body.model)
    wrong = [token for token in body.tokens if token >= service.vocab_size]
    if wrong:
        raise ApiError(
            f"tokens has {wrong[0]}, which is not in the vocabulary of {service.vocab_size}",
            param="tokens",
            code="invalid_value",
        )
    decode = service.tokenizer.backend_tokenizer.decode
    text = await in_thread(
        lambda: str(decode(body.tokens, skip_special_tokens=False)), len(body.tokens)
    )
    return {"prompt": text, "content": text}


async def apply_template(service: Service, data: bytes) -> dict[str, Any]:
    """Return messages in the chat template, as llama.cpp's server does. Raises ApiError."""
    body = parse(ChatBody, data)
    service.check_model(body.model)
    text = await service.chat_prompt(body, tools_of(body).shown, variables_of(body))
    return {"prompt": text}
