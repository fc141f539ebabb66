"""Every failure as OpenAI's error body, `{"error": {"message", "type", "param", "code"}}`. Never 422, no traceback.

Statuses stand on the classes of `server/errors.py`; what FastAPI and Starlette raise themselves is translated here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from server.errors import EngramError, QueueFull, RequestError

KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "RequestEntityTooLargeError",
    429: "RateLimitError",
    431: "RequestHeadersTooLargeError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}
RETRY_AFTER = {"Retry-After": "1"}
LONGEST_MESSAGE = 400


def error_body(message: str, status: int, *, kind: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body; `code` is the status, as a number."""
    kind = kind or KINDS.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def body_of(error: EngramError) -> dict[str, Any]:
    return error_body(error.message, error.status, kind=error.kind, param=error.param)


class ErrorResponse(Response):
    """ASCII JSON: whatever text a client sent can be quoted, lone surrogates too."""

    media_type = "application/json"

    def __init__(self, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(json.dumps(body).encode(), body["error"]["code"], headers)


def response_of(error: EngramError) -> ErrorResponse:
    return ErrorResponse(body_of(error), RETRY_AFTER if isinstance(error, QueueFull) else None)


def install(app: FastAPI) -> None:
    """Answers for everything that a route, FastAPI or Starlette raises on purpose."""

    @app.exception_handler(EngramError)
    async def ours(request: Request, error: EngramError) -> Response:
        return response_of(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return response_of(validation_error(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        status = HTTPStatus(error.status_code)
        message = error.detail
        if message == status.phrase:
            message = f"{request.method} {request.url.path}: {status.phrase.lower()}; the routes are listed at /docs"
        return ErrorResponse(error_body(message, error.status_code), error.headers)


def validation_error(error: RequestValidationError) -> RequestError:
    """One line for the first field that is wrong; the branches of a union are named together."""
    errors = error.errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        return RequestError(f"the body is no valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    place = tuple(first["loc"])
    if len(place) == 1:  # the body as a whole: none, no object, or not sent as JSON
        return RequestError("the body must be a JSON object, sent with Content-Type: application/json")
    field = str(place[1])
    same = [each for each in errors if each["loc"][1:2] == (field,)]
    messages = list(dict.fromkeys(each["msg"].removeprefix("Value error, ") for each in same))
    text = f"{_path(place[1:]) if len(same) == 1 else field}: {', or '.join(messages)}"
    return RequestError(text[:LONGEST_MESSAGE], param=field)


def _path(place: tuple[Any, ...]) -> str:
    """("messages", 0, "role") → messages[0].role"""
    path = str(place[0])
    for part in place[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path
