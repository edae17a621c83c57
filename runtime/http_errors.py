"""Errors on their way to an HTTP client: a status, a stable code and a sentence without paths."""

from __future__ import annotations

import logging

from starlette.responses import JSONResponse

from runtime.api import EngineClosed, QueueFull
from runtime.openai_format import NoSuchModel
from vlm.errors import UserError

RETRY_S = "1"


class HttpError(Exception):
    """Ends a request with this status and an OpenAI error object."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def error_response(error: HttpError) -> JSONResponse:
    kinds = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error"}
    headers = {"Retry-After": RETRY_S} if error.status in (429, 503) else None
    kind = kinds.get(error.status, "invalid_request_error")
    body = {"error": {"message": error.message, "type": kind, "param": None, "code": error.code}}
    return JSONResponse(body, error.status, headers)


def from_failure(error: Exception) -> HttpError:
    if isinstance(error, QueueFull):
        return HttpError(429, error.code, "too many requests are waiting; try again later")
    if isinstance(error, EngineClosed):
        return HttpError(503, error.code, "the server is shutting down")
    if isinstance(error, NoSuchModel):
        return HttpError(404, error.code, error.message)
    if isinstance(error, UserError):
        return HttpError(400, error.code, error.message)
    logging.getLogger(__name__).error("the model failed", exc_info=error)
    return HttpError(503, "model_failed", "the model failed on this request; the server's log says why")
