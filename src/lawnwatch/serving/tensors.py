"""The Open Inference Protocol's requests and answers, without the service: JSON, and raw tensors behind it.

https://github.com/kserve/open-inference-protocol; the binary tensor extension is Triton's. A request is a JSON head;
with `Inference-Header-Content-Length` raw tensors follow it, each as long as its `binary_data_size` says. BYTES
elements are encoded pictures: in JSON as base64, raw with their length as four little-endian bytes before each.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import reprlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pydantic_core
from numpy.typing import NDArray

from lawnwatch.errors import InputError

PIXELS, PICTURES = "image", "file"  # the two inputs, of which a request has one
MAX_ID = 256
OUTPUTS = ("label", "confidence", "probabilities", "unknown_score", "embedding")
DEFAULT_OUTPUTS = OUTPUTS[:-1]
NUMBER_BYTES = 6  # of a pixel's value in JSON: three digits, a comma, a blank, its share of brackets
JSON_ROOM = 65_536  # bytes of JSON around a tensor's data
MARKS_ROOM = 1_024  # commas, quotes and brackets of JSON around a tensor's data
SHORT = reprlib.Repr()  # what was received is shown in a few dozen characters, however much it is
SHORT.maxlevel, SHORT.maxdict, SHORT.maxlist = 2, 2, 4


@dataclass(frozen=True)
class Inference:
    """A request.

    Attributes:
        pictures: encoded ones, or (size, size, 3) uint8 RGB.
        outputs: the wanted ones by name, each with whether it is wanted raw.
        id: to be sent back; empty when the client gave none.
    """

    pictures: Sequence[bytes | NDArray[np.uint8]]
    outputs: Mapping[str, bool]
    id: str


def read(body: bytes, head_length: str, *, size: int, most: int, most_json: int) -> Inference:
    """A request from its body.

    Args:
        head_length: the header `Inference-Header-Content-Length`, empty when it was not sent.
        size: side of the model's input.
        most: pictures of one request.
        most_json: bytes of the JSON head.

    Raises:
        InputError: anything that is not as the protocol and the model's metadata say.
    """
    head, raw = body, b""
    if head_length:
        if not (head_length.isascii() and head_length.isdigit() and int(head_length[:12]) <= len(body)):
            raise _wrong(f"Inference-Header-Content-Length {head_length[:20]!r} is no length within the body")
        head, raw = body[: int(head_length)], body[int(head_length) :]
    if len(head) > most_json:
        raise _wrong(f"the JSON has {len(head)} bytes; {most_json} are the most, send tensors raw")
    _check_marks(head, size=size, most=most)
    try:
        document = pydantic_core.from_json(head, allow_inf_nan=False)
    except ValueError as error:
        raise _wrong(f"the body is not JSON ({error})") from None
    document = _mapping(document, "the request")
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1:
        raise _wrong(f"`inputs` must be a list of one tensor, `{PIXELS}` or `{PICTURES}`")
    tensor = _mapping(inputs[0], "an input")
    identity = document.get("id", "")
    if not isinstance(identity, str) or len(identity) > MAX_ID:
        raise _wrong(f"`id` must be a string of at most {MAX_ID} characters")
    pictures = _pictures(tensor, raw, size=size, most=most, json_bytes=len(head))
    return Inference(pictures, _wanted(document), identity)


def _check_marks(head: bytes, *, size: int, most: int) -> None:
    """Refuse JSON of more values than the largest tensor has, by counting what stands between them.

    Parsed, `[],` takes twenty times its own bytes: that must not happen to find out that it is no tensor.
    """
    values = most * size * size * 3
    lists = most * (size * size + size + 1)
    most_of = {b",": values, b"[": lists, b"{": 0, b'"': 2 * most}
    if any(head.count(mark) > count + MARKS_ROOM for mark, count in most_of.items()):
        raise _wrong(f"the JSON holds more than {most} pictures of {size} × {size} × 3 numbers, or none of them")


def _pictures(
    tensor: Mapping[str, Any], raw: bytes, *, size: int, most: int, json_bytes: int
) -> Sequence[bytes | NDArray[np.uint8]]:
    kinds = {PIXELS: ("UINT8", [size, size, 3]), PICTURES: ("BYTES", [])}
    name = tensor.get("name")
    if not isinstance(name, str) or name not in kinds:
        raise _wrong(f"the input must be `{PIXELS}` or `{PICTURES}`; received {SHORT.repr(name)}")
    datatype, rest = kinds[name]
    if tensor.get("datatype") != datatype:
        raise _wrong(f"`{name}` is {datatype}; received {SHORT.repr(tensor.get('datatype'))}")
    shape = tensor.get("shape")
    if not isinstance(shape, list) or not all(type(side) is int for side in shape) or shape[1:] != rest:
        raise _wrong(f"`{name}` has the shape {['n', *rest]}; received {SHORT.repr(shape)}")
    count: int = shape[0] if shape else 0
    if not 1 <= count <= most:
        raise _wrong(f"a request holds 1 to {most} pictures; received {SHORT.repr(count)}")
    sent = _mapping(tensor.get("parameters", {}), "`parameters`").get("binary_data_size")
    if sent is not None:
        if type(sent) is not int or sent != len(raw):
            raise _wrong(f"`binary_data_size` is {SHORT.repr(sent)}; {len(raw)} bytes follow the JSON")
        return _raw_pixels(raw, count, size) if name == PIXELS else _raw_pictures(raw, count)
    if raw:
        raise _wrong("bytes follow the JSON that no `binary_data_size` announces")
    data = tensor.get("data")
    if not isinstance(data, list):
        raise _wrong(f"`{name}` has no `data`")
    if name == PICTURES:
        return _json_pictures(data, count)
    numbers = count * size * size * 3
    if json_bytes > numbers * NUMBER_BYTES + JSON_ROOM:
        raise _wrong(f"the JSON has {json_bytes} bytes for {numbers} numbers; write it without blanks, or send it raw")
    return _json_pixels(data, [count, size, size, 3])


def _raw_pixels(raw: bytes, count: int, size: int) -> Sequence[NDArray[np.uint8]]:
    if len(raw) != count * size * size * 3:
        raise _wrong(f"`{PIXELS}` of {count} pictures has {count * size * size * 3} bytes; received {len(raw)}")
    return list(np.frombuffer(raw, np.uint8).reshape(count, size, size, 3))


def _raw_pictures(raw: bytes, count: int) -> Sequence[bytes]:
    found: list[bytes] = []
    at = 0
    while at < len(raw) and len(found) <= count:
        if at + 4 > len(raw):
            break
        (length,) = struct.unpack_from("<I", raw, at)
        found.append(raw[at + 4 : at + 4 + length])
        at += 4 + length
    if at != len(raw) or len(found) != count:
        raise _wrong(f"`{PICTURES}` does not hold {count} elements, each with its length before it")
    return found


def _json_pixels(data: list[Any], shape: list[int]) -> Sequence[NDArray[np.uint8]]:
    """Pixels that came flat, or nested as their shape.

    numpy sees none of it before every value is known to be a number: from one long string among many short ones it
    makes an array as wide as the long one.
    """
    total = math.prod(shape)
    for length in shape[1:]:
        if len(data) >= total or not all(type(row) is list and len(row) == length for row in data):
            break
        data = list(chain.from_iterable(data))
    if len(data) != total or set(map(type, data)) != {int}:
        raise _wrong(f"the data of `{PIXELS}` must be {' × '.join(map(str, shape))} whole numbers")
    try:
        pixels = bytes(data)
    except ValueError:
        raise _wrong(f"the data of `{PIXELS}` must lie between 0 and 255") from None
    return list(np.frombuffer(pixels, np.uint8).reshape(shape))


def _json_pictures(data: list[Any], count: int) -> Sequence[bytes]:
    if len(data) != count:
        raise _wrong(f"the shape of `{PICTURES}` says {count} elements; received {len(data)}")
    try:
        return [base64.b64decode(element, validate=True) for element in data]
    except (TypeError, ValueError, binascii.Error):
        raise _wrong(f"each element of `{PICTURES}` is a picture in base64") from None


def _wanted(document: Mapping[str, Any]) -> dict[str, bool]:
    raw = _mapping(document.get("parameters", {}), "`parameters`").get("binary_data_output") is True
    asked = document.get("outputs")
    if not asked:
        return dict.fromkeys(DEFAULT_OUTPUTS, raw)
    if not isinstance(asked, list):
        raise _wrong("`outputs` must be a list")
    wanted: dict[str, bool] = {}
    for each in asked:
        output = _mapping(each, "an output")
        if output.get("name") not in OUTPUTS:
            raise _wrong(f"the outputs are {', '.join(OUTPUTS)}; received {SHORT.repr(output.get('name'))}")
        said = _mapping(output.get("parameters", {}), "`parameters`").get("binary_data")
        wanted[output["name"]] = raw if said is None else said is True
    return wanted


def write(head: dict[str, Any], outputs: Mapping[str, NDArray[Any]], wanted: Mapping[str, bool]) -> tuple[bytes, int]:
    """An answer's body, and the length of its JSON when raw tensors follow it (else 0).

    Args:
        head: what stands before `outputs`.
        outputs: the wanted ones; strings as object arrays.
    """
    described, raw = [], b""
    for name, values in outputs.items():
        text = values.dtype == object
        one: dict[str, Any] = {"name": name, "datatype": "BYTES" if text else "FP32", "shape": list(values.shape)}
        if wanted[name]:
            data = _elements(values) if text else values.astype("<f4").tobytes()
            one["parameters"] = {"binary_data_size": len(data)}
            raw += data
        else:
            # A float32 as the shortest decimal that is that float32 again, not as the float64 beside it.
            one["data"] = values.ravel().tolist() if text else [float(str(value)) for value in values.ravel()]
        described.append(one)
    text_head = json.dumps({**head, "outputs": described}, ensure_ascii=False, allow_nan=False).encode()
    return text_head + raw, len(text_head) if any(wanted.values()) else 0


def _elements(values: NDArray[Any]) -> bytes:
    encoded = [str(value).encode() for value in values.ravel()]
    return b"".join(struct.pack("<I", len(each)) + each for each in encoded)


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(f"{what} must be an object; received {type(value).__name__}")
    return value


def _wrong(what: str) -> InputError:
    return InputError(
        f"Not an inference request: {what}.", hint="GET /v2/models/<name> says what the model takes and gives."
    )
