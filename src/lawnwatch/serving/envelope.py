"""Around every request: its id, security headers, counting, and a plain 500 for what nobody foresaw."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lawnwatch import log
from lawnwatch.ids import random_bytes
from lawnwatch.serving import problems
from lawnwatch.serving.admission import header
from lawnwatch.serving.metrics import METHODS, Metrics
from lawnwatch.serving.problems import ClientGone

logger = log.get(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
CLIENT_CLOSED_REQUEST = 499

SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-site"),
    (b"cache-control", b"no-store"),
)
CLOSED_POLICY = b"default-src 'none'; frame-ancestors 'none'"
# The documentation page: its own script, style and pictures, and requests to this API; nothing from elsewhere.
DOCS = "/docs"
DOCS_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# A report shows strangers' text: its own style and pictures, and nothing that runs or loads.
REPORTS = "/reports/"
REPORT_POLICY = b"default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'none'"


class Envelope:
    """The outermost middleware.

    Args:
        route_of: the template of a path that was answered before it was routed; None when it is none of ours.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, route_of: Callable[[str], str | None]) -> None:
        self._app = app
        self._metrics = metrics
        self._route_of = route_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = CLIENT_CLOSED_REQUEST
        policy = _policy(scope["path"])
        # HEAD is GET whose body the server leaves out; a copy, for the server and the count go by the method sent.
        asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        body_waits, receive = _announced(scope, receive)

        async def sealed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    *SECURITY_HEADERS,
                    (b"content-security-policy", policy),
                    (b"x-request-id", request_id.encode()),
                ]
                if body_waits():  # nobody knows whether it comes: there is no clear next request
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(asked, receive, sealed)
        except ClientGone:
            pass
        except Exception as error:  # the last resort: logged in full, told in a sentence
            logger.exception("unforeseen fault", path=scope["path"], request_id=request_id, error=str(error))
            if status == CLIENT_CLOSED_REQUEST:
                response = problems.problem(
                    500,
                    "internal",
                    "Something failed here that nobody foresaw.",
                    f"The log has it under request {request_id}.",
                )
                await response(scope, receive, sealed)
        finally:
            self._metrics.in_flight.dec()
            route = getattr(asked.get("route"), "path", None) or self._route_of(scope["path"]) or "other"
            self._count(route, scope["method"], status, time.perf_counter() - started)

    def _count(self, route: str, method: str, status: int, seconds: float) -> None:
        method = method if method in METHODS else "other"
        self._metrics.requests.labels(route, method, str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)


def _announced(scope: Scope, receive: Receive) -> tuple[Callable[[], bool], Receive]:
    """Whether a body was announced (Expect: 100-continue) that nobody has asked for yet, and the receive that asks."""
    if not header(scope, b"expect"):
        return bool, receive
    waits = True

    async def asking() -> Message:
        nonlocal waits
        waits = False
        return await receive()

    return lambda: waits, asking


def _policy(path: str) -> bytes:
    if path == DOCS or path.startswith(DOCS + "/"):
        return DOCS_POLICY
    return REPORT_POLICY if path.startswith(REPORTS) else CLOSED_POLICY


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given = bytes(value).decode("latin-1")
            if REQUEST_ID.fullmatch(given):
                return given
            break
    return random_bytes(16).hex()
