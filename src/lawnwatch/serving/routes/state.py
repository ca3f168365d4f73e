"""Is it alive, is it ready, what serves, and what has it measured."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from lawnwatch.release_target import TargetEntry
from lawnwatch.serving import openapi, schemas
from lawnwatch.serving.api import Api, named
from lawnwatch.serving.metrics import STALE_SECONDS
from lawnwatch.serving.watcher import Loaded, Rejection


def add(app: FastAPI, api: Api) -> None:
    @app.get(
        "/health",
        summary="Is the process alive?",
        response_model=schemas.Health,
        responses=openapi.failures(),
        tags=["state"],
    )
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get(
        "/ready",
        summary="May requests be sent here?",
        description="200 while a verified model is loaded and the process is not ending, whatever the load.",
        response_model=schemas.Ready,
        responses=openapi.failures(503),
        tags=["state"],
    )
    async def ready() -> Response:
        return JSONResponse({"status": "ready", "model": named(api.welcome())})

    @app.get(
        "/metrics",
        summary="Prometheus metrics",
        description=f"Counted at most {STALE_SECONDS} s ago.",
        response_class=Response,
        responses={
            200: {
                "description": "The text exposition format.",
                "content": {"text/plain": {"schema": {"type": "string"}}},
            },
            **openapi.failures(),
        },
        tags=["state"],
    )
    async def metrics() -> Response:  # not one of the threads that may all wait for the database
        return Response(api.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    known: tuple[object, ...] = ()  # of what `told` tells; without the model, for a replaced one is to go
    told = b""

    @app.get(
        "/model/info",
        summary="What serves, where it came from and how good it is",
        response_model=schemas.ModelInfo,
        responses=openapi.failures(503),
        tags=["model"],
    )
    async def model_info() -> Response:
        nonlocal known, told
        watcher = api.watcher
        loaded, others = watcher.current, (watcher.target, watcher.rejected, watcher.reason)
        now = (loaded.loaded_at if loaded else None, *others)
        if now != known:
            told, known = bytes(JSONResponse(_model_info(loaded, *others)).body), now
        return Response(told, media_type="application/json")


def _model_info(
    loaded: Loaded | None, target: TargetEntry | None, rejected: Rejection | None, reason: str
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "state": "ready" if loaded else "no_model",
        "reason": reason,
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
            "model": named(model),
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
