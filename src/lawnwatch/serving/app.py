"""The API's routes and its life."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.core import Metric
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lawnwatch import __version__, log, predictions
from lawnwatch.catalog import Catalog, QualityReport
from lawnwatch.config import Settings
from lawnwatch.errors import LawnwatchError, NotFound, SettingsError, Unavailable
from lawnwatch.serving import problems, schemas, uploads
from lawnwatch.serving.admission import (
    Admission,
    AdmissionMiddleware,
    ClientGone,
    Draining,
    in_thread,
)
from lawnwatch.serving.metrics import METHODS, Metrics, counter, gauge
from lawnwatch.serving.predictor import UNKNOWN_LABEL, Answer, Predictor
from lawnwatch.serving.watcher import ModelWatcher
from lawnwatch.store import ObjectStore, open_store

logger = log.get(__name__)

GUARDED = frozenset({"/predict"})
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
UNCERTAIN_BELOW = 0.8  # answers less confident than this are kept with their picture under `uncertain`
CLIENT_CLOSED_REQUEST = 499
MEDIA_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}

SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-site"),
    (b"cache-control", b"no-store"),
)
CLOSED_POLICY = b"default-src 'none'; frame-ancestors 'none'"
# Swagger UI comes from its CDN; the API's own answers load nothing.
DOCS_POLICY = (
    b"default-src 'none'; connect-src 'self'; frame-ancestors 'none'; "
    b"img-src 'self' data: https://fastapi.tiangolo.com; "
    b"script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src 'unsafe-inline' https://cdn.jsdelivr.net"
)
DOCS = frozenset({"/docs", "/redoc"})
# A report shows strangers' text: its own style and pictures, and nothing that runs or loads.
REPORTS = "/reports/"
REPORT_POLICY = b"default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'none'"
REPORT_ID = re.compile(r"[0-9a-f]{32}")

PICTURE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "A JPEG, PNG or WebP picture.",
                        }
                    },
                }
            },
            "image/jpeg": {"schema": {"type": "string", "format": "binary"}},
            "image/png": {"schema": {"type": "string", "format": "binary"}},
            "image/webp": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


def _failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in statuses
    }


class Api:
    """What the routes share: the model, the places, the threads, the records."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        serving = settings.serving
        self.admission = Admission(
            threads=serving.threads, places=serving.threads + serving.queue, metrics=self.metrics
        )
        self.catalog = Catalog(settings)
        self._store: ObjectStore | None = None
        self.watcher = ModelWatcher(
            settings, lambda: open_store(settings), on_rejected=self.metrics.model_rejections.inc
        )
        self.pool = ThreadPoolExecutor(serving.threads, thread_name_prefix="predict")
        self.writer: predictions.PredictionWriter | None = None
        self.metrics.observe(self._families)

    def start(self) -> None:
        """Begin to follow the release target and to write records."""
        self.watcher.start()
        self.writer = predictions.PredictionWriter(
            self.catalog,
            lambda: open_store(self.settings),
            capacity=self.settings.serving.record_queue,
            migrate=True,
        )

    def stop(self) -> None:
        """After the last request: stop following, write what is queued."""
        self.drain()
        self.watcher.stop()
        self.pool.shutdown(wait=True, cancel_futures=True)
        if self.writer is not None and not self.writer.close():
            logger.error("predictions were not all written", drops=dict(self.writer.drops))

    def drain(self) -> None:
        """Not ready from now on, so that nobody sends more; what is under way goes on."""
        self.admission.draining = True

    @property
    def store(self) -> ObjectStore:
        """The store, opened at first use. Raises Unavailable."""
        if self._store is None:
            self._store = open_store(self.settings)
        return self._store

    def admissible(self) -> Predictor:
        """The model that serves. Raises NoModel."""
        return self.watcher.require()

    def record(self, prediction: predictions.Prediction, picture: bytes) -> None:
        """Hand an answer to the writer, with its picture when the policy keeps it."""
        policy = self.settings.serving.record_images
        uncertain = prediction.label == UNKNOWN_LABEL or prediction.confidence < UNCERTAIN_BELOW
        keep = policy == "all" or (policy == "uncertain" and uncertain)
        if self.writer is not None:
            self.writer.record(
                prediction,
                picture if keep else None,
                media_type=_media_type(prediction.image_format),
            )

    def _families(self) -> Iterable[Metric]:
        watcher, admission, writer = self.watcher, self.admission, self.writer
        loaded = watcher.current
        yield gauge("lawnwatch_places_taken", "Predictions under way or waiting.", admission.taken)
        yield gauge("lawnwatch_places", "Predictions that may be under way or wait.", admission.places)
        yield gauge("lawnwatch_slow_senders", "Bodies that take their time.", admission.slow)
        yield gauge("lawnwatch_body_held_bytes", "Bodies in memory.", admission.held)
        yield gauge("lawnwatch_draining", "1 while the process is ending.", float(admission.draining))
        yield gauge("lawnwatch_model_ready", "1 when a verified model serves.", float(loaded is not None))
        yield gauge("lawnwatch_store_up", "1 when the store answered last.", float(watcher.store_reachable))
        yield gauge("lawnwatch_model_rejected", "1 while the target is refused.", float(watcher.rejected is not None))
        if loaded is not None:
            model = loaded.predictor
            yield gauge(
                "lawnwatch_model_info",
                "The model that serves.",
                1,
                {"name": model.manifest.model_name, "version": str(model.version), "sha256": model.sha256},
            )
            yield gauge("lawnwatch_model_load_seconds", "Time to load and prove it.", loaded.load_seconds)
            yield gauge(
                "lawnwatch_model_golden_error_ratio",
                "Largest golden difference here.",
                model.golden.max_error,
            )
        if writer is not None:
            yield gauge("lawnwatch_record_queue", "Records that wait to be written.", writer.depth)
            yield counter("lawnwatch_records_written", "Records written.", writer.written)
            yield counter(
                "lawnwatch_records_dropped",
                "Records or pictures not kept.",
                {str(reason): count for reason, count in writer.drops.items()},
                "reason",
            )


def create_app(settings: Settings) -> FastAPI:
    """The API as an ASGI application; nothing is loaded before its lifespan begins."""
    api = Api(settings)

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
        description="What does the picture show? Every answer names the model version that made it.",
        lifespan=lifespan,
        redoc_url=None,
        docs_url="/docs",
    )
    app.state.api = api
    app.add_middleware(
        AdmissionMiddleware,
        admission=api.admission,
        guarded=GUARDED,
        check=api.admissible,
        max_picture=settings.serving.max_upload_bytes,
        timeout=settings.serving.request_timeout,
    )
    app.add_middleware(Envelope, metrics=api.metrics)  # added last: outermost
    _explain_errors(app)
    _add_prediction(app, api)
    _add_state(app, api)
    _add_history(app, api)
    _add_reports(app, api)
    _document_problems(app)
    return app


# --- routes -------------------------------------------------------------------------------------------------


def _add_prediction(app: FastAPI, api: Api) -> None:
    @app.post(
        "/predict",
        summary="What does the picture show?",
        description="One JPEG, PNG or WebP picture, as the form field `file` or as the body itself.\n\n"
        "```\ncurl -F file=@photo.jpg http://localhost:8000/predict\n```",
        response_model=schemas.PredictionAnswer,
        responses=_failures(408, 413, 415, 422, 503),
        openapi_extra=PICTURE_BODY,
        tags=["predict"],
    )
    async def predict(request: Request) -> Response:
        state = request.scope["state"]
        content_type = request.headers.get("content-type", "")
        picture = uploads.picture(content_type, state["body"])
        if len(picture) > api.settings.serving.max_upload_bytes:
            raise problems.BodyTooLarge(
                f"The picture has {len(picture)} bytes; {api.settings.serving.max_upload_bytes} are the most.",
                hint="Send a smaller file.",
            )
        model = api.admissible()
        queued = time.perf_counter()

        def work() -> tuple[Answer, float]:
            begun = time.perf_counter()
            try:
                return model.answer(picture), begun - queued
            finally:
                api.admission.worked(time.perf_counter() - begun)

        answer, waited = await in_thread(api.pool, request.receive, state["deadline"], work)
        return _answered(api, model, answer, picture, state, waited)


def _answered(
    api: Api, model: Predictor, answer: Answer, picture: bytes, state: dict[str, Any], waited: float
) -> Response:
    """Record an answer, count it and write it down."""
    prediction_id = predictions.new_id()
    total = time.perf_counter() - state["arrived"]
    image = answer.image
    api.record(
        predictions.Prediction(
            prediction_id=prediction_id,
            created_at=datetime.now(UTC),
            label=answer.label,
            confidence=answer.confidence,
            probabilities=answer.probabilities,
            unknown_score=answer.unknown_score,
            model_name=model.manifest.model_name,
            model_version=model.version,
            bundle_sha256=model.sha256,
            image_format=image.format,
            image_width=image.width,
            image_height=image.height,
            image_bytes=len(picture),
            total_ms=round(total * 1000, 3),
            request_id=state["request_id"],
            brightness=answer.brightness,
            sharpness=answer.sharpness,
            embedding=answer.embedding,
        ),
        picture,
    )
    metrics = api.metrics
    metrics.predictions.labels(answer.label, str(model.version)).inc()
    metrics.confidence.observe(answer.confidence)
    metrics.brightness.observe(answer.brightness)
    metrics.input_bytes.observe(len(picture))
    unknown = model.manifest.unknown
    if answer.unknown_score is not None and unknown is not None and unknown.threshold > 0:
        metrics.unknown_score.observe(answer.unknown_score / unknown.threshold)
    stages = {
        "body": state["body_seconds"],
        "queue": waited,
        "decode": answer.decode_seconds,
        "infer": answer.infer_seconds,
    }
    for stage, seconds in stages.items():
        metrics.stage_seconds.labels(stage).observe(seconds)
    milliseconds = {stage: round(seconds * 1000, 3) for stage, seconds in (*stages.items(), ("total", total))}
    return JSONResponse(
        {
            "prediction_id": prediction_id,
            "label": answer.label,
            "confidence": answer.confidence,
            "probabilities": answer.probabilities,
            "unknown_score": answer.unknown_score,
            "model": _named(model),
            "image": {
                "format": image.format,
                "width": image.width,
                "height": image.height,
                "bytes": len(picture),
            },
            "timings_ms": {name: milliseconds[name] for name in ("decode", "infer", "total")},
        },
        headers={"Server-Timing": ", ".join(f"{name};dur={value}" for name, value in milliseconds.items())},
    )


def _add_state(app: FastAPI, api: Api) -> None:
    @app.get("/health", summary="Is the process alive?", response_model=schemas.Health, tags=["state"])
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get(
        "/ready",
        summary="May requests be sent here?",
        description="200 while a verified model is loaded and the process is not ending, whatever the load.",
        response_model=schemas.Ready,
        responses=_failures(503),
        tags=["state"],
    )
    async def ready() -> Response:
        if api.admission.draining:
            raise Draining("This server is ending.", hint="Send requests to another.")
        return JSONResponse({"status": "ready", "model": _named(api.watcher.require())})

    @app.get("/metrics", summary="Prometheus metrics", response_class=Response, tags=["state"])
    def metrics() -> Response:
        return Response(api.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.get(
        "/model/info",
        summary="What serves, where it came from and how good it is",
        response_model=schemas.ModelInfo,
        tags=["model"],
    )
    async def model_info() -> Response:
        return JSONResponse(_model_info(api))


def _model_info(api: Api) -> dict[str, Any]:
    watcher = api.watcher
    loaded, target, rejected = watcher.current, watcher.target, watcher.rejected
    facts: dict[str, Any] = {
        "state": "ready" if loaded else "no_model",
        "reason": watcher.reason,
        "model": None,
        "classes": [],
        "samples": False,
        "evaluation": {},
        "lineage": {},
        "thresholds": {},
        "model_card": "",
        "loaded_at": None,
        "load_seconds": None,
        "golden": None,
        "target": {"version": target.model_version, "sha256": target.sha256} if target else None,
        "rejected": {"sha256": rejected.sha256, "reason": rejected.reason} if rejected else None,
    }
    if loaded is not None:
        model = loaded.predictor
        manifest = model.manifest
        facts |= {
            "model": _named(model),
            "classes": manifest.classes,
            "samples": manifest.lineage.samples,
            "evaluation": manifest.evaluation,
            "lineage": manifest.lineage.model_dump(mode="json"),
            "thresholds": {
                "temperature": manifest.temperature,
                "unknown": manifest.unknown.model_dump(mode="json") if manifest.unknown else None,
            },
            "model_card": model.model_card,
            "loaded_at": loaded.loaded_at.isoformat(),
            "load_seconds": round(loaded.load_seconds, 4),
            "golden": {"ok": model.golden.ok, "max_error": model.golden.max_error},
        }
    return facts


def _add_history(app: FastAPI, api: Api) -> None:
    @app.get(
        "/predictions",
        summary="What was answered, newest first",
        response_model=schemas.PredictionList,
        responses=_failures(400, 422, 503),
        tags=["history"],
    )
    def list_predictions(
        limit: Annotated[int, Query(ge=1, le=predictions.PAGE, description="Most records of the page.")] = 50,
        before: Annotated[str | None, Query(max_length=64, description="`next` of the page before.")] = None,
        label: Annotated[str | None, Query(max_length=190, description="Only this label.")] = None,
    ) -> Response:
        page = predictions.list_predictions(api.catalog, limit=limit, before=before, label=label)
        return JSONResponse({"items": [_item(one) for one in page.items], "next": page.next})

    @app.get(
        "/predictions/{prediction_id}",
        summary="One answer",
        response_model=schemas.PredictionItem,
        responses=_failures(400, 404, 503),
        tags=["history"],
    )
    def get_prediction(prediction_id: str) -> Response:
        return JSONResponse(_item(predictions.get_prediction(api.catalog, prediction_id)))

    @app.get(
        "/predictions/{prediction_id}/image",
        summary="The picture of an answer",
        response_class=Response,
        responses={
            200: {
                "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
                "description": "The picture as it was sent.",
            },
            **_failures(400, 404, 503),
        },
        tags=["history"],
    )
    def get_image(prediction_id: str) -> Response:
        one = predictions.get_prediction(api.catalog, prediction_id)
        if one.image_key is None:
            raise NotFound(
                f"The picture of prediction {one.prediction_id} was not kept.",
                hint="LAWNWATCH_SERVING__RECORD_IMAGES says which pictures are kept.",
            )
        return Response(api.store.get(one.image_key), media_type=_media_type(one.image_format))


def _add_reports(app: FastAPI, api: Api) -> None:
    @app.get(
        "/reports/quality/{report}",
        summary="A quality report of the stored images",
        description="The page that `lawnwatch data quality` kept, by its id; `latest` is the newest.",
        response_class=HTMLResponse,
        responses=_failures(404, 503),
        tags=["reports"],
    )
    def quality_report(report: str) -> Response:
        query = sa.select(QualityReport.object_key).order_by(QualityReport.created_at.desc()).limit(1)
        if report != "latest":
            query = query.where(QualityReport.id == report)
        key = None
        if report == "latest" or REPORT_ID.fullmatch(report):
            with api.catalog.session() as session:
                key = session.scalar(query)
        if key is None:
            raise NotFound(
                "There is no quality report yet." if report == "latest" else "There is no such quality report.",
                hint="`lawnwatch data quality` makes one.",
            )
        return HTMLResponse(api.store.get(key))


def _item(one: predictions.Prediction) -> dict[str, Any]:
    return {
        "prediction_id": one.prediction_id,
        "created_at": one.created_at.isoformat(),
        "label": one.label,
        "confidence": one.confidence,
        "probabilities": dict(one.probabilities),
        "unknown_score": one.unknown_score,
        "model_version": one.model_version,
        "model_sha256": one.bundle_sha256,
        "brightness": one.brightness,
        "sharpness": one.sharpness,
        "image": {
            "format": one.image_format,
            "width": one.image_width,
            "height": one.image_height,
            "bytes": one.image_bytes,
        },
        "image_url": f"/predictions/{one.prediction_id}/image" if one.image_key else None,
    }


def _named(model: Predictor) -> dict[str, Any]:
    return {"name": model.manifest.model_name, "version": model.version, "sha256": model.sha256}


def _media_type(image_format: str) -> str:
    return MEDIA_TYPES.get(image_format, "application/octet-stream")


# --- errors -------------------------------------------------------------------------------------------------


def _explain_errors(app: FastAPI) -> None:
    @app.exception_handler(LawnwatchError)
    async def expected(request: Request, error: LawnwatchError) -> Response:
        if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR and not isinstance(error, Unavailable):
            logger.error("request failed", path=request.url.path, code=error.code, error=error.message)
        if isinstance(error, SettingsError) or (
            error.status >= HTTPStatus.INTERNAL_SERVER_ERROR and not isinstance(error, Unavailable)
        ):
            return problems.problem(500, error.code, "The server is not set up correctly; its log says more.")
        return problems.of(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()
        )
        return problems.problem(422, "bad_request", f"{faults}.", "/docs shows what each address accepts.")

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        detail = {404: "There is nothing at this address.", 405: "This address takes another method."}.get(
            error.status_code, str(error.detail)
        )
        headers = dict(error.headers or {})
        return problems.problem(error.status_code, code, detail, "/docs lists all addresses.", headers=headers)


class Envelope:
    """Around every request: its id, security headers, counting, and a plain 500 for what nobody foresaw."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = CLIENT_CLOSED_REQUEST
        policy = DOCS_POLICY if scope["path"] in DOCS else CLOSED_POLICY
        if scope["path"].startswith(REPORTS):
            policy = REPORT_POLICY

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
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, sealed)
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
            self._count(scope, status, time.perf_counter() - started)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None)
        if route is None:
            route = scope["path"] if scope["path"] in GUARDED else "other"
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._metrics.requests.labels(route, method, str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given = bytes(value).decode("latin-1")
            if REQUEST_ID.fullmatch(given):
                return given
            break
    return uuid.uuid4().hex


def _document_problems(app: FastAPI) -> None:
    """Put the problem document into the OpenAPI schema that the failures refer to."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        document.setdefault("components", {}).setdefault("schemas", {})["Problem"] = (
            problems.Problem.model_json_schema()
        )
        return document

    app.openapi = openapi  # type: ignore[method-assign]


# --- the process --------------------------------------------------------------------------------------------


def run(settings: Settings) -> None:
    """Serve until a signal ends it: not ready, drain, flush the records, return.

    Raises:
        SettingsError: the address cannot be listened on.
    """
    from lawnwatch.serving import server

    serving = settings.serving
    sock = server.listen(serving.host, serving.port)
    app = create_app(settings)
    api: Api = app.state.api
    logger.info("serving", address=f"http://{serving.host}:{sock.getsockname()[1]}")
    server.Server(
        server.config(app, graceful_seconds=serving.request_timeout),
        drain_seconds=serving.drain_seconds,
        on_drain=api.drain,
    ).run([sock])
