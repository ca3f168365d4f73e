"""What the OpenAPI document says beyond the routes' own types: errors, bodies, keys."""

from __future__ import annotations

from functools import cache
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from lawnwatch.serving import problems, schemas
from lawnwatch.serving.clients import needed_scope

# Which codes a status may carry, each with what it means; the examples are real answers.
FAILURES: dict[int, dict[str, str]] = {
    400: {"bad_request": "Something in the request is malformed.", "blocked": "A URL that is never fetched."},
    401: {"unauthorized": "Keys are required, and this request has no good one."},
    403: {"forbidden": "The key has not the scope.", "not_enabled": "The server's settings keep this off."},
    404: {"not_found": "There is no such thing."},
    408: {"too_slow": "The body did not arrive in time."},
    413: {"too_large": "More bytes than allowed; decided before reading them."},
    415: {"unsupported_media": "Neither JPEG, PNG nor WebP, or a Content-Type that is not read here."},
    422: {
        "corrupt": "The picture is truncated or damaged.",
        "too_many_pixels": "More pixels than allowed; decided before decoding them.",
        "bad_upload": "The form is not what is read here.",
        "bad_request": "A parameter is out of range.",
    },
    500: {"internal": "A fault of the server; its log has it under the request's id."},
    502: {"fetch_failed": "The picture's host did not give it."},
    503: {
        "no_model": "No verified model is loaded yet.",
        "overloaded": "Every place is taken, or this client asks too often; Retry-After says when to try again.",
        "draining": "The server is ending; another takes over.",
        "unavailable": "The database or the store does not answer.",
    },
}
BODIES = (schemas.PictureUrl, schemas.V2Request)
SCHEMAS = "#/components/schemas/{model}"
BINARY = {"schema": {"type": "string", "format": "binary"}}


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that can fail with these statuses; each can fail with 500."""
    return {status: _failure(status) for status in (*statuses, 500)}


def form(picture: dict[str, Any], **others: dict[str, Any]) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads a form with the field `file`, or other media types."""
    schema = {
        "type": "object",
        "required": ["file"],
        "properties": {"file": picture},
        "additionalProperties": False,
    }
    content = {
        "multipart/form-data": {"schema": schema},
        **{kind.replace("_", "/"): one for kind, one in others.items()},
    }
    return {"requestBody": {"required": True, "content": content}}


def json_body(kind: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads a JSON body of this kind."""
    schema = {"$ref": SCHEMAS.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def complete(app: FastAPI) -> None:
    """Let the app's document hold the problem's schema, and say which routes ask for a key. All routes are there."""
    make = app.openapi

    @cache
    def document() -> dict[str, Any]:
        made = make()
        parts = made.setdefault("components", {})
        for name in ("HTTPValidationError", "ValidationError"):
            parts.setdefault("schemas", {}).pop(name, None)
        for kind in (problems.Problem, *BODIES):  # what routes read or raise themselves
            schema = kind.model_json_schema(ref_template=SCHEMAS)
            parts["schemas"] |= schema.pop("$defs", {}) | {kind.__name__: schema}
        parts["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, where the server requires one."},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        for path, operations in made["paths"].items():
            for operation in operations.values():
                # FastAPI adds its own error to whatever has a parameter; ours are said by each route.
                if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                    del operation["responses"]["422"]
                if needed_scope(path) is None:
                    continue
                operation["security"] = [{}, {"bearer": []}, {"header": []}]  # none, where keys are not required
                operation["responses"] |= {str(status): _failure(status) for status in (401, 403)}
        return made

    app.openapi = document  # type: ignore[method-assign]


def _failure(status: int) -> dict[str, Any]:
    codes = FAILURES[status]
    meanings = "\n".join(f"- `{code}`: {meaning}" for code, meaning in codes.items())
    title = HTTPStatus(status).phrase
    examples = {
        code: {
            "value": {
                "type": "about:blank",
                "title": title,
                "status": status,
                "detail": meaning,
                "code": code,
                "hint": "What to do next.",
            }
        }
        for code, meaning in codes.items()
    }
    return {
        "description": f"{title}\n\n{meanings}",
        "content": {
            problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": examples},
        },
    }
