"""Errors as RFC 9457 problem documents: a stable code, a sentence, what to do; never a traceback or path."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, Field
from starlette.responses import Response

from lawnwatch.errors import InputError, LawnwatchError, Overloaded

MEDIA_TYPE = "application/problem+json"


class Problem(BaseModel):
    """Why a request failed."""

    type: str = Field(examples=["about:blank"])
    title: str = Field(examples=["Unsupported Media Type"])
    status: int = Field(examples=[415])
    detail: str = Field(examples=["The bytes are not a JPEG, PNG or WebP picture."])
    code: str = Field(examples=["unsupported_media"])
    hint: str = Field(examples=["Send a JPEG, PNG or WebP file."])


class UploadError(InputError):
    """The body is not the form that /predict reads."""

    status, code = 422, "bad_upload"


class ClientGone(Exception):
    """The client closed the connection; nobody waits for an answer."""


class BodyTooLarge(InputError):
    """The body has more bytes than allowed; refused before it is read, or where it passes the limit."""

    status, code = 413, "too_large"


class BodyTooSlow(InputError):
    """The body did not arrive in time."""

    status, code = 408, "too_slow"


class NotEnabled(InputError):
    """The server's settings keep this off."""

    status, code = 403, "not_enabled"


class SourceFailed(InputError):
    """The host of a URL did not give the picture."""

    status, code = 502, "fetch_failed"


class ModelFailed(LawnwatchError):
    """The model has no answer for a picture that is good: a fault of the server, whose log says why."""


class UnsupportedBody(InputError):
    """The Content-Type is none that /predict reads."""

    status, code = 415, "unsupported_media"


def problem(
    status: int, code: str, detail: str, hint: str = "", *, headers: dict[str, str] | None = None, path: str = ""
) -> Response:
    """A problem document as a response; below /v2 it also has the `error` that the Open Inference Protocol wants."""
    document = _document(status, code, detail, hint)
    if path.startswith("/v2"):
        document["error"] = detail
    return Response(json.dumps(document, ensure_ascii=False).encode(), status, headers=headers, media_type=MEDIA_TYPE)


def of(error: LawnwatchError, path: str = "") -> Response:
    """The response to an error that was raised on purpose, at a path."""
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(error.retry_after)
    elif error.status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = "2"
    elif error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = 'Bearer realm="lawnwatch"'
    return problem(error.status, error.code, error.message, error.hint, headers=headers, path=path)


def within(error: LawnwatchError) -> dict[str, Any]:
    """The problem of one picture among many, as a member of the answer."""
    return _document(error.status, error.code, error.message, error.hint)


def _document(status: int, code: str, detail: str, hint: str) -> dict[str, Any]:
    return {
        "type": "about:blank",
        "title": _phrase(status),
        "status": status,
        "detail": detail,
        "code": code,
        "hint": hint,
    }


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"
