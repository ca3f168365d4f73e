"""How a head is chosen, calibrated and preferred to another, on features whose truth is known. No network runs."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from lawnwatch import bundle, dataset, model, train
from lawnwatch.config import Settings
from lawnwatch.errors import DataError, SettingsError
from lawnwatch.store import LocalStore
from lawnwatch.train import step
from lawnwatch.train.candidates import (
    Candidate,
    Lesson,
    by_fold,
    color_baseline,
    held_out,
    judge,
    linear_probe,
    pick,
    small_input,
)
from lawnwatch.train.checkpoint import Checkpoint
from lawnwatch.train.features import COLOR_FEATURES, VIEWS, Features
from lawnwatch.train.sweep import probe_sweep, tuning_sweep

pytestmark = pytest.mark.unit


def features(n: int, seed: int, apart: float) -> Features:
    """n pictures of two classes whose embeddings differ by `apart` standard deviations in each of 200 numbers."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int64) % 2
    pooled = rng.standard_normal((n, model.EMBEDDING)).astype(np.float32)
    pooled[:, :200] += np.where(labels == 1, apart, -apart)[:, np.newaxis] / 2
    views = pooled[:, np.newaxis] + rng.standard_normal((n, VIEWS, model.EMBEDDING)).astype(np.float32) * 0.1
    return Features(
        rows=[
            dataset.Row(f"{i:064x}", f"images/{i}", "ab"[i % 2], "train", f"{i}", "http://a/", 9, 9, 0.5, 9.0)
            for i in range(n)
        ],
        labels=labels,
        groups=np.arange(n, dtype=np.int64),
        pooled=pooled,
        views=views,
        cut=np.zeros((0,), np.float16),
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


def test_the_student_is_judged_on_what_neither_it_nor_its_teacher_has_seen() -> None:
    """Labels without a pattern: whoever is asked of what he learnt is right, the others are no better than chance."""
    train, val = features(40, 1, 0.0), features(20, 2, 0.0)
    teacher, arrays = linear_probe(train, val, 2, seed=0)
    lesson = Lesson.of_probe(arrays, teacher.temperature, held_out(arrays, train, val))
    assert [len(rest) for rest, _ in lesson.folds] == [int((lesson.fold_of != k).sum()) for k in range(5)]
    pooled = arrays["held_out_pooled"]
    student, made = small_input((pooled, pooled), lesson, 2)
    assert 0.2 < student.val_accuracy < 0.8
    known = (pooled @ made["kernel"] + made["bias"]).argmax(axis=1)
    assert (known == lesson.labels).mean() > 0.95
    assert student.params["teacher"] == "linear_probe" and len(student.val_losses) == 60


def test_the_student_learns_what_the_teacher_says_and_not_only_the_labels() -> None:
    """A teacher that is sure of the opposite of every label draws the student's answers to the middle."""
    x, labels = features(60, 1, 1.0).pooled, np.arange(60) % 2
    truth = np.eye(2)[labels]

    def sureness(answers: np.ndarray) -> float:
        lesson = Lesson("fine_tuned", [], labels, answers, [], labels)
        _, made = small_input((x, x), lesson, 2)
        return float(np.abs((x @ made["kernel"] + made["bias"])[:, 0]).mean())

    assert sureness(1 - truth) < 0.3 * sureness(truth)


def test_a_sweep_begins_with_the_usual_numbers_and_keeps_the_best() -> None:
    settings = Settings(train={"sweep_seconds": 1.0})  # type: ignore[arg-type]
    asked: list[tuple[bool, float]] = []

    def loss_of(views: bool, c: float) -> float:
        asked.append((views, c))
        return (math.log10(c) + 1) ** 2 + views

    ((views, c),), trials = probe_sweep(settings, loss_of, print)
    assert asked[0] == (False, 0.003) and not views
    assert len(trials) == len(asked) > 3
    assert loss_of(views, c) == min(trial["log_loss"] for trial in trials) < (math.log10(0.003) + 1) ** 2
    tuning, none = tuning_sweep(settings, lambda tuning: math.inf, print)
    assert (tuning.epochs, none) == (settings.train.fine_tune_epochs, [])


@pytest.mark.parametrize("fault", ["none", "no arrays", "altered", "cut off", "not JSON"])
def test_a_candidate_is_handed_over_whole_or_counts_as_not_trained(tmp_path: Path, fault: str) -> None:
    store, kernel = LocalStore(tmp_path), np.arange(6, dtype=np.float32).reshape(3, 2)
    Checkpoint(store, "a" * 64).save("linear_probe", candidate("linear_probe", [0.1, 0.2]), {"kernel": kernel})
    arrays, facts = (f"train/{'a' * 64}/linear_probe.{ending}" for ending in ("npz", "json"))
    data = store.get(arrays)
    if fault == "no arrays":
        store.delete(arrays)
    elif fault == "altered":
        store.put(arrays, data[:-1] + bytes([data[-1] ^ 1]))
    elif fault == "cut off":
        store.put(arrays, data[: len(data) // 2])
    elif fault == "not JSON":
        store.put(facts, store.get(facts)[:-5])
    found = Checkpoint(store, "a" * 64).load("linear_probe")
    assert Checkpoint(store, "b" * 64).load("linear_probe") is None
    if fault != "none":
        assert found is None
        return
    assert found is not None
    assert found[0] == candidate("linear_probe", [0.1, 0.2]) and np.array_equal(found[1]["kernel"], kernel)
    Checkpoint(store, "a" * 64).clear()
    assert list(store.list("train/")) == []


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


@pytest.mark.parametrize("wanted", [["linear_prob"], ["color_baseline"], ["small_input"], ["fine_tuned", "x"]])
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
    color, labels = np.full((20, COLOR_FEATURES), np.nan, np.float32), np.arange(20) % 2
    with pytest.raises(ValueError, match="NaN"):
        color_baseline(color, labels, color, labels, 2)
    judged = judge(np.full((4, 2), np.nan), np.zeros(4, np.int64))
    assert judged.loss == math.inf
