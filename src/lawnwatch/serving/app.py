"""The API as an ASGI application, and its life."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from lawnwatch import __version__, log
from lawnwatch.config import Settings
from lawnwatch.errors import LawnwatchError
from lawnwatch.serving import openapi, problems
from lawnwatch.serving.admission import AdmissionMiddleware
from lawnwatch.serving.api import Api
from lawnwatch.serving.clients import ClientMiddleware
from lawnwatch.serving.envelope import Envelope
from lawnwatch.serving.intake import intakes
from lawnwatch.serving.questions import QuestionsMiddleware
from lawnwatch.serving.routes import docs, history, predict, reports, state, v2
from lawnwatch.serving.watcher import ModelWatcher

logger = log.get(__name__)


def create_app(settings: Settings, watcher: ModelWatcher | None = None) -> FastAPI:
    """The API as an ASGI application; nothing is loaded before its lifespan begins.

    Args:
        watcher: one that follows the release target already.
    """
    api = Api(settings, watcher)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        api.start()
        try:
            yield
        finally:
            api.stop()

    app = FastAPI(
        title="lawnwatch",
        version=__version__,
        description="What does the picture show? Every answer names the model version that made it; every error is a "
        "problem document (RFC 9457) with a stable `code`.",
        lifespan=lifespan,
        openapi_url=None,  # it would write the document anew for each request
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # behind a proxy that ends TLS it would send people to http://
    )
    app.state.api = api
    _wrap(app, api)
    _explain_errors(app)
    for routes in (predict, v2, state, history, reports):
        routes.add(app, api)
    docs.add(app)
    openapi.complete(app)
    return app


def _wrap(app: FastAPI, api: Api) -> None:
    """The middleware, innermost first: a request passes the last one first."""
    serving = api.settings.serving
    intake = intakes(serving)
    app.add_middleware(QuestionsMiddleware, admission=api.admission)
    app.add_middleware(
        AdmissionMiddleware,
        admission=api.admission,
        intake=intake,
        check=api.admissible,
        timeout=serving.request_timeout,
        direct=api.direct,
    )
    app.add_middleware(
        ClientMiddleware,
        ring=api.ring,
        trusted=serving.trusted_proxies,
        on_refused=api.metrics.refused.labels("key").inc,
    )
    if serving.cors_origins:  # outside the keys: a browser's preflight has none
        app.add_middleware(
            CORSMiddleware,
            allow_origins=serving.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"],
            expose_headers=["Retry-After", "Server-Timing", "X-Request-ID"],
        )

    def route_of(path: str) -> str | None:
        if found := intake(path):
            return found.route
        patterns = ((getattr(route, "path_regex", None), getattr(route, "path", None)) for route in app.routes)
        return next((template for regex, template in patterns if regex is not None and regex.match(path)), None)

    app.add_middleware(Envelope, metrics=api.metrics, route_of=route_of)


def _explain_errors(app: FastAPI) -> None:
    @app.exception_handler(LawnwatchError)
    async def expected(request: Request, error: LawnwatchError) -> Response:
        path = request.url.path
        if error.status == HTTPStatus.INTERNAL_SERVER_ERROR:
            logger.error("request failed", path=path, code=error.code, error=error.message)
            if isinstance(error, problems.ModelFailed):
                return problems.of(error, path)
            said = "The server is not set up correctly; its log says more."
            return problems.problem(500, error.code, said, path=path)
        return problems.of(error, path)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()
        )
        hint = "/docs shows what each address accepts."
        return problems.problem(422, "bad_request", f"{faults}.", hint, path=request.url.path)

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        detail = {404: "There is nothing at this address.", 405: "This address takes another method."}.get(
            error.status_code, str(error.detail)
        )
        headers = dict(error.headers or {})
        if headers.get("Allow") == "GET":
            headers["Allow"] = "GET, HEAD"
        hint = "/docs lists all addresses."
        return problems.problem(error.status_code, code, detail, hint, headers=headers, path=request.url.path)
