"""The Open Inference Protocol, version 2: what KServe's and Triton's clients speak."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import FastAPI, Path, Request
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray

from lawnwatch import __version__
from lawnwatch.errors import ImageError, NotFound
from lawnwatch.serving import answers, openapi, problems, schemas, tensors
from lawnwatch.serving.admission import in_thread, keep_whole
from lawnwatch.serving.answers import Answered
from lawnwatch.serving.api import Api
from lawnwatch.serving.intake import V2_HEADER_LENGTH
from lawnwatch.serving.predictor import Predictor

F = TypeVar("F", bound=Callable[..., Any])
Name = Annotated[str, Path(description="The model's name.", examples=["lawnwatch"])]


def add(app: FastAPI, api: Api) -> None:
    serving = api.settings.serving

    def get(path: str, summary: str, kind: type[Any], *statuses: int) -> Callable[[F], F]:
        return app.get(
            path,
            summary=summary,
            response_model=kind,
            responses=openapi.failures(*statuses),
            tags=["inference protocol"],
        )

    @get("/v2", "The server", schemas.V2Server)
    async def server() -> Response:
        return JSONResponse({"name": "lawnwatch", "version": __version__, "extensions": ["binary_tensor_data"]})

    @get("/v2/health/live", "Is the process alive?", schemas.V2Live)
    async def live() -> Response:
        return JSONResponse({"live": True})

    @get("/v2/health/ready", "May requests be sent here?", schemas.V2Ready, 503)
    async def ready() -> Response:
        api.welcome()
        return JSONResponse({"ready": True})

    @get("/v2/models/{name}/ready", "Is the model ready?", schemas.V2ModelReady, 404, 503)
    @get("/v2/models/{name}/versions/{version}/ready", "Is this version ready?", schemas.V2ModelReady, 404, 503)
    async def model_ready(name: Name, version: str = "") -> Response:
        _named(api.welcome(), name, version)
        return JSONResponse({"name": name, "ready": True})

    @get("/v2/models/{name}", "What the model takes and gives", schemas.V2Model, 404, 503)
    @get("/v2/models/{name}/versions/{version}", "What this version takes and gives", schemas.V2Model, 404, 503)
    async def metadata(name: Name, version: str = "") -> Response:
        return JSONResponse(_metadata(_named(api.admissible(), name, version)))

    for path in ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"):
        infer_at = app.post(
            path,
            summary="Answer for tensors or encoded pictures",
            description=f"One input: `{tensors.PIXELS}`, UINT8 [n, size, size, 3], RGB as the model sees it; or "
            f"`{tensors.PICTURES}`, BYTES [n], JPEG, PNG or WebP files (base64 in JSON). Raw tensors behind the JSON "
            f"are read and sent as Triton's clients do. At most {serving.max_batch_pictures} pictures. "
            "A picture that cannot be used fails the request; POST /predict/batch tells them apart.",
            response_model=schemas.V2Answer,
            responses=openapi.failures(400, 404, 408, 413, 415, 422, 503),
            openapi_extra=openapi.json_body(schemas.V2Request),
            tags=["inference protocol"],
        )

        @infer_at
        async def infer(request: Request, name: Name, version: str = "") -> Response:
            return await _infer(api, request, _named(api.admissible(), name, version))


async def _infer(api: Api, request: Request, model: Predictor) -> Response:
    serving, state = api.settings.serving, request.scope["state"]
    # A tensor in JSON is megabytes of digits: a thread of the fair pool reads it, on its client's account. Its parser
    # keeps the interpreter to itself meanwhile, the loop too: so what it may be given is bounded first.
    read = partial(
        tensors.read,
        state["body"],
        request.headers.get(V2_HEADER_LENGTH, ""),
        size=model.size,
        most=serving.max_batch_pictures,
        most_json=serving.max_upload_bytes,
    )
    wanted = await in_thread(api.pool, request.receive, state["deadline"], read)

    async def one(each: tuple[int, bytes | NDArray[np.uint8]]) -> Answered:
        place, picture = each
        if not isinstance(picture, bytes):
            return await answers.of_pixels(api, request, model, picture)
        if len(picture) > serving.max_upload_bytes:
            raise problems.BodyTooLarge(
                f"Picture {place} has {len(picture)} bytes; {serving.max_upload_bytes} are the most."
            )
        try:
            return await answers.of_picture(api, request, model, picture)
        except ImageError as error:
            raise type(error)(f"Picture {place}: {error.message}", hint=error.hint) from None

    if len(wanted.pictures) > 1:
        keep_whole()
    found = await answers.of_each(api, list(enumerate(wanted.pictures)), one, together=True)
    rows = [each for each in found if isinstance(each, Answered)]
    head: dict[str, Any] = {"model_name": model.manifest.model_name, "model_version": str(model.version)}
    if wanted.id:
        head["id"] = wanted.id
    outputs = {name: _output(name, rows, model) for name in wanted.outputs}
    body, json_length = tensors.write(head, outputs, wanted.outputs)
    if not json_length:
        return Response(body, media_type="application/json")
    return Response(body, media_type="application/octet-stream", headers={V2_HEADER_LENGTH: str(json_length)})


def _output(name: str, rows: list[Answered], model: Predictor) -> NDArray[Any]:
    """One output for all pictures, the pictures along its first axis."""
    said = [row.answer for row in rows]
    if name == "label":
        return np.array([answer.label for answer in said], dtype=object)
    if name == "embedding":
        return np.stack([np.frombuffer(answer.embedding, "<f2") for answer in said]).astype(np.float32)
    if name == "probabilities":
        classes = model.manifest.classes
        return np.array([[answer.probabilities[each] for each in classes] for answer in said], np.float32)
    if name == "unknown_score":
        # A bundle without a detector knows nothing as unknown.
        return np.array([answer.unknown_score or 0.0 for answer in said], np.float32)
    return np.array([answer.confidence for answer in said], np.float32)


def _metadata(model: Predictor) -> dict[str, Any]:
    manifest, size = model.manifest, model.size
    embedding = manifest.outputs["embedding"].shape[-1] if "embedding" in manifest.outputs else -1
    shapes = {
        "label": ("BYTES", [-1]),
        "confidence": ("FP32", [-1]),
        "probabilities": ("FP32", [-1, len(manifest.classes)]),
        "unknown_score": ("FP32", [-1]),
        "embedding": ("FP32", [-1, embedding]),
    }
    return {
        "name": manifest.model_name,
        "versions": [str(model.version)],
        "platform": "litert",
        "inputs": [
            {"name": tensors.PIXELS, "datatype": "UINT8", "shape": [-1, size, size, 3]},
            {"name": tensors.PICTURES, "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [{"name": name, "datatype": datatype, "shape": shape} for name, (datatype, shape) in shapes.items()],
        "parameters": {"classes": manifest.classes, "inputs": "one of the two", "sha256": model.sha256},
    }


def _named(model: Predictor, name: str, version: str) -> Predictor:
    """The model, if it is the one that was named. Raises NotFound."""
    if name != model.manifest.model_name or version not in ("", str(model.version)):
        raise NotFound(
            f"No such model here: {name[:60]!r}{f' version {version[:20]!r}' if version else ''}.",
            hint=f"{model.manifest.model_name} version {model.version} is served.",
        )
    return model
