"""What does the picture show? One picture, many of them, or one by its URL."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response

from lawnwatch.errors import ImageTooLarge, LawnwatchError, NoModel
from lawnwatch.serving import answers, openapi, problems, schemas, uploads
from lawnwatch.serving.admission import Sender, admit, keep_whole
from lawnwatch.serving.answers import Answered
from lawnwatch.serving.api import Api, named
from lawnwatch.serving.fetching import PictureFetcher
from lawnwatch.serving.problems import BodyTooLarge, BodyTooSlow, ClientGone, UnsupportedBody

Explain = Annotated[
    bool,
    Query(
        description="Add `explanation`: the picture with what speaks for the likeliest class marked, a PNG in base64."
    ),
]


def add(app: FastAPI, api: Api) -> None:
    serving = api.settings.serving
    fetcher = PictureFetcher(api.settings, api.metrics)

    @app.post(
        "/predict",
        summary="What does the picture show?",
        description="One JPEG, PNG or WebP picture, as the form field `file` or as the body itself.\n\n"
        "```\ncurl -F file=@photo.jpg http://localhost:8000/predict\n```",
        response_model=schemas.PredictionAnswer,
        responses=openapi.failures(408, 413, 415, 422, 503),
        openapi_extra=openapi.form(
            {"type": "string", "format": "binary", "description": "A JPEG, PNG or WebP picture."},
            image_jpeg=openapi.BINARY,
            image_png=openapi.BINARY,
            image_webp=openapi.BINARY,
        ),
        tags=["predict"],
    )
    async def predict(request: Request, explain: Explain = False) -> Response:
        state = request.scope["state"]
        picture = uploads.picture(request.headers.get("content-type", ""), state["body"])
        _check_size(picture, serving.max_upload_bytes)
        body = {"body": state["body_seconds"]}
        return _said(api, body, await answers.of_picture(api, request, api.admissible(), picture, explain=explain))

    api.direct["/predict"] = predict

    @app.post(
        "/predict/batch",
        summary="What do the pictures show?",
        description=f"A form with up to {serving.max_batch_pictures} pictures, each a field `file`. One model answers "
        "for all; each picture has its own answer, or the problem it would have had alone.\n\n"
        "```\ncurl -F file=@one.jpg -F file=@two.jpg http://localhost:8000/predict/batch\n```",
        response_model=schemas.BatchAnswer,
        responses=openapi.failures(408, 413, 415, 422, 503),
        openapi_extra=openapi.form(
            {
                "type": "array",
                "items": {"type": "string", "format": "binary"},
                "minItems": 1,
                "maxItems": serving.max_batch_pictures,
            }
        ),
        tags=["predict"],
    )
    async def predict_batch(request: Request, explain: Explain = False) -> Response:
        state = request.scope["state"]
        content_type = request.headers.get("content-type", "")
        pictures = uploads.pictures(content_type, state["body"], most=serving.max_batch_pictures)
        model = api.admissible()
        api.metrics.batch_pictures.observe(len(pictures))
        keep_whole()

        async def one(picture: bytes) -> Answered:
            _check_size(picture, serving.max_upload_bytes)
            return await answers.of_picture(api, request, model, picture, explain=explain)

        found = await answers.of_each(api, pictures, one)
        items = [_item(place, each) for place, each in enumerate(found)]
        answered = sum(item["problem"] is None for item in items)
        total = time.perf_counter() - state["arrived"]
        return JSONResponse(
            {
                "items": items,
                "answered": answered,
                "failed": len(items) - answered,
                "model": named(model),
                "timings_ms": {"total": round(total * 1000, 3)},
            },
            headers={"Server-Timing": f"total;dur={total * 1000:.3f}"},
        )

    @app.post(
        "/predict/url",
        summary="What does the picture at a URL show?",
        description="The server fetches the picture itself, from the hosts that its settings allow; without such a "
        "list this is off. Addresses that are not public are never reached, on no redirect.\n\n"
        "```\ncurl -H 'Content-Type: application/json' -d '{\"url\": \"https://example.org/lawn.jpg\"}' "
        "http://localhost:8000/predict/url\n```",
        response_model=schemas.PredictionAnswer,
        responses=openapi.failures(400, 403, 408, 413, 415, 422, 502, 503),
        openapi_extra=openapi.json_body(schemas.PictureUrl),
        tags=["predict"],
    )
    async def predict_url(request: Request, explain: Explain = False) -> Response:
        state = request.scope["state"]
        state["arrived"] = time.perf_counter()
        state["deadline"] = asyncio.get_running_loop().time() + serving.request_timeout
        with _counted(api):  # admission, which counts them elsewhere, does not see this body
            api.admissible()
            source = await uploads.small_json(request, schemas.PictureUrl)
            picture = await fetcher.fetch(source.url, state["client"], request.receive)
        fetch = {"fetch": time.perf_counter() - state["arrived"]}
        with _place(api, state["client"], picture):
            answered = await answers.of_picture(api, request, api.admissible(), picture, explain=explain)
        return _said(api, fetch, answered)


REASONS: dict[type[Exception], str] = {
    NoModel: "no_model",
    UnsupportedBody: "media",
    BodyTooLarge: "too_large",
    ImageTooLarge: "too_large",
    BodyTooSlow: "too_slow",
    ClientGone: "gone",
}


@contextmanager
def _counted(api: Api) -> Iterator[None]:
    """Count by reason what ends a request before its picture is here; Overloaded is counted where it is raised."""
    try:
        yield
    except tuple(REASONS) as error:
        api.metrics.refused.labels(REASONS[type(error)]).inc()
        raise


@contextmanager
def _place(api: Api, client: str, picture: bytes) -> Iterator[None]:
    """Place and memory, as admission gives them to a body: only now, so that a slow host keeps none from others."""
    sender = Sender(api.admission, client)
    try:
        sender.hold(len(picture))
        sender.take()
        admit(sender)
        yield
    finally:
        sender.leave()


def _said(api: Api, before: dict[str, float], answered: Answered) -> Response:
    """The response to one picture.

    Args:
        before: stages that passed before the picture was there, seconds.
    """
    for stage, seconds in before.items():
        api.metrics.stages[stage].observe(seconds)
    earlier = "".join(f"{name};dur={seconds * 1000:.3f}, " for name, seconds in before.items())
    return JSONResponse(answered.document, headers={"Server-Timing": earlier + answered.server_timing()})


def _item(place: int, each: Answered | LawnwatchError) -> dict[str, Any]:
    if isinstance(each, LawnwatchError):
        return {"index": place, "prediction": None, "problem": problems.within(each)}
    document = {name: value for name, value in each.document.items() if name != "model"}
    return {"index": place, "prediction": document, "problem": None}


def _check_size(picture: bytes, most: int) -> None:
    if len(picture) > most:
        raise BodyTooLarge(f"The picture has {len(picture)} bytes; {most} are the most.", hint="Send a smaller file.")
