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


class BodyTooLarge(InputError):
    """The body has more bytes than allowed; refused before it is read, or where it passes the limit."""

    status, code = 413, "too_large"


class BodyTooSlow(InputError):
    """The body did not arrive in time."""

    status, code = 408, "too_slow"


class UnsupportedBody(InputError):
    """The Content-Type is none that /predict reads."""

    status, code = 415, "unsupported_media"


def problem(status: int, code: str, detail: str, hint: str = "", *, headers: dict[str, str] | None = None) -> Response:
    """A problem document as a response."""
    document: dict[str, Any] = {
        "type": "about:blank",
        "title": _phrase(status),
        "status": status,
        "detail": detail,
        "code": code,
        "hint": hint,
    }
    return Response(json.dumps(document, ensure_ascii=False).encode(), status, headers=headers, media_type=MEDIA_TYPE)


def of(error: LawnwatchError) -> Response:
    """The response to an error that was raised on purpose."""
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(error.retry_after)
    elif error.status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = "2"
    return problem(error.status, error.code, error.message, error.hint, headers=headers)


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"
