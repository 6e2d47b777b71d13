"""Application: every endpoint of a service, to run alone or inside another application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import lfm2_fast
from lfm2_fast.server.adapters import (
    LoadAdapterBody,
    UnloadAdapterBody,
    load_adapter,
    unload_adapter,
)
from lfm2_fast.server.chat import chat_completion
from lfm2_fast.server.completions import completion
from lfm2_fast.server.errors import ApiError
from lfm2_fast.server.http import ClientGone, answer, body_of, error_response, while_connected
from lfm2_fast.server.middleware import CORS, Gate
from lfm2_fast.server.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from lfm2_fast.server.responses import response
from lfm2_fast.server.responses_body import ResponsesBody
from lfm2_fast.server.service import Service
from lfm2_fast.server.state import health, models, properties, slots
from lfm2_fast.server.tokens import apply_template, detokenize, tokenize

# Endpoints of other servers that are refused, with advice.
REFUSED = {
    "/v1/embeddings": "load the model with sentence-transformers, as docs/usage/huggingface.md "
    "shows; this server writes text",
    "/v1/images/generations": "this model writes only text",
    "/v1/audio/speech": "this model writes only text",
    "/v1/audio/transcriptions": "this model reads only text",
    "/v1/messages": "use /v1/chat/completions",
    "/v1/load_lora_adapter": "start the server with --load-adapters, or with --adapter NAME=PATH",
    "/v1/unload_lora_adapter": "start the server with --load-adapters",
    "/v1/files": "use lfm2-fast batch on a file of requests",
    "/v1/batches": "use lfm2-fast batch on a file of requests",
}
GETS: dict[str, Callable[[Service], Awaitable[Any]]] = {
    "/health": health,
    "/v1/health": health,
    "/ping": health,
    "/v1/models": models,
    "/models": models,
    "/props": properties,
    "/slots": slots,
}


def application(service: Service) -> FastAPI:
    """Return the application of a service, which closes with it.

    If another application mounts this one, it must close the service.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="lfm2_fast",
        description="OpenAI-compatible service of a language model of the LFM2 family.",
        version=lfm2_fast.__version__,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    options = service.options
    app.add_middleware(Gate, api_keys=options.api_keys, max_body=options.max_body)
    if options.origins:
        app.add_middleware(CORSMiddleware, allow_origins=options.origins, **CORS)
    _handle_errors(app)
    schemas: dict[str, Any] = {}
    _add_answers(app, service, schemas)
    _add_facts(app, service)
    if options.page:
        _add_page(app)
    _describe(app, schemas)
    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(ClientGone)
    async def client_gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # the access log replaces it

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path = request.url.path[:200]
        messages = {404: f"there is no {path} here", 405: f"{path} has no {request.method}"}
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
        message = messages.get(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        return error_response(
            ApiError(message, status=error.status_code, code=code, headers=headers)
        )

    @app.exception_handler(Exception)
    async def any_error(request: Request, error: Exception) -> Response:
        message = f"the server failed: {type(error).__name__}; its log has more"
        return error_response(ApiError(message, status=500, code="internal_error"))


def _add_answers(app: FastAPI, service: Service, schemas: dict[str, Any]) -> None:
    """Add the endpoints that read a body."""

    def streaming(path: str, kind: type[BaseModel], begin: Any, summary: str) -> None:
        async def endpoint(request: Request) -> Response:
            return await answer(request, lambda data: begin(service, data))

        _post(app, path, kind, endpoint, summary, schemas)

    def plain(path: str, kind: type[BaseModel], work: Any, summary: str) -> None:
        async def endpoint(request: Request) -> Response:
            data = await body_of(request)
            return JSONResponse(await while_connected(request.receive, work(service, data)))

        _post(app, path, kind, endpoint, summary, schemas)

    streaming("/v1/chat/completions", ChatBody, chat_completion, "Answer messages.")
    streaming("/v1/completions", CompletionBody, completion, "Continue texts.")
    streaming("/v1/responses", ResponsesBody, response, "Answer items of a conversation.")
    plain("/tokenize", TokenizeBody, tokenize, "Token ids of a text.")
    plain("/detokenize", DetokenizeBody, detokenize, "Text of token ids.")
    plain("/apply-template", ChatBody, apply_template, "Messages in the chat template.")
    if service.options.loads_adapters:
        plain("/v1/load_lora_adapter", LoadAdapterBody, load_adapter, "Load an adapter.")
        plain("/v1/unload_lora_adapter", UnloadAdapterBody, unload_adapter, "Unload an adapter.")


def _post(
    app: FastAPI,
    path: str,
    kind: type[BaseModel],
    endpoint: Any,
    summary: str,
    schemas: dict[str, Any],
) -> None:
    """Add a POST endpoint, with the schema of its body."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schema.pop("$defs", {}))
    schemas[kind.__name__] = schema
    reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
    # Clients whose base URL has no /v1 find these too.
    if path.startswith("/v1/"):
        app.add_api_route(path[3:], endpoint, methods=["POST"], include_in_schema=False)
    app.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        summary=summary,
        name=path,
        responses=FAILS,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": reference}},
            }
        },
    )


FAILS: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "OpenAI's error object.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _add_facts(app: FastAPI, service: Service) -> None:
    """Add the endpoints that read no body."""

    def fact(path: str, work: Callable[[Service], Awaitable[Any]]) -> None:
        async def endpoint() -> Response:
            return JSONResponse(await work(service))

        app.add_api_route(path, endpoint, name=path, summary=work.__doc__, responses=FAILS)
        app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)

    for path, work in GETS.items():
        fact(path, work)

    @app.get("/version", summary="Return the version.", responses=FAILS)
    async def version() -> Response:
        return JSONResponse({"version": lfm2_fast.__version__})

    @app.get("/v1/models/{name:path}", summary="Return one model.", responses=FAILS)
    async def model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse((await models(service))["data"][service.names.index(name)])

    @app.get("/metrics", summary="Return metrics for Prometheus.")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4")

    def refuse(path: str, advice: str) -> None:
        async def endpoint() -> Response:
            message = f"{path} is not supported: {advice}"
            raise ApiError(message, status=404, code="unsupported_endpoint")

        app.add_api_route(path, endpoint, methods=["POST"], include_in_schema=False)

    for path, advice in REFUSED.items():
        if not (service.options.loads_adapters and "lora_adapter" in path):
            refuse(path, advice)


def _add_page(app: FastAPI) -> None:
    """Add the page for a conversation with the model. It loads nothing from other sites."""
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    policy = "; ".join(
        (
            "default-src 'none'",
            "script-src 'unsafe-inline'",
            "style-src 'unsafe-inline'",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'self'",
            "frame-ancestors 'none'",
        )
    )

    @app.get("/", include_in_schema=False)
    async def show() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})


def _describe(app: FastAPI, schemas: dict[str, Any]) -> None:
    """Put the bodies' schemas into the OpenAPI document."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        held = document.setdefault("components", {}).setdefault("schemas", {})
        held.update(schemas, Error=ERROR)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
