"""How a head is chosen, calibrated and preferred to another, on features whose truth is known. No network runs."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from lawnwatch import bundle, dataset, model, train
from lawnwatch.config import Settings
from lawnwatch.errors import DataError, SettingsError
from lawnwatch.train import step
from lawnwatch.train.candidates import Candidate, by_fold, color_baseline, judge, linear_probe, pick
from lawnwatch.train.features import COLOR_FEATURES, VIEWS, Features

pytestmark = pytest.mark.unit


def features(n: int, seed: int, apart: float) -> Features:
    """n pictures of two classes whose embeddings differ by `apart` standard deviations in each of 200 numbers."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int64) % 2
    pooled = rng.standard_normal((n, model.EMBEDDING)).astype(np.float32)
    pooled[:, :200] += np.where(labels == 1, apart, -apart)[:, np.newaxis] / 2
    views = pooled[:, np.newaxis] + rng.standard_normal((n, VIEWS, model.EMBEDDING)).astype(np.float32) * 0.1
    return Features(
        rows=[None] * n,  # type: ignore[list-item]
        labels=labels,
        groups=np.arange(n, dtype=np.int64),
        pooled=pooled,
        views=views,
        cut=np.zeros((0,), np.float16),
        color=rng.random((n, COLOR_FEATURES)).astype(np.float32),
    )


def candidate(name: str, losses: list[float]) -> Candidate:
    loss = float(np.mean(losses)) if losses else math.inf
    return Candidate(name, True, 0.9, loss, 1.0, 1.0, val_losses=losses)


def test_the_probe_is_judged_by_heads_that_have_not_seen_the_picture() -> None:
    """In 1280 dimensions 60 random pictures can be learnt by heart: only an honest figure is near a half."""
    learnt, arrays = linear_probe(features(40, 1, 0.0), features(20, 2, 0.0), 2, seed=0)
    assert 0.2 < learnt.params["cv_accuracy"] < 0.8
    x = np.concatenate([features(40, 1, 0.0).pooled, features(20, 2, 0.0).pooled])
    labels = np.concatenate([features(40, 1, 0.0).labels, features(20, 2, 0.0).labels])
    assert ((x @ arrays["kernel"] + arrays["bias"]).argmax(axis=1) == labels).mean() > 0.95
    held_out = by_fold(x, arrays["fold_of"], arrays["fold_kernels"], arrays["fold_biases"])
    assert (held_out.argmax(axis=1) == labels).mean() == pytest.approx(learnt.params["cv_accuracy"], abs=1e-4)
    assert len(learnt.val_losses) == 20


def test_the_probe_finds_what_there_is_to_find_and_the_start_has_not_seen_validation() -> None:
    learnt, arrays = linear_probe(features(80, 1, 1.0), features(20, 2, 1.0), 2, seed=0)
    assert learnt.val_accuracy == 1.0
    assert learnt.params["cv_images"] == 100
    assert not np.allclose(arrays["start_kernel"], arrays["kernel"])
    fresh = features(200, 3, 1.0)
    assert ((fresh.pooled @ arrays["kernel"] + arrays["bias"]).argmax(axis=1) == fresh.labels).mean() > 0.97


@pytest.mark.parametrize("true", [0.5, 1.0, 2.5])
def test_the_temperature_is_found_again(true: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4000, 2)) * 3
    chance = bundle.probabilities(logits, true)[:, 1]
    labels = (rng.random(4000) < chance).astype(np.int64)
    assert train.fit_temperature(logits, labels) == pytest.approx(true, rel=0.1)


@pytest.mark.parametrize("n", [5, 20, 60])
def test_a_split_without_a_mistake_does_not_make_the_model_certain(n: int) -> None:
    labels = np.arange(n, dtype=np.int64) % 2
    logits = np.where(np.eye(2)[labels] > 0, 1.5, -1.5)
    assert train.fit_temperature(logits, labels) > 0.6


def test_the_simplest_candidate_within_one_standard_error_is_picked() -> None:
    rng = np.random.default_rng(0)
    probe = rng.exponential(0.1, 60)
    alike, better = probe + rng.normal(-0.002, 0.1, 60), probe - 0.05 + rng.normal(0, 0.02, 60)
    simple = candidate("linear_probe", probe.tolist())
    assert pick([simple, candidate("fine_tuned", alike.tolist())]) is simple
    tuned = candidate("fine_tuned", better.tolist())
    assert pick([simple, tuned]) is tuned
    assert pick([simple]) is simple


@pytest.mark.parametrize("wanted", [["linear_prob"], ["color_baseline"], ["fine_tuned", "x"]])
def test_candidates_that_cannot_be_trained_are_said(wanted: list[str]) -> None:
    with pytest.raises(SettingsError, match="cannot be trained"):
        train.run(
            Settings(train={"candidates": wanted}),  # type: ignore[arg-type]
            *(None, None),  # type: ignore[arg-type]
            progress=print,
        )


@pytest.mark.parametrize(
    ("pictures", "words"),
    [
        ([("grass", "train"), ("grass", "validation")], "needs at least two"),
        ([("grass", "train"), ("daisy", "train"), ("grass", "validation"), ("grass", "test")], "validation split"),
        ([("grass", "train"), ("daisy", "test"), ("grass", "validation")], "train split"),
    ],
)
def test_one_class_or_a_handful_of_pictures_ends_in_words(pictures: list[tuple[str, str]], words: str) -> None:
    rows = [
        dataset.Row(f"{i:064x}", f"images/{i}", label, split, f"{i}", "http://a/", 9, 9, 0.5, 9.0)
        for i, (label, split) in enumerate(pictures)
    ]
    labels = sorted({label for label, _ in pictures})
    snapshot = dataset.Snapshot("a" * 64, datetime(2026, 1, 1, tzinfo=UTC), labels, {}, False, rows)
    with pytest.raises(DataError, match=words):
        step.must_be_trainable(snapshot)


def test_logits_that_are_no_numbers_make_no_candidate() -> None:
    part: Any = features(20, 1, 1.0)
    part.color[:] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        color_baseline(part, part, 2)
    judged = judge(np.full((4, 2), np.nan), np.zeros(4, np.int64))
    assert judged.loss == math.inf
