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


def test_the_threshold_stops_strangers(known: tuple[np.ndarray, np.ndarray]) -> None:
    rng = np.random.default_rng(2)
    x, labels = known
    fitted = unknown.fit(x, labels, cluster(rng, 40, 5), seed=0, accept_rate=0.9)
    detector = UnknownDetector.load(fitted.spec, 1.0, fitted.to_bytes())

    def told(embeddings: np.ndarray) -> float:
        return float((detector.scores(np.zeros((len(embeddings), 2)), embeddings) >= fitted.spec.threshold).mean())

    assert told(cluster(rng, 100, 5)) > 0.95  # a kind that the head was shown
    assert told(cluster(rng, 100, 9)) > 0.95  # one that it was not: the Gaussian's part


@pytest.mark.parametrize(
    ("held_out", "rate", "recorded", "passing"),
    [
        (None, 0.9, 0.9, 109 / 121),
        (60, 0.9, 0.9, 55 / 61),
        (60, 0.97, 0.97, 60 / 61),
        (20, 0.97, 20 / 21, 20 / 21),  # of twenty pictures no threshold can promise 97 %
    ],
)
def test_new_pictures_pass_at_the_rate_that_is_recorded(
    held_out: int | None, rate: float, recorded: float, passing: float
) -> None:
    """The mean over fits, each on pictures of its own: `passing` is the rank of the threshold over n + 1."""
    labels = np.arange(120) % 2
    passed = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        x, mine, fresh = (
            np.abs(np.eye(8)[np.arange(n) % 2] + rng.standard_normal((n, 8)) * 0.5) for n in (120, held_out or 0, 1000)
        )
        others = cluster(rng, 20, 5, 0.5, d=8)
        apart = None if held_out is None else mine
        fitted = unknown.fit(x, labels, others, seed=seed, held_out=apart, accept_rate=rate)
        assert fitted.spec.accept_rate == recorded
        detector = UnknownDetector.load(fitted.spec, 1.0, fitted.to_bytes())
        passed.append(float((detector.scores(np.zeros((1000, 2)), fresh) < fitted.spec.threshold).mean()))
    assert np.mean(passed) == pytest.approx(passing, abs=0.01)


def test_the_range_of_what_is_called_unknown_is_what_chance_makes_of_it() -> None:
    """Against the same drawn: uniform scores, the threshold of that rank, new scores above it."""
    rng = np.random.default_rng(5)
    assert [unknown.rank(n, 0.97) for n in (10, 32, 99, 100, 320)] == [10, 32, 97, 98, 312]
    thresholds = np.sort(rng.random((4000, 320)), axis=1)[:, unknown.rank(320, 0.97) - 1]
    called = (rng.random((4000, 80)) >= thresholds[:, np.newaxis]).mean(axis=1)
    low, high = unknown.called_unknown_range(320, 0.97, 80)
    assert (low, high) == (0.0, pytest.approx(np.quantile(called, 0.975), abs=1e-9))
    assert ((low <= called) & (called <= high)).mean() >= 0.95


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
    # Rank 109 of 120, which is 0.9 of 121: the largest eleven are above, and in single precision perhaps the 109th.
    assert int((scores >= fitted.spec.threshold).sum()) in (11, 12)


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


def test_max_softmax_and_energy_of_a_probe_of_two_classes_are_one_score(known: tuple[np.ndarray, np.ndarray]) -> None:
    rng = np.random.default_rng(8)
    z, other_z = rng.standard_normal(120) * 4, rng.standard_normal(40) * 2
    table = unknown.compare(
        known[0], np.stack([-z, z], 1) / 2, known[1], cluster(rng, 40, 5), np.stack([-other_z, other_z], 1) / 2,
        ["noise"] * 20 + ["photograph: x"] * 20, seed=0, temperature=1.7,
    )  # fmt: skip
    found = {one.pop("method"): one for one in table}
    assert found["max_softmax"] == found["energy"] and found["energy"]["auroc"] > 0.6


def test_the_comparison_keeps_copies_of_a_picture_in_one_fold(known: tuple[np.ndarray, np.ndarray]) -> None:
    """Copies of strangers among a class look known where a copy of each is in the bank, and only there."""
    rng = np.random.default_rng(6)
    x, labels = known
    odd = np.abs(rng.standard_normal((20, 24)))  # each like nothing else
    twice = np.concatenate([x, odd, odd])
    groups = np.concatenate([np.arange(140), np.arange(120, 140)])
    others, kinds = np.abs(rng.standard_normal((60, 24))), ["noise"] * 30 + ["photograph: x"] * 30
    all_labels = np.concatenate([labels, np.arange(40) % 2])
    found = {}
    for name, which in (("together", groups), ("apart", None)):
        table = unknown.compare(
            twice, np.zeros((160, 2)), all_labels, others, np.zeros((60, 2)), kinds,
            seed=0, temperature=1.0, groups=which,
        )  # fmt: skip
        found[name] = {one["method"]: one["auroc"] for one in table}["knn"]
    assert found["together"] < found["apart"] - 0.01


def test_copies_of_a_picture_share_a_fold() -> None:
    labels = np.repeat([0, 1], 20).astype(np.int64)
    groups = np.arange(40, dtype=np.int64) // 2
    for rest, fold in unknown.folds(labels, 0, groups):
        assert not set(groups[rest]) & set(groups[fold])
        assert set(labels[rest]) == {0, 1}
    assert len(unknown.folds(labels[15:23], 0)) == 3  # as many as the smaller class has pictures
    with pytest.raises(DataError, match="too few different"):
        unknown.folds(labels[15:21], 0)
