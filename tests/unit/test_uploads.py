"""The usual form is read by a short cut: it must find what the parser finds, and nothing where that finds none."""

from __future__ import annotations

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
