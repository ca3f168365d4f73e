"""What is no class is told as such, on embeddings whose truth is known, and thresholds keep their promise."""

from __future__ import annotations

import numpy as np
import pytest

from lawnwatch import unknown
from lawnwatch.bundle import UnknownDetector
from lawnwatch.errors import DataError

pytestmark = pytest.mark.unit


def cluster(rng: np.random.Generator, n: int, centre: int, spread: float = 0.15, d: int = 24) -> np.ndarray:
    return np.abs(np.eye(d)[centre] + rng.standard_normal((n, d)) * spread)


@pytest.fixture(scope="module")
def known() -> tuple[np.ndarray, np.ndarray]:
    """Two classes of 60 embeddings (d = 24)."""
    rng = np.random.default_rng(1)
    return np.concatenate([cluster(rng, 60, 0), cluster(rng, 60, 1)]), np.repeat([0, 1], 60).astype(np.int64)


def test_strangers_are_of_many_kinds_and_the_same_for_the_same_seed() -> None:
    kinds, pictures = unknown.strangers(32, seed=3)
    again = unknown.strangers(32, seed=3)[1]
    assert all(picture.shape == (32, 32, 3) and picture.dtype == np.uint8 for picture in pictures)
    assert all(np.array_equal(a, b) for a, b in zip(pictures, again, strict=True))
    assert not np.array_equal(pictures[0], unknown.strangers(32, seed=4)[1][0])
    assert set(kinds) == {*unknown.KINDS, "photograph: china", "photograph: flower"}


def test_the_threshold_lets_the_stated_share_pass_and_stops_strangers(known: tuple[np.ndarray, np.ndarray]) -> None:
    rng = np.random.default_rng(2)
    x, labels = known
    fitted = unknown.fit(x, labels, cluster(rng, 40, 5), seed=0, accept_rate=0.9)
    detector = UnknownDetector.load(fitted.spec, 1.0, fitted.to_bytes())

    def told(embeddings: np.ndarray) -> float:
        return float((detector.scores(np.zeros((len(embeddings), 2)), embeddings) >= fitted.spec.threshold).mean())

    fresh = np.concatenate([cluster(rng, 500, 0), cluster(rng, 500, 1)])
    assert 0.03 < told(fresh) < 0.2
    assert told(cluster(rng, 100, 5)) > 0.95  # a kind that the head was shown
    assert told(cluster(rng, 100, 9)) > 0.95  # one that it was not: the Gaussian's part


def test_pictures_that_the_network_was_trained_on_do_not_set_the_threshold(
    known: tuple[np.ndarray, np.ndarray],
) -> None:
    """A tuned network draws its training pictures together; new ones lie further out, and they are to pass."""
    rng = np.random.default_rng(3)
    _, labels = known
    tight = np.concatenate([cluster(rng, 60, 0, 0.02), cluster(rng, 60, 1, 0.02)])
    wide = np.concatenate([cluster(rng, 60, 0), cluster(rng, 60, 1)])
    fitted = unknown.fit(tight, labels, cluster(rng, 40, 5), seed=0, held_out=wide, accept_rate=0.9)
    detector = UnknownDetector.load(fitted.spec, 1.0, fitted.to_bytes())
    scores = detector.scores(np.zeros((120, 2)), wide)
    assert float((scores >= fitted.spec.threshold).mean()) == pytest.approx(0.1, abs=0.02)


def test_the_comparison_judges_the_head_on_kinds_that_it_has_not_seen(known: tuple[np.ndarray, np.ndarray]) -> None:
    """A stranger that lies inside a class, unlike all the other kinds, is missed: showing it would have caught it."""
    rng = np.random.default_rng(4)
    x, labels = known
    others = np.concatenate([cluster(rng, 30, 5), cluster(rng, 30, 0)])
    kinds = ["noise"] * 30 + ["photograph: inside"] * 30
    table = unknown.compare(x, np.zeros((120, 2)), labels, others, np.zeros((60, 2)), kinds, seed=0, temperature=1.0)
    found = {one["method"]: one for one in table}
    assert [one["method"] for one in table if one["chosen"]] == [unknown.METHOD]
    assert found["max_softmax"]["auroc"] == found["energy"]["auroc"] == 0.5  # all logits are level here
    assert found["background"]["photographs"] < 0.7
    assert found["mahalanobis"]["drawings"] > 0.99


def test_copies_of_a_picture_share_a_fold() -> None:
    labels = np.repeat([0, 1], 20).astype(np.int64)
    groups = np.arange(40, dtype=np.int64) // 2
    for rest, fold in unknown.folds(labels, 0, groups):
        assert not set(groups[rest]) & set(groups[fold])
        assert set(labels[rest]) == {0, 1}
    assert len(unknown.folds(labels[15:23], 0)) == 3  # as many as the smaller class has pictures
    with pytest.raises(DataError, match="too few different"):
        unknown.folds(labels[15:21], 0)
