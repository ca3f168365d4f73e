"""From a picture to what the client is told: answered in a thread, recorded, counted, written down."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from PIL import Image
from starlette.requests import Request

from lawnwatch import heatmap, images, log, predictions
from lawnwatch.errors import IntegrityError, LawnwatchError
from lawnwatch.serving.admission import in_thread
from lawnwatch.serving.api import Api, named
from lawnwatch.serving.predictor import Answer, Predictor
from lawnwatch.serving.problems import ModelFailed

logger = log.get(__name__)

EXPLANATION_SIDE = 320  # longest side of a heat map, pixels
SHOWN_STAGES = ("decode", "infer", "explain")

P = TypeVar("P")
A = TypeVar("A")


@dataclass(frozen=True)
class Answered:
    """One answer.

    Attributes:
        document: what POST /predict says.
        stages: seconds spent, by stage.
        total: seconds from the request's head to the answer.
    """

    document: dict[str, Any]
    answer: Answer
    stages: dict[str, float]
    total: float

    def server_timing(self) -> str:
        """The header's value, milliseconds."""
        timings = {**self.stages, "total": self.total}
        return ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in timings.items())


async def of_picture(
    api: Api, request: Request, model: Predictor, picture: bytes, *, explain: bool = False
) -> Answered:
    """Answer for the bytes of a picture.

    Args:
        explain: add a heat map of what speaks for the likeliest class.

    Raises:
        UnsupportedMedia, ImageTooLarge, ImageError: not a picture that can be used.
        ModelFailed: the model has no number for this picture.
        ClientGone, Overloaded: see `in_thread`.
    """

    def work() -> tuple[Answer, str | None, float]:
        answer = model.answer(picture)
        begun = time.perf_counter()
        png = _heat_map(picture, answer, api.settings.images.max_pixels) if explain else None
        return answer, png, time.perf_counter() - begun

    (answer, png, drawing), waited = await _in_turn(api, request, work)
    stages = {"queue": waited, "decode": answer.decode_seconds, "infer": answer.infer_seconds}
    if explain:
        stages["explain"] = drawing
    answered = _recorded(api, request, model, answer, stages, picture)
    if explain:
        answered.document["explanation"] = {"class": answer.likeliest, "png_base64": png} if png else None
    return answered


async def of_pixels(api: Api, request: Request, model: Predictor, rgb: images.Rgb) -> Answered:
    """Answer for pixels that are decoded already: (size, size, 3) uint8 RGB."""
    answer, waited = await _in_turn(api, request, lambda: model.answer_pixels(rgb))
    stages = {"queue": waited, "decode": 0.0, "infer": answer.infer_seconds}
    return _recorded(api, request, model, answer, stages, None)


async def of_each(
    api: Api, things: Sequence[P], one: Callable[[P], Awaitable[A]], *, together: bool = False
) -> list[A | LawnwatchError]:
    """Answers for many things of one request, at most as many at once as there are threads.

    So a batch alone uses the whole machine, and beside others it is one more that waits its turn.

    Args:
        together: the first error ends it all; else each thing has its own answer or error.
    """
    waiting = iter(enumerate(things))
    results: dict[int, A | LawnwatchError] = {}

    async def go() -> None:
        for place, thing in waiting:
            try:
                results[place] = await one(thing)
            except LawnwatchError as error:
                if together:
                    raise
                results[place] = error

    workers = [asyncio.create_task(go()) for _ in range(min(api.settings.serving.threads, len(things)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
    return [results[place] for place in range(len(things))]


async def _in_turn(api: Api, request: Request, work: Callable[[], A]) -> tuple[A, float]:
    """Do the work in one of the threads; also returns how long it waited for it, seconds."""
    queued = time.perf_counter()

    def timed() -> tuple[A, float]:
        begun = time.perf_counter()
        try:
            return work(), begun - queued
        except (
            IntegrityError
        ) as error:  # the bundle was proven when it was loaded, so it is nothing that the client sent
            api.metrics.failures.inc()
            logger.error("the model failed", error=error.message, request_id=request.scope["state"]["request_id"])
            raise ModelFailed(
                "The model has no answer for this picture.", hint="The server's log says why; tell its operator."
            ) from error
        finally:
            api.admission.worked(time.perf_counter() - begun)

    return await in_thread(api.pool, request.receive, request.scope["state"]["deadline"], timed)


def _recorded(
    api: Api, request: Request, model: Predictor, answer: Answer, stages: dict[str, float], picture: bytes | None
) -> Answered:
    """Record an answer, count it and write it down."""
    state = request.scope["state"]
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
            image_bytes=image.bytes,
            total_ms=round(total * 1000, 3),
            request_id=state["request_id"],
            client=state["key"],
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
    metrics.input_bytes.observe(image.bytes)
    metrics.input_pixels.observe(image.width * image.height)
    unknown = model.manifest.unknown
    if answer.unknown_score is not None and unknown is not None and unknown.threshold > 0:
        metrics.unknown_score.observe(answer.unknown_score / unknown.threshold)
    for stage, seconds in stages.items():
        metrics.stages[stage].observe(seconds)
    shown = {name: seconds for name, seconds in stages.items() if name in SHOWN_STAGES} | {"total": total}
    document = {
        "prediction_id": prediction_id,
        "label": answer.label,
        "confidence": answer.confidence,
        "probabilities": answer.probabilities,
        "unknown_score": answer.unknown_score,
        "model": named(model),
        "image": {"format": image.format, "width": image.width, "height": image.height, "bytes": image.bytes},
        "timings_ms": {name: round(seconds * 1000, 3) for name, seconds in shown.items()},
    }
    return Answered(document, answer, stages, total)


def _heat_map(picture: bytes, answer: Answer, max_pixels: int) -> str | None:
    """The picture with what speaks for the likeliest class marked, a PNG in base64; None: the model does not tell."""
    if answer.cam is None:
        return None
    small = images.thumbnail(picture, width=EXPLANATION_SIDE, height=EXPLANATION_SIDE, max_pixels=max_pixels)
    buffer = io.BytesIO()
    Image.fromarray(heatmap.overlay(small, answer.cam)).save(buffer, "PNG", compress_level=3)
    return base64.b64encode(buffer.getvalue()).decode()
