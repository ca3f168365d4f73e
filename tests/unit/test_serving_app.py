"""The API as an ASGI application, without a model."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest

from lawnwatch.config import Settings
from lawnwatch.serving.app import create_app
from lawnwatch.serving.metrics import STALE_SECONDS, Metrics

pytestmark = pytest.mark.unit


async def test_a_fault_that_nobody_foresaw_is_a_problem_document_and_goes_no_further(tmp_path: Path) -> None:
    app = create_app(Settings(home=tmp_path))

    @app.get("/fault")
    async def fault() -> None:
        raise ZeroDivisionError("a secret")

    transport = httpx.ASGITransport(app)  # raises what the application lets through
    async with httpx.AsyncClient(transport=transport, base_url="http://lawn") as client:
        answer = await client.get("/fault")
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert answer.json()["code"] == "internal" and "secret" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["hint"]


async def test_12_the_document_is_written_once_and_the_models_facts_when_they_change(tmp_path: Path) -> None:
    app = create_app(Settings(home=tmp_path))
    watcher = app.state.api.watcher
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://lawn") as client:
        document = await client.get("/openapi.json")
        assert document.headers["content-type"] == "application/json" and "/predict" in document.json()["paths"]
        app.openapi = None  # type: ignore[assignment]
        assert (await client.get("/openapi.json")).content == document.content
        for reason in ("one", "one", "another", "one"):
            watcher.reason = reason
            assert (await client.get("/model/info")).json()["reason"] == reason


def test_12_metrics_are_written_a_few_times_a_second() -> None:
    metrics = Metrics()
    before = metrics.render()
    metrics.failures.inc()
    assert metrics.render() is before
    time.sleep(STALE_SECONDS)
    assert b"lawnwatch_predict_failures_total 1.0" in metrics.render()
