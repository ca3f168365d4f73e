"""The usual form is read by a short cut: it must find what the parser finds, and nothing where that finds none."""

from __future__ import annotations

import time

import pytest

from lawnwatch.serving import uploads
from lawnwatch.serving.problems import UploadError

pytestmark = pytest.mark.unit

KIND = "multipart/form-data; boundary=x1x"
HEAD = b'--x1x\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'


@pytest.mark.parametrize("data", [b"picture", b"", b"\r\n", b"--x1x", b"a\r\n--x1", b"\r\n\r\n\x00\xff" * 99])
@pytest.mark.parametrize("end", [b"\r\n--x1x--\r\n", b"\r\n--x1x--"])
def test_the_short_cut_finds_what_the_parser_finds(data: bytes, end: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    short = uploads.picture(KIND, HEAD + data + end)
    monkeypatch.setattr(uploads, "BOUNDARY", uploads.re.compile("never"))
    assert uploads.picture(KIND, HEAD + data + end) == short == data


@pytest.mark.parametrize(
    "body",
    [
        HEAD + b"one\r\n" + HEAD + b"two\r\n--x1x--\r\n",
        HEAD + b"not ended",
        HEAD + b"not ended\r\n--x1x",
        HEAD.replace(b'"file"', b'"photo"') + b"x\r\n--x1x--\r\n",
        b"--other" + HEAD[5:] + b"x\r\n--x1x--\r\n",
        HEAD[:-2] + b"x\r\n--x1x--\r\n",
    ],
)
def test_what_is_no_form_with_one_file_goes_to_the_parser(body: bytes) -> None:
    assert uploads._usual(KIND, body) is None
    with pytest.raises(UploadError):
        uploads.picture(KIND, body)


@pytest.mark.parametrize("padding", [b"", b" ", b" \t" * 8])
def test_a_boundary_may_be_padded_a_little(padding: bytes) -> None:
    body = HEAD + b"one\r\n--x1x" + padding + HEAD[5:] + b"two\n--x1x\n\r\n--x1\r\n--x1x--\r\nan epilogue"
    assert uploads.pictures(KIND, body, most=2) == [b"one", b"two\n--x1x\n\r\n--x1"]


def test_a_batch_may_have_as_many_pictures_as_it_says() -> None:
    body = b"\r\n" + (HEAD + b"one\r\n") * 3 + b"--x1x--"
    assert uploads.pictures(KIND, body, most=3) == [b"one"] * 3
    with pytest.raises(UploadError, match="at most 2 pictures"):
        uploads.pictures(KIND, body, most=2)


# What follows a boundary, the parser walks byte by byte, and look-alikes of a boundary one by one.
HOSTILE = [
    (b"\r\n--x1x", b" ", "goes on, or is cut off"),
    (b"\r\n--x1x", b" \t", "goes on, or is cut off"),
    (b"", b"\r\n--x1xy", "goes on, or is cut off"),
    (b"", b"\r\n--x1x-", "goes on, or is cut off"),
    (b"", b"\r\n--x1x\r", "goes on, or is cut off"),
    (b"", b"\r\n--x1x--", "at most 4 pictures"),
    (b"", b"\r\n" + HEAD, "at most 4 pictures"),
    (b"\r\n--x1x\r\nA: b\r\n--x1x--: a header\r\n\r\n", b"\r\n--x1xy", "goes on, or is cut off"),
]


@pytest.mark.parametrize(("begin", "piece", "said"), HOSTILE)
@pytest.mark.parametrize("end", [b"", b"\r\n--x1x--\r\n"])
def test_11_a_form_of_endless_padding_or_boundaries_costs_nothing(
    begin: bytes, piece: bytes, said: str, end: bytes
) -> None:
    body = HEAD + b"data" + begin + piece * (5_000_000 // len(piece)) + end
    started = time.thread_time()
    with pytest.raises(UploadError, match=said):
        uploads.pictures(KIND, body, most=4)
    with pytest.raises(UploadError):
        uploads.picture(KIND, body)
    assert time.thread_time() - started < 0.5, "seconds of CPU on the event loop"


@pytest.mark.parametrize(
    ("boundary", "piece"),
    [
        ("b", b"\r\n"),
        ("b", b"\r\n--"),
        ("-" * 70, b"-"),
        ("-" * 70, b"\r\n" + b"-" * 71),
        ("-" * 70, b"\n" + b"-" * 72),
        ("a" * 35 + "b" + "a" * 34, b"a"),
        ("a" * 35 + "b" + "a" * 34, b"\r\n--" + b"a" * 70),
    ],
)
def test_11_nor_does_what_almost_is_a_boundary(boundary: str, piece: bytes) -> None:
    data = piece * (5_000_000 // len(piece))
    delimiter = b"--" + boundary.encode()
    body = HEAD.replace(b"--x1x", delimiter) + data + b"\r\n" + delimiter + b"--"
    started = time.thread_time()
    assert uploads.pictures(f"multipart/form-data; boundary={boundary}", body, most=4) == [data]
    assert time.thread_time() - started < 0.5, "seconds of CPU on the event loop"
