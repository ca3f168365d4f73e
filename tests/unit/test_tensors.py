"""What a request of the inference protocol may make this process do before it is refused."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest

from lawnwatch.errors import InputError
from lawnwatch.serving import tensors

pytestmark = pytest.mark.unit

SIZE, MOST = 8, 4


def read(data: Any, *, count: int = 1, most_json: int = 20_000_000, **other: Any) -> tensors.Inference:
    tensor = {"name": "image", "datatype": "UINT8", "shape": [count, SIZE, SIZE, 3], "data": data} | other
    body = json.dumps({"inputs": [tensor]}).encode()
    return tensors.read(body, "", size=SIZE, most=MOST, most_json=most_json)


def test_pixels_in_json_may_be_flat_or_nested_as_their_shape() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    for data in (pixels.tolist(), pixels.ravel().tolist()):
        np.testing.assert_array_equal(np.stack(list(read(data, count=2).pictures)), pixels)


WHOLE = [0] * (SIZE * SIZE * 3)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (WHOLE[:-1], "whole numbers"),
        ([*WHOLE, 0], "whole numbers"),
        ([*WHOLE[:-1], 0.5], "whole numbers"),
        ([*WHOLE[:-1], True], "whole numbers"),
        ([*WHOLE[:-1], None], "whole numbers"),
        ([*WHOLE[:-1], []], "whole numbers"),
        ([[WHOLE]], "whole numbers"),
        ([WHOLE[:64], WHOLE[:128]], "whole numbers"),
        ([*WHOLE[:-1], 256], "between 0 and 255"),
        ([*WHOLE[:-1], -1], "between 0 and 255"),
        ([*WHOLE[:-1], 10**4000], "between 0 and 255"),
    ],
)
def test_pixels_that_are_none_are_said_so(data: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(data)


@pytest.mark.parametrize(
    "data",
    [
        ["x" * 30_000] + [""] * 5_000,  # numpy would make 5,001 strings as long as the longest
        [[]] * 400_000,
        [{}] * 400_000,
        ["ab"] * 400_000,
        [0.5] * 400_000,
    ],
    ids=["strings", "lists", "objects", "short strings", "numbers"],
)
def test_46_data_that_is_no_tensor_costs_no_memory(data: Any) -> None:
    body = json.dumps({"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, SIZE, SIZE, 3], "data": data}]})
    sent = body.encode()
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            tensors.read(sent, "", size=SIZE, most=MOST, most_json=20_000_000)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(sent) + 1_000_000
    finally:
        tracemalloc.stop()


def test_json_of_pixels_is_no_longer_than_its_numbers_need() -> None:
    assert read(WHOLE, id=" " * 60_000).pictures
    with pytest.raises(InputError, match="bytes for 192 numbers"):
        read(WHOLE, id=" " * 70_000)


@pytest.mark.parametrize("field", ["name", "datatype", "shape"])
@pytest.mark.parametrize("value", [10**4000, [[0] * 700], {"a": "x" * 10_000}])
def test_what_was_received_is_shown_in_short(field: str, value: Any) -> None:
    with pytest.raises(InputError) as refused:
        read(WHOLE, **{field: value})
    assert len(refused.value.message) < 400
