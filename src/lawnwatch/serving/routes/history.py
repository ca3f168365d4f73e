"""What was answered: the records, and the pictures that were kept."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any

from fastapi import FastAPI, Path, Query
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator

from lawnwatch import predictions
from lawnwatch.errors import NotFound
from lawnwatch.serving import openapi, schemas
from lawnwatch.serving.api import Api, media_type
from lawnwatch.serving.kept import Kept

UUID: dict[str, Any] = {"format": "uuid", "examples": ["0198f2a4-7c1e-7b3a-9c55-3f0d1f2e4a6b"]}


def _iso(value: object) -> object:
    if not (isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\d", value)):
        raise ValueError("must be a date and time of ISO 8601, such as 2026-01-31T12:00:00Z")
    return value


Moment = Annotated[datetime, BeforeValidator(_iso)]  # without it a bare number would count as seconds since 1970
Identity = Annotated[str, Path(description="`prediction_id` of an answer.", json_schema_extra=UUID)]


def add(app: FastAPI, api: Api) -> None:
    @app.get(
        "/predictions",
        summary="What was answered, newest first",
        description="`next` of a page is `before` of the one after it: pages neither repeat nor miss a record while "
        "new ones come.\n\n"
        "```\ncurl 'http://localhost:8000/predictions?label=dandelion&max_confidence=0.8&limit=20'\n```",
        response_model=schemas.PredictionList,
        responses=openapi.failures(400, 422, 503),
        tags=["history"],
    )
    def list_predictions(
        limit: Annotated[int, Query(ge=1, le=predictions.PAGE, description="Most records of the page.")] = 50,
        before: Annotated[
            str | None, Query(max_length=64, description="`next` of the page before.", json_schema_extra=UUID)
        ] = None,
        label: Annotated[str | None, Query(max_length=190, description="Only this label.")] = None,
        version: Annotated[int | None, Query(ge=1, le=2**31 - 1, description="Only this model version.")] = None,
        since: Annotated[
            Moment | None, Query(alias="from", description="Only from this moment on, ISO 8601; UTC unless it says.")
        ] = None,
        until: Annotated[
            Moment | None, Query(alias="to", description="Only before this moment, ISO 8601; UTC unless it says.")
        ] = None,
        min_confidence: Annotated[float | None, Query(ge=0, le=1, description="Only at least so confident.")] = None,
        max_confidence: Annotated[float | None, Query(ge=0, le=1, description="Only at most so confident.")] = None,
        client: Annotated[
            str | None,
            Query(pattern="^[0-9a-f]{16}$", description="Only those that this API key asked for, by its id."),
        ] = None,
    ) -> Response:
        from lawnwatch import history

        page = history.list_predictions(
            api.database,
            limit=limit,
            before=before,
            label=label,
            version=version,
            since=since,
            until=until,
            min_confidence=min_confidence,
            max_confidence=max_confidence,
            client=client,
        )
        return JSONResponse({"items": [_item(one) for one in page.items], "next": page.next})

    @app.get(
        "/predictions/{prediction_id}",
        summary="One answer",
        response_model=schemas.PredictionItem,
        responses=openapi.failures(400, 404, 503),
        tags=["history"],
    )
    def get_prediction(prediction_id: Identity) -> Response:
        return JSONResponse(_item(_one(api, prediction_id)))

    @app.get(
        "/predictions/{prediction_id}/image",
        summary="The picture of an answer",
        response_class=Response,
        responses={
            200: {"content": {"image/*": openapi.BINARY}, "description": "The picture as it was sent."},
            **openapi.failures(400, 404, 503),
        },
        tags=["history"],
    )
    def get_image(prediction_id: Identity) -> Response:
        one = _one(api, prediction_id)
        if one.image_key is None:
            raise NotFound(
                f"The picture of prediction {one.prediction_id} was not kept.",
                hint="LAWNWATCH_SERVING__RECORD_IMAGES says which pictures are kept.",
            )
        return Kept(api.store, one.image_key, media_type(one.image_format))


def _one(api: Api, prediction_id: str) -> predictions.Prediction:
    from lawnwatch import history

    return history.get_prediction(api.database, prediction_id)


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
        "client": one.client,
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
