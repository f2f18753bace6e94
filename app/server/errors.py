"""Every error in OpenAI's form, with the status that fits it."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from compose.app.jobs import INTERNAL, Busy, NoJob
from compose.errors import ComposeError


class NotFound(ComposeError):
    """What the address names is not there."""


def install(app: FastAPI) -> None:
    """Answer errors of the app in our form."""
    app.add_exception_handler(ComposeError, _ours)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)


def status_of(error: ComposeError) -> int:
    """The HTTP status of an error of ours."""
    if isinstance(error, Busy):
        return 429
    return 404 if isinstance(error, NoJob | NotFound) else 400


def body_of(status: int, message: str) -> dict[str, Any]:
    """`{"error": ...}` as OpenAI writes it."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": str(status)}}


def failed(message: str) -> tuple[int, str]:
    """Status and message of a job that failed: ours to mend, or the caller's."""
    return (500 if message == INTERNAL else 400), message


def answer(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error as a response. ASCII only: what strangers sent may be no valid text."""
    body = json.dumps(body_of(status, message))
    return Response(body, status, headers, "application/json")


async def _ours(request: Request, error: ComposeError) -> Response:
    later = {"Retry-After": "5"} if isinstance(error, Busy) else None
    return answer(status_of(error), str(error), later)


async def _http(request: Request, error: HTTPException) -> Response:
    return answer(error.status_code, str(error.detail), dict(error.headers or {}))


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:3])
    return answer(422, "; ".join(faults))
