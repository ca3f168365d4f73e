"""The one picture in a request body: a multipart form with the field `file`, or the bytes themselves.

File names are never used for anything, so none can be harmful. The parser sees a body that is whole and
bounded.
"""

from __future__ import annotations

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from lawnwatch.serving.problems import UnsupportedBody, UploadError

FIELD = "file"
HINT = "For example: curl -F file=@photo.jpg http://localhost:8000/predict"
MAX_PARTS = 8
MAX_PART_HEADER = 8_192  # bytes of one part's header lines


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


def picture(content_type: str, body: bytes) -> bytes:
    """The bytes of the picture in the body.

    Raises:
        UnsupportedBody: the Content-Type holds no picture.
        UploadError: a broken form, not exactly one file, or another field than `file`.
    """
    if media_type(content_type) != "multipart/form-data":
        return body
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:
        raise UploadError("The form's Content-Type has no usable boundary.", hint=HINT)
    parts = _Parts()
    try:
        parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise UploadError("The multipart form is broken.", hint=HINT) from error
    if not parts.ended:
        raise UploadError("The multipart form ends before its last boundary.", hint=HINT)
    return parts.only_file()


class _Parts:
    """Collects a form's parts; refuses it as soon as it is more than a picture."""

    def __init__(self) -> None:
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

    def only_file(self) -> bytes:
        """The bytes of the one part named `file`."""
        names = [name for name, _ in self._parts]
        if names == [FIELD]:
            return b"".join(self._parts[0][1])
        if names.count(FIELD) > 1:
            raise UploadError(
                f"The form must hold one `{FIELD}`; it holds {names.count(FIELD)}.",
                hint="Send a request for each picture.",
            )
        shown = ", ".join(repr(name[:40]) for name in names) or "no field"
        raise UploadError(
            f"The form must hold exactly one field, `{FIELD}`, with the picture; received {shown}.",
            hint=HINT,
        )

    def _begin(self) -> None:
        if len(self._parts) == MAX_PARTS:
            raise UploadError(f"The form has more than {MAX_PARTS} parts; send one picture.", hint=HINT)
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
