"""Errors as OpenAI's clients read them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lfm2_fast.engine.async_engine import EngineStopped
from lfm2_fast.engine.engine import QueueFull

# A path into the body at the beginning of a message: "messages[0].content must be ...".
_PATH = re.compile(r"^(messages\[\d+\][\w.\[\]]*|[a-z_]+(?= must |=))")


class ApiError(Exception):
    """Error as an answer: its HTTP status, and OpenAI's error object.

    ``param`` is the wrong field, ``code`` a word for programs. ``headers`` are those of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """Word for the kind of the error, by its status."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
        kinds |= {499: "client_closed", 503: "overloaded_error", 504: "timeout_error"}
        return kinds.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def refused(message: str, param: str, code: str = "unsupported_parameter") -> ApiError:
    """Return the error of a field, or of a value of it, that is not supported."""
    return ApiError(message, param=param, code=code)


def of_value_error(error: ValueError, param: str | None = None) -> ApiError:
    """Return the error of a value that lower code refused, with the field if it is known."""
    message = str(error)
    found = _PATH.match(message)
    return ApiError(message, param=found[0] if found else param, code="invalid_value")


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return the error of a wrong body, from pydantic's list."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    where = first["loc"]
    param = str(where[0]) if where else None
    if param is None:
        return ApiError("the body must be a JSON object", code="invalid_type")
    if first["type"] == "missing":
        return ApiError(f"{param} is required", param=param, code="missing_required_parameter")
    own = [each for each in errors if each["loc"][:1] == where[:1]]
    said = list(dict.fromkeys(each["msg"] for each in own))
    return ApiError(f"{param}: {'; or '.join(said[:4])}", param=param, code="invalid_value")


def of_engine(error: BaseException, retry_after: int = 1) -> ApiError:
    """Return the error of an engine's exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(
            f"the server is busy: {error}",
            status=503,
            code="queue_full",
            headers={"Retry-After": str(retry_after)},
        )
    if isinstance(error, EngineStopped):
        return ApiError(f"the server is shutting down: {error}", status=503, code="engine_stopped")
    if isinstance(error, ValueError):
        return of_value_error(error)
    return ApiError(
        f"the request failed: {type(error).__name__}: {error}", status=500, code="engine_error"
    )
