"""The pictures in a request body: a multipart form with the field `file`, or the bytes themselves.

File names are never used for anything, so none can be harmful. The parser sees a body that is whole and
bounded.
"""

from __future__ import annotations

import asyncio
import re
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from lawnwatch.serving.problems import BodyTooLarge, BodyTooSlow, ClientGone, UnsupportedBody, UploadError

FIELD = "file"
HINT = "For example: curl -F file=@photo.jpg http://localhost:8000/predict"
BATCH_HINT = "For example: curl -F file=@one.jpg -F file=@two.jpg http://localhost:8000/predict/batch"
MAX_PARTS = 8
SMALL_BYTES = 16_384  # of a JSON body that names something
SMALL_SECONDS = 10.0
MAX_PART_HEADER = 8_192  # bytes of one part's header lines
MAX_PADDING = 16  # blanks between a boundary and the end of its line

# The form that nearly every client sends: found in two looks, where the parser calls back a dozen times.
BOUNDARY = re.compile(r'multipart/form-data; ?boundary="?([0-9A-Za-z\'()+_,./:=?-]{1,70})"?')
USUAL_HEAD = re.compile(
    rb'Content-Disposition: form-data; name="file"(; filename="[^"\\\r\n]*")?\r\n(Content-Type: [!-~ ]*\r\n)?\r\n',
    re.IGNORECASE,
)

M = TypeVar("M", bound=BaseModel)


def media_type(content_type: str) -> str:
    """The media type without parameters, in lower case.

    Raises:
        UnsupportedBody: none that holds a picture.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "multipart/form-data" or kind.startswith("image/"):
        return kind
    raise UnsupportedBody(
        f"A picture is sent as multipart/form-data (field `{FIELD}`) or as an image/* body; "
        f"received Content-Type {content_type[:80]!r}.",
        hint=HINT,
    )


def form_type(content_type: str) -> None:
    """Raises UnsupportedBody for anything but a form."""
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
        raise UnsupportedBody(
            f"A batch is sent as multipart/form-data, a `{FIELD}` for each picture; "
            f"received Content-Type {content_type[:80]!r}.",
            hint=BATCH_HINT,
        )


def picture(content_type: str, body: bytes) -> bytes:
    """The bytes of the picture in the body.

    Raises:
        UnsupportedBody: the Content-Type holds no picture.
        UploadError: a broken form, not exactly one file, or another field than `file`.
    """
    if media_type(content_type) != "multipart/form-data":
        return body
    if (usual := _usual(content_type, body)) is not None:
        return usual
    parts = _parts(content_type, body, MAX_PARTS, f"The form has more than {MAX_PARTS} parts; send one picture.")
    names = [name for name, _ in parts]
    if names == [FIELD]:
        return parts[0][1]
    if names.count(FIELD) > 1:
        raise UploadError(
            f"The form must hold one `{FIELD}`; it holds {names.count(FIELD)}.",
            hint="POST /predict/batch takes many pictures.",
        )
    raise UploadError(
        f"The form must hold exactly one field, `{FIELD}`, with the picture; received {_shown(names)}.", hint=HINT
    )


def _usual(content_type: str, body: bytes) -> bytes | None:
    """The picture of a form that holds nothing else and is written as usual; None: ask the parser."""
    found = BOUNDARY.fullmatch(content_type)
    if found is None:
        return None
    delimiter = b"--" + found[1].encode()
    head = USUAL_HEAD.match(body, len(delimiter) + 2, len(delimiter) + MAX_PART_HEADER)
    if head is None or not body.startswith(delimiter + b"\r\n"):
        return None
    end = body.find(b"\r\n" + delimiter, head.end())
    return body[head.end() : end] if end >= 0 and body[end + 2 + len(delimiter) :] in (b"--\r\n", b"--") else None


def pictures(content_type: str, body: bytes, *, most: int) -> list[bytes]:
    """The bytes of each picture in a form of one `file` a picture, 1 … most, in their order.

    Raises:
        UnsupportedBody: not a form.
        UploadError: a broken form, none, too many, or another field than `file`.
    """
    form_type(content_type)
    parts = _parts(content_type, body, most, f"A batch has at most {most} pictures; this form holds more.")
    names = [name for name, _ in parts]
    if not parts or set(names) != {FIELD}:
        raise UploadError(
            f"Every part of the form must be a `{FIELD}` with a picture; received {_shown(names)}.", hint=BATCH_HINT
        )
    return [data for _, data in parts]


async def small_json(request: Request, kind: type[M]) -> M:
    """A small JSON body as what it should be.

    Raises:
        UnsupportedBody: it is said to be something else.
        BodyTooLarge, BodyTooSlow: it is no small body.
        UploadError: it is not JSON, or not of this kind.
    """
    said = request.headers.get("content-type", "")
    if said.partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedBody(f"The body must be application/json; received Content-Type {said[:80]!r}.")
    body = bytearray()
    try:
        async with asyncio.timeout(SMALL_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > SMALL_BYTES:
                    raise BodyTooLarge(f"The body is larger than {SMALL_BYTES} bytes.")
    except TimeoutError:
        raise BodyTooSlow(f"The body did not arrive within {SMALL_SECONDS:.0f} s.") from None
    except ClientDisconnect:
        raise ClientGone from None
    try:
        return kind.model_validate_json(bytes(body))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, fault["loc"])) or "body"
        raise UploadError(f"{where}: {fault['msg']}.", hint="/docs shows what the body looks like.") from None


def _parts(content_type: str, body: bytes, most: int, too_many: str) -> list[tuple[str, bytes]]:
    """Name and bytes of each part."""
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:
        raise UploadError("The form's Content-Type has no usable boundary.", hint=HINT)
    _check_boundaries(body, b"\r\n--" + boundary, most, too_many)
    parts = _Parts(most, too_many)
    try:
        parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise UploadError("The multipart form is broken.", hint=HINT) from error
    if not parts.ended:
        raise UploadError("The multipart form ends before its last boundary.", hint=HINT)
    return parts.whole()


def _check_boundaries(body: bytes, delimiter: bytes, most: int, too_many: str) -> None:
    """Refuse what the parser would walk byte by byte, on the event loop: 50 MB of it took a minute.

    That is the padding behind a boundary, and lines that begin as the boundary does, which RFC 2046 forbids in a part.
    """
    at = 0
    for _ in range(most + 2):  # one before each part and one at the end; and one to see that there are too many
        at = body.find(delimiter, at)
        if at < 0:
            return
        at += len(delimiter)
        line = body[at : at + MAX_PADDING + 2]
        if not line.startswith(b"--") and not line.lstrip(b" \t").startswith(b"\r\n"):
            raise UploadError("A line of the form begins with its boundary and goes on, or is cut off.", hint=HINT)
    raise UploadError(too_many, hint="Send several requests.")


def _shown(names: list[str]) -> str:
    return ", ".join(repr(name[:40]) for name in names[:MAX_PARTS]) or "no field"


class _Parts:
    """Collects a form's parts; refuses it as soon as they are too many."""

    def __init__(self, most: int, too_many: str) -> None:
        self._most = most
        self._too_many = too_many
        self._parts: list[tuple[str, list[bytes]]] = []
        self._header = (bytearray(), bytearray())
        self._header_bytes = 0
        self._disposition = b""
        self._data: list[bytes] = []
        self.ended = False

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._add_header(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._add_header(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._headers_finished,
            "on_part_data": lambda data, start, end: self._data.append(data[start:end]),
            "on_end": self._end,
        }

    def whole(self) -> list[tuple[str, bytes]]:
        """Name and bytes of each part."""
        return [(name, b"".join(pieces)) for name, pieces in self._parts]

    def _begin(self) -> None:
        if len(self._parts) == self._most:
            raise UploadError(self._too_many, hint="Send several requests.")
        self._disposition = b""
        self._header_bytes = 0
        self._data = []

    def _add_header(self, side: int, piece: bytes) -> None:
        self._header_bytes += len(piece)
        if self._header_bytes > MAX_PART_HEADER:
            raise UploadError(f"A part's header is longer than {MAX_PART_HEADER} bytes.", hint=HINT)
        self._header[side].extend(piece)

    def _end_header(self) -> None:
        if bytes(self._header[0]).lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])
        self._header = (bytearray(), bytearray())

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._parts.append((options.get(b"name", b"").decode("utf-8", "replace"), self._data))

    def _end(self) -> None:
        self.ended = True
