"""Which address takes which body, so that admission can refuse one before it is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from lawnwatch.config import ServingSettings
from lawnwatch.serving import uploads
from lawnwatch.serving.problems import UnsupportedBody

MULTIPART_ROOM = 65_536  # bytes that a form may have around its picture
PART_ROOM = 1_024  # of a form of many parts, each
V2_INFER = re.compile(r"/v2/models/[^/]+(?P<version>/versions/[^/]+)?/infer")
V2_HEADER_LENGTH = "inference-header-content-length"


@dataclass(frozen=True)
class Intake:
    """What one address takes.

    Attributes:
        route: its template, for metrics.
        max_bytes: largest body.
        what: what the body holds, for the sentence that refuses a larger one.
        check_media: raises UnsupportedBody for a Content-Type that it does not read.
    """

    route: str
    max_bytes: int
    what: str
    check_media: Callable[[str], object]


def intakes(serving: ServingSettings) -> Callable[[str], Intake | None]:
    """The intake of a path; None where no body is guarded."""
    one, many = serving.max_upload_bytes, serving.max_batch_bytes
    picture = Intake("/predict", one + MULTIPART_ROOM, f"the {one} bytes that a picture may have", uploads.media_type)
    batch = Intake(
        "/predict/batch",
        many + MULTIPART_ROOM + PART_ROOM * serving.max_batch_pictures,
        f"the {many} bytes that a batch may have",
        uploads.form_type,
    )
    infer = "/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"
    tensors = [Intake(route, many, f"the {many} bytes that a request may have", tensor_type) for route in infer]
    fixed = {each.route: each for each in (picture, batch)}

    def of(path: str) -> Intake | None:
        path = path.removesuffix("\n")  # the router's patterns end in `$`, which lets one follow
        if found := fixed.get(path):
            return found
        matched = V2_INFER.fullmatch(path)
        return tensors[matched["version"] is not None] if matched else None

    return of


def tensor_type(content_type: str) -> None:
    """Open Inference Protocol: JSON, or JSON with raw tensors behind it; its clients often name neither.

    Raises:
        UnsupportedBody: a form, a picture, a text.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in ("", "application/json", "application/octet-stream"):
        raise UnsupportedBody(
            f"An inference request is application/json, or application/octet-stream with a {V2_HEADER_LENGTH} header; "
            f"received Content-Type {content_type[:80]!r}.",
            hint="POST /predict takes pictures as they are.",
        )
