"""The API as an ASGI application, without a model."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from lawnwatch.config import Settings
from lawnwatch.serving.app import create_app

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
