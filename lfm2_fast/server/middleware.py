"""Middleware of every request: its id, the access log, bounds of the body, the API key."""

from __future__ import annotations

import hmac
import re
import secrets
import time
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lfm2_fast.server.errors import ApiError
from lfm2_fast.server.http import ClientGone, error_response, log

# Paths that need no key: the check of a load balancer, and the page, which asks for the key.
OPEN = {"/", "/health", "/ping"}
# Options of Starlette's CORSMiddleware for the origins that may call.
CORS: dict[str, Any] = {
    "allow_methods": ["*"],
    "allow_headers": ["*"],
    "expose_headers": ["X-Request-Id", "Retry-After"],
}
_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Checks:
    """Checks of a request before its body is read, and of the body's size.

    If there are ``api_keys``, requests without one are refused. So are bodies of more than
    ``max_body`` bytes.
    """

    def __init__(self, api_keys: Sequence[str], max_body: int) -> None:
        self._keys = [key.encode() for key in api_keys]
        self._max_body = max_body

    def refusal(self, scope: Scope) -> ApiError | None:
        """Return why a request is refused before its body is read, None if it is not."""
        headers = Headers(scope=scope)
        preflight = scope["method"] == "OPTIONS"
        if self._keys and scope["path"] not in OPEN and not preflight and not self._knows(headers):
            return ApiError(
                "the API key is missing or wrong: send one as Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > self._max_body:
            return self._too_large()
        return None

    def _knows(self, headers: Headers) -> bool:
        """Return True if the request has a key. The time does not depend on the keys."""
        kind, _, value = headers.get("authorization", "").partition(" ")
        given = value.strip() if kind.lower() == "bearer" else ""
        given = given or headers.get("api-key", "") or headers.get("x-api-key", "")
        found = False
        for key in self._keys:
            found |= hmac.compare_digest(key, given.encode("latin-1"))  # the raw bytes
        return found

    def _too_large(self) -> ApiError:
        return ApiError(
            f"the body has more than the {self._max_body} bytes that this server reads; send less, "
            "or start the server with a larger --max-body",
            status=413,
            code="body_too_large",
            headers={"Connection": "close"},
        )

    def bounded(self, receive: Receive) -> Receive:
        """Return a ``receive`` that raises ApiError if a body grows too large."""
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_body:
                raise self._too_large()
            return message

        return bounded


class Gate:
    """ASGI middleware around all endpoints, which does the ``Checks``.

    A request's id is the client's X-Request-Id, else a new one. The answer has it as a header, and
    so has the access log.
    """

    def __init__(self, app: ASGIApp, *, api_keys: Sequence[str], max_body: int) -> None:
        self.app, self._checks = app, Checks(api_keys, max_body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        id = given if _ID.fullmatch(given) else f"req-{secrets.token_hex(8)}"
        status = 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = id
            await send(message)

        try:
            if error := self._checks.refusal(scope):
                await error_response(error)(scope, receive, sent)
                return
            await self.app(scope, self._checks.bounded(receive), sent)
        except ClientGone:
            status = status or 499
        except ApiError as error:
            # Raised in the middle of a body, where the framework looks for no errors.
            if status:
                raise
            await error_response(error)(scope, receive, sent)
        finally:
            client = scope.get("client") or ("-", 0)
            path = scope["path"].encode("unicode_escape").decode()[:200]
            seconds = time.perf_counter() - begin
            log.info(
                '%s "%s %s" %s %s %.3fs', client[0], scope["method"], path, status, id, seconds
            )
