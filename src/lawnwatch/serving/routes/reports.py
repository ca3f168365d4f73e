"""The reports that steps keep for people: pages of the store, shown as they are."""

from __future__ import annotations

import re

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response

from lawnwatch.errors import NotFound
from lawnwatch.serving import openapi
from lawnwatch.serving.api import Api
from lawnwatch.serving.kept import Kept

ID = re.compile(r"[0-9a-f]{32}")


def add(app: FastAPI, api: Api) -> None:
    @app.get(
        "/reports/quality/{report}",
        summary="A quality report of the stored images",
        description="The page that `lawnwatch data quality` kept, by its id; `latest` is the newest.",
        response_class=HTMLResponse,
        responses=openapi.failures(404, 503),
        tags=["reports"],
    )
    def quality_report(report: str) -> Response:
        from lawnwatch.catalog import Catalog  # and the ORM with it: 9 MiB that answers do without

        catalog = Catalog(api.settings, api.database.engine)
        key = catalog.quality_report(report) if report == "latest" or ID.fullmatch(report) else None
        if key is None:
            raise NotFound(
                "There is no quality report yet." if report == "latest" else "There is no such quality report.",
                hint="`lawnwatch data quality` makes one.",
            )
        return Kept(api.store, key, HTMLResponse.media_type)

    @app.get(
        "/reports/evaluation/{run}",
        summary="The evaluation of a training run",
        description="The page that `lawnwatch evaluate` kept for a run, by the run's id. A run that is judged again "
        "has a new page at the same address, so nothing keeps a copy.",
        response_class=HTMLResponse,
        responses=openapi.failures(404, 503),
        tags=["reports"],
    )
    def evaluation_report(run: str) -> Response:
        missing = NotFound("There is no evaluation report of such a run.", hint="`lawnwatch evaluate` makes one.")
        if not ID.fullmatch(run):
            raise missing
        try:
            return Kept(api.store, f"reports/evaluation/{run}.html", HTMLResponse.media_type)
        except NotFound:
            raise missing from None
