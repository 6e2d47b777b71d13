"""Front: takes requests over HTTP and passes each to a replica."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lfm2_fast.server.errors import ApiError
from lfm2_fast.server.http import error_response
from lfm2_fast.server.middleware import CORS, OPEN, Checks

log = logging.getLogger("ray.serve")
# Keys of an ASGI scope that a replica's application reads.
SCOPE = (
    "type asgi http_version method scheme path raw_path query_string root_path headers client "
    "server"
).split()
# Endpoints about one engine. A service of several has no single answer to them.
OF_ONE_ENGINE = ("/metrics", "/slots")


class Front:
    """Deployment that reads a request's body and relays the answer of a replica.

    ``keys`` returns the API keys. A request without one is refused before its body is read. So is
    one whose body has more than ``max_body`` bytes. If a replica dies, its requests end with an
    error: an HTTP status, or the last event of a stream. Pages of ``origins`` may read errors.
    """

    def __init__(
        self,
        replicas: Any,
        keys: Callable[[], Sequence[str]],
        max_body: int,
        origins: Sequence[str] = (),
    ) -> None:
        self._answer = replicas.options(stream=True).answer
        self._checks = Checks(keys(), max_body)
        self._origins = origins

    async def __call__(self, request: Request) -> Response:
        """Return the answer to a request."""
        if error := self._checks.refusal(request.scope):
            return Refusal(error, self._origins)
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        if path in OF_ONE_ENGINE:
            message = f"{path} is about one engine, and this service has several: read Ray's"
            message += " metrics, which have the numbers of each replica"
            error = ApiError(message, status=404, code="unsupported_endpoint")
            return Refusal(error, self._origins)
        try:
            body = await self._body(request)
        except ApiError as error:
            return Refusal(error, self._origins)
        except ClientDisconnect:
            return Response(status_code=499)
        scope = {key: request.scope[key] for key in SCOPE if key in request.scope}
        return Relay(self._answer.remote(scope, body), self._origins)

    async def _body(self, request: Request) -> bytes:
        # No other endpoint reads a body. The body of a client without a key must not be read.
        if request.method != "POST" or request.scope["path"] in OPEN:
            return b""
        return await Request(request.scope, self._checks.bounded(request.receive)).body()


class Refusal(Response):
    """Error of a front itself, which pages of ``origins`` may read."""

    def __init__(self, error: ApiError, origins: Sequence[str]) -> None:
        self._app: ASGIApp = error_response(error)
        if origins:
            self._app = CORSMiddleware(self._app, allow_origins=origins, **CORS)
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the error."""
        await self._app(scope, receive, send)


class Relay(Response):
    """Response of a replica, message by message; pages of ``origins`` may read its errors."""

    def __init__(self, messages: Any, origins: Sequence[str]) -> None:
        self._messages, self._origins = messages, origins
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer. A failure becomes a whole error, or the last event of a stream."""
        start: Message | None = None
        whole = False
        try:
            async for message in self._each():
                if message["type"] == "http.response.start":
                    # Ray Serve sets the same header.
                    del MutableHeaders(scope=message)["x-request-id"]
                    start = message
                else:
                    whole = not message.get("more_body")
                await send(message)
        except (RayError, BackPressureError) as error:
            if whole:
                return
            log.warning("a request failed: %s", error)
            if start is None:
                await Refusal(failure(error), self._origins)(scope, receive, send)
            elif not Headers(scope=start).get("content-type", "").startswith("text/event-stream"):
                # Its announced length tells the client that it is cut.
                raise
            else:
                body = last_event(scope["path"], failure(error))
                await send({"type": "http.response.body", "body": body, "more_body": False})
        finally:
            self._messages.cancel()

    async def _each(self) -> AsyncIterator[Message]:
        async for messages in self._messages:
            for message in messages:
                yield message


def failure(error: Exception) -> ApiError:
    """Return the error of a request that no replica answered to its end."""
    if isinstance(error, BackPressureError):
        message, code = "the server is busy: too many requests wait", "queue_full"
    else:
        message, code = "the replica that had this request has left; send it again", "replica_lost"
    return ApiError(message, status=503, code=code, headers={"Retry-After": "1"})


def last_event(path: str, error: ApiError) -> bytes:
    """Return the end of a stream of events that failed."""
    if path.endswith("/responses"):
        body = {"type": "error", "code": error.code, "message": str(error), "param": error.param}
        return f"event: error\ndata: {json.dumps(body)}\n\n".encode()
    return f"data: {json.dumps(error.body)}\n\ndata: [DONE]\n\n".encode()
