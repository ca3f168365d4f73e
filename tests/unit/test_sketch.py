"""Sketches: merging is counting everything at once, bytes carry no pickle."""

from __future__ import annotations

import io

import numpy as np
import pytest

from lawnwatch.errors import IntegrityError
from lawnwatch.sketch import Sketch

pytestmark = pytest.mark.unit


def sketch_of(n: int, seed: int) -> tuple[Sketch, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    parts = rng.gamma(2.0, size=(n, 64)), rng.random(n), rng.gamma(2.0, 300, size=n)
    return Sketch.of(*parts), parts


def test_merging_equals_sketching_both() -> None:
    left, a = sketch_of(30, 1)
    right, b = sketch_of(70, 2)
    both = Sketch.of(*(np.concatenate(pair) for pair in zip(a, b, strict=True)))
    for merged in (left.merge(right), right.merge(left)):
        assert merged.count == 100
        np.testing.assert_allclose(merged.mean, both.mean)
        np.testing.assert_allclose(merged.square, both.square)
        np.testing.assert_array_equal(merged.projections, both.projections)
        np.testing.assert_array_equal(merged.brightness, both.brightness)
        np.testing.assert_array_equal(merged.sharpness, both.sharpness)


def test_every_picture_is_counted_even_outside_the_bins() -> None:
    sketch = Sketch.of(np.eye(5), np.array([-1, 0, 0.5, 1, 9.0]), np.array([0, 1, 10, 1e9, 1e30]))
    assert sketch.brightness.sum() == sketch.sharpness.sum() == 5
    assert (sketch.projections.sum(axis=1) == 5).all()


def test_bytes_round_trip_and_stay_small() -> None:
    sketch, _ = sketch_of(40, 3)
    data = sketch.to_bytes()
    assert len(data) < 50_000
    again = Sketch.from_bytes(data)
    np.testing.assert_array_equal(again.mean, sketch.mean)
    assert again.merge(sketch).count == 80


def test_a_pickle_is_refused() -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (pytest.fail, ("unpickled",))

    buffer = io.BytesIO()
    np.savez(buffer, count=np.array(Harmful(), dtype=object))
    for data in (buffer.getvalue(), b"", b"PK\x03\x04 no zip", sketch_of(3, 4)[0].to_bytes()[:500]):
        with pytest.raises(IntegrityError):
            Sketch.from_bytes(data)
