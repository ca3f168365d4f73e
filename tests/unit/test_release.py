"""What a bundle says of itself and proves itself by."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import cv2
import numpy as np
import pytest

from lawnwatch import images, release
from lawnwatch.registry import VersionInfo

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


def card(served: str, **changes: Any) -> str:
    info = VersionInfo(
        version=3, aliases=["champion"], run_id="r" * 32, created_at=datetime(2026, 1, 1, tzinfo=UTC),
        candidate="linear_probe", snapshot="0" * 64, decision="promote", reason="It passes.", metrics={},
        bundle_sha256=None,
    )  # fmt: skip
    facts = {
        "classes": ["dandelion", "grass"],
        "candidate": "linear_probe",
        "served": served,
        "variants": {name: {"arithmetic": name.split("_")[-1]} for name in ("float32", "int8", "small_int8")},
        "samples": False,
        "snapshot": "0" * 64,
        "weights": "none",
        "git_commit": "abc",
        "created_at": "2026-01-01T00:00:00+00:00",
    }
    evaluation: dict[str, Any] = {
        "images": 80,
        "metrics": {"accuracy": {"value": 0.9625, "low": 0.895, "high": 0.987}},
        "per_class": {},
        "verdict": {"decision": "promote", "reason": "It passes."},
        "temperature": 0.66,
        "unknown": {"threshold": 3.8, "method": "mahalanobis_background", "accept_rate": 0.97},
    }
    return release.model_card("lawnwatch", info, facts, evaluation | changes)


def test_the_card_names_the_graph_that_is_served() -> None:
    small = card("small_int8")
    assert "MobileNetV2 at 160 × 160 pixels, its head `small_input` distilled from `linear_probe`" in small
    assert "with int8 arithmetic" in small and "224" not in small
    whole = card("float32")
    assert "MobileNetV2 at 224 × 224 pixels, candidate `linear_probe`, in LiteRT with float32" in whole


def test_the_card_shows_ranges_beside_figures_and_reads_older_evaluations() -> None:
    ece = {"value": 0.025, "low": 0.0, "high": 0.091}
    called = {"value": 0.0625, "low": 0.027, "high": 0.138}
    new = card(
        "int8",
        metrics={"ece": ece | {"expected": {"low": 0.014, "high": 0.066}}},
        called_unknown=called | {"expected": {"low": 0.0, "high": 0.075}},
    )
    assert "| ece | 0.025 | 0.014 to 0.066 if calibrated |" in new
    assert "6.2% are called unknown; 3.0% is meant, of which chance makes 0.0% to 7.5%" in new
    old = card("int8", metrics={"ece": ece}, called_unknown=called)
    assert "| ece | 0.025 | 0.000 to 0.091 |" in old and "chance" not in old
