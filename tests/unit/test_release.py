"""What a bundle says of itself and proves itself by."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from lawnwatch import images, release

pytestmark = pytest.mark.unit

CAP = 50_000_000


def photo(seed: int = 0, sharp: bool = True) -> bytes:
    """A JPEG of the size of those that are found in the web."""
    pixels = np.random.default_rng(seed).integers(0, 256, (23, 34, 3) if sharp else (2, 2, 3)).astype(np.uint8)
    return images.jpeg(np.asarray(cv2.resize(pixels, (275, 183)), np.uint8))


def test_a_picture_as_a_phone_sends_it_is_shrunk_by_averaging_only(monkeypatch: pytest.MonkeyPatch) -> None:
    data = release.as_a_phone_sends_it(photo(), max_pixels=CAP)
    assert data == release.as_a_phone_sends_it(photo(), max_pixels=CAP)
    assert len(data) < 200_000
    stored = images.inspect(data, max_pixels=CAP)
    assert (stored.width, stored.height) == (960, 1280)
    whole = images.decode(data, size=None, max_pixels=CAP)
    assert whole.shape == (960, 1280, 3)
    # Upright it is the picture that it was made of.
    before = cv2.resize(images.decode(photo(), size=None, max_pixels=CAP), (34, 23), interpolation=cv2.INTER_AREA)
    after = cv2.resize(whole, (34, 23), interpolation=cv2.INTER_AREA)
    assert np.abs(before.astype(float) - after).mean() < 8

    right = images.decode(data, size=224, max_pixels=CAP).astype(float)
    for other, levels in ((cv2.INTER_NEAREST, 8), (cv2.INTER_LINEAR, 1)):
        monkeypatch.setattr(cv2, "INTER_AREA", other)
        assert np.abs(images.decode(data, size=224, max_pixels=CAP) - right).mean() > levels, other


def test_the_picture_whose_answer_the_shrinking_changes_most_is_taken() -> None:
    sent = [release.as_a_phone_sends_it(photo(seed, sharp=False), max_pixels=CAP) for seed in (1, 3, 4)]

    def ask(picture: images.Rgb) -> np.ndarray:
        """Minds the grain, and of the darkest picture most."""
        p = 1 / (1 + np.exp(8 - np.log(images.sharpness(picture)))) * (1 - images.brightness(picture)) ** 4
        return np.array([p, 1 - p])

    assert release.most_telling(sent, ask, size=224) == 1
