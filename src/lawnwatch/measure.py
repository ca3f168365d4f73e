"""How good answers are: figures with 95 % intervals, and where they are good and where not. Pure functions of arrays.

Each interval keeps its promise on a few dozen images with hardly a mistake among them, where resampling them says too
little: Wilson's for shares, MOVER for means over the classes, Newcombe's for the area under the curve, the Bayesian
bootstrap for losses. The functions name their sources.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lawnwatch.train import log_loss

RESAMPLES = 500
ECE_BINS = 10
COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)
FEW = 20  # images below which a slice's figure is marked as too few to say

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


# --- shares -------------------------------------------------------------------------------------------------


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share; (0, 1) when there is nothing to count."""
    if n == 0:
        return 0.0, 1.0
    z = quantile(0.5 + confidence / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))  # of all or none, but for rounding


def quantile(p: float) -> float:
    """Of the standard normal distribution."""
    return NormalDist().inv_cdf(p)


def share(hits: int, n: int) -> dict[str, float | None]:
    """A share with Wilson's interval; its value is None when there is nothing to count."""
    low, high = wilson(hits, n)
    return {"value": hits / n if n else None, "low": low, "high": high}


# --- all answers --------------------------------------------------------------------------------------------


def expected_calibration_error(probabilities: Floats, labels: Ints) -> float:
    """Mean gap between confidence and accuracy over ten equal bins, weighted by count (Guo et al. 2017)."""
    return _calibration_error(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels)


def _calibration_error(confidence: Floats, right: Bools) -> float:
    gaps = np.bincount(_bins(confidence), weights=right.astype(float) - confidence, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(right))


def _bins(confidence: Floats) -> Ints:
    return np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)


def area_under_curve(probabilities: Floats, labels: Ints) -> float | None:
    """Area under the ROC curve; of more than two classes the mean of one against the rest. None with one class only.

    The chance that a picture of the class gets more of its probability than one of another class; ties count half.
    """
    areas = [area for area, _ in _areas(probabilities, labels)]
    return float(np.mean(areas)) if areas else None


def _areas(probabilities: Floats, labels: Ints) -> list[tuple[float, int]]:
    """Of each class against the rest the area and the class's images; of two classes once."""
    from scipy.stats import rankdata  # type: ignore[import-untyped]

    n, classes = probabilities.shape
    areas = []
    for k in range(1 if classes == 2 else 0, classes):  # of two classes, both have the same area
        mine = labels == k
        count = int(mine.sum())
        if 0 < count < n:
            ranks = rankdata(probabilities[:, k])[mine].sum()
            areas.append((float((ranks - count * (count + 1) / 2) / (count * (n - count))), count))
    return areas


def confusion(predicted: Ints, labels: Ints, n_classes: int) -> Ints:
    """(n_classes, n_classes) counts; rows are the truth."""
    cells = np.bincount(labels * n_classes + predicted, minlength=n_classes * n_classes)
    return cells.reshape(n_classes, n_classes).astype(np.int64)


def figures(probabilities: Floats, labels: Ints) -> dict[str, float]:
    """Accuracy, balanced accuracy, macro-F1, AUC, log loss, Brier score and ECE of (n, k) probabilities."""
    matrix = confusion(probabilities.argmax(axis=1), labels, probabilities.shape[1])
    right, truth, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    seen = truth > 0
    recall = right[seen] / truth[seen]
    f1 = 2 * right[seen] / (truth[seen] + predicted[seen])
    targets = np.eye(probabilities.shape[1])[labels]
    found = {
        "accuracy": float(right.sum() / len(labels)),
        "balanced_accuracy": float(recall.mean()),
        "macro_f1": float(f1.mean()),
        "log_loss": log_loss(probabilities, labels),
        "brier": float(((probabilities - targets) ** 2).sum(axis=1).mean()),
        "ece": expected_calibration_error(probabilities, labels),
    }
    area = area_under_curve(probabilities, labels)
    return found if area is None else {**found, "auc": area}


# --- their intervals ----------------------------------------------------------------------------------------


def balanced_accuracy_interval(matrix: Ints) -> tuple[float, float]:
    """MOVER over Wilson's interval of each class's recall (Zou and Donner 2008).

    Args:
        matrix: (k, k) counts; rows are the truth.
    """
    seen = matrix.sum(axis=1) > 0
    right, truth = matrix.diagonal()[seen], matrix.sum(axis=1)[seen]
    low, high = np.array([wilson(int(hits), int(count)) for hits, count in zip(right, truth, strict=True)]).T
    return _mover(right / truth, low, high)


def macro_f1_interval(matrix: Ints) -> tuple[float, float]:
    """MOVER (Zou and Donner 2008) over an interval of each class's F1, whose variances count twice.

    With J the share of a class's right answers among the pictures that are of it or were named so, F1 is
    2 J / (1 + J): Wilson's interval of J becomes that of F1. A mistake touches two classes, the true one and the named
    one; as (a + b)² is at most 2 (a² + b²), twice the sum of the variances is enough for that.

    Args:
        matrix: (k, k) counts; rows are the truth.
    """
    seen = matrix.sum(axis=1) > 0
    right, touched = matrix.diagonal()[seen], (matrix.sum(axis=0) + matrix.sum(axis=1) - matrix.diagonal())[seen]
    low, high = np.array([wilson(int(hits), int(count)) for hits, count in zip(right, touched, strict=True)]).T
    value, low, high = (2 * j / (1 + j) for j in (right / touched, low, high))
    return _mover(value, low, high, variance=2)


def _mover(values: Floats, low: Floats, high: Floats, variance: float = 1) -> tuple[float, float]:
    """The interval of a mean from those of its terms; `variance`: of their sum, in sums of their variances."""
    mean, n = float(values.mean()), len(values)
    below, above = (math.sqrt(variance * float((away**2).sum())) / n for away in (values - low, high - values))
    return max(0.0, mean - below), min(1.0, mean + above)


def area_interval(probabilities: Floats, labels: Ints) -> tuple[float, float]:
    """Newcombe's score interval of the area under the ROC curve, with Hanley and McNeil's variance (Newcombe 2006,
    method 5). Of more than two classes the mean of the bounds of one against the rest, as if these areas rose and fell
    together, which is never too narrow. (0, 1) with one class only.
    """
    bounds = [
        (_lower_area(area, count, len(labels)), 1 - _lower_area(1 - area, count, len(labels)))
        for area, count in _areas(probabilities, labels)
    ]
    low, high = np.mean(bounds, axis=0) if bounds else (0.0, 1.0)
    return float(low), float(high)


def _lower_area(area: float, count: int, n: int) -> float:
    """The smallest true area from which `area` is not further than 1.96 of the standard errors that hold there."""
    from scipy.optimize import brentq  # type: ignore[import-untyped]

    z, more = quantile(0.975), n / 2 - 1

    def excess(true: float) -> float:
        pairs = 1 + more * (1 - true) / (2 - true) + more * true / (1 + true)
        return (area - true) ** 2 - z**2 * true * (1 - true) * pairs / (count * (n - count))

    # At an area of 1 the standard error is nothing, and 1 a second solution.
    return float(brentq(excess, 0.0, min(area, 1 - 1e-9))) if area > 0 else 0.0


def mean_loss_interval(losses: Floats, probabilities: Floats, labels: Ints) -> tuple[float, float]:
    """The Bayesian bootstrap (Rubin 1981) of a mean loss, over the images and one more: a mistake.

    Nearly all of a good model's loss lies in a few mistakes, and of those that happened not to be among the images no
    resample knows. The one more is drawn, in each resample, from all answers that might have been wrong, by the
    probability that the model itself gave to that.

    Args:
        losses: (n, k), of each image for each label that it might have had.
        probabilities: (n, k). labels: (n,).
    """
    rng = np.random.default_rng(0)
    n = np.arange(len(labels))
    doubt = np.maximum(probabilities, 1e-12)
    doubt[n, probabilities.argmax(axis=1)] = 0
    found = losses[n, labels]
    means = []
    for mistake in rng.choice(losses.ravel(), RESAMPLES, p=doubt.ravel() / doubt.sum()):
        weights = rng.exponential(size=len(labels) + 1)
        means.append((weights[:-1] @ found + weights[-1] * mistake) / weights.sum())
    low, high = np.quantile(means, [0.025, 0.975])
    # Where no mistake was made the value itself lies below what is likely.
    return float(min(low, found.mean())), float(max(high, found.mean()))


def calibrated_range(probabilities: Floats) -> tuple[float, float]:
    """Where the calibration error of 95 % of such test sets would lie if every confidence were honest.

    Consistency resampling (Bröcker and Smith 2007). The error is a mean of absolute values: few images make it larger
    than nothing for the best of models, which an interval around it does not tell.
    """
    rng = np.random.default_rng(0)
    confidence = probabilities.max(axis=1)
    errors = []
    for _ in range(RESAMPLES):
        drawn = confidence[rng.integers(0, len(confidence), len(confidence))]
        errors.append(_calibration_error(drawn, rng.random(len(drawn)) < drawn))
    low, high = np.quantile(errors, [0.025, 0.975])
    return float(low), float(high)


def calibration_error_interval(probabilities: Floats, labels: Ints) -> tuple[float, float]:
    """Bounds of the true calibration error, on the safe side: chance alone moves the measured one by no more.

    What chance does to each bin is drawn twice, from the posterior of its accuracy (Jeffreys' prior) and as in
    `calibrated_range`; by the triangle inequality the error moves by at most the larger of their sums.
    """
    rng = np.random.default_rng(0)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = _bins(confidence)
    images, hits = np.bincount(bins, minlength=ECE_BINS), np.bincount(bins, weights=right, minlength=ECE_BINS)
    drawn = rng.beta(hits + 0.5, images - hits + 0.5, size=(RESAMPLES, ECE_BINS))
    chance = np.abs(drawn * images - hits).sum(axis=1) / len(labels)
    away = max(float(np.quantile(chance, 0.975)), calibrated_range(probabilities)[1])
    value = _calibration_error(confidence, right)
    return max(0.0, value - away), min(1.0, value + away)


# --- all of it ----------------------------------------------------------------------------------------------


def measure(probabilities: Floats, labels: Ints, classes: Sequence[str]) -> dict[str, Any]:
    """All figures with 95 % intervals, per class too; confusion, reliability and what leaving out the unsure brings.

    Args:
        probabilities: (n, k), calibrated.
        labels: (n,), indices into classes.
    """
    n = len(labels)
    matrix = confusion(probabilities.argmax(axis=1), labels, len(classes))
    bounds = {
        "accuracy": wilson(int(matrix.trace()), n),
        "balanced_accuracy": balanced_accuracy_interval(matrix),
        "macro_f1": macro_f1_interval(matrix),
        "log_loss": mean_loss_interval(-np.log(np.clip(probabilities, 1e-12, 1)), probabilities, labels),
        "brier": mean_loss_interval(
            (probabilities**2).sum(axis=1, keepdims=True) - 2 * probabilities + 1, probabilities, labels
        ),
        "ece": calibration_error_interval(probabilities, labels),
        "auc": area_interval(probabilities, labels),
    }
    metrics: dict[str, dict[str, Any]] = {
        name: {"value": value, "low": bounds[name][0], "high": bounds[name][1]}
        for name, value in figures(probabilities, labels).items()
    }
    low, high = calibrated_range(probabilities)
    metrics["ece"]["expected"] = {"low": low, "high": high}
    per_class = {}
    for i, label in enumerate(classes):
        hit, predicted, support = int(matrix[i, i]), int(matrix[:, i].sum()), int(matrix[i].sum())
        per_class[label] = {"precision": share(hit, predicted), "recall": share(hit, support), "support": support}
    return {
        "split": "test",
        "images": n,
        "metrics": metrics,
        "per_class": per_class,
        "confusion": {"labels": list(classes), "matrix": matrix.tolist()},
        "reliability": reliability(probabilities, labels),
        "coverage": coverage(probabilities, labels),
    }


def reliability(probabilities: Floats, labels: Ints) -> list[dict[str, Any]]:
    """The bins of the calibration error that hold images: mean confidence, accuracy with its interval, images."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = _bins(confidence)
    found = []
    for one in sorted(set(bins.tolist())):
        chosen = bins == one
        found.append(
            {
                "confidence": float(confidence[chosen].mean()),
                "accuracy": share(int(right[chosen].sum()), int(chosen.sum())),
                "images": int(chosen.sum()),
            }
        )
    return found


def coverage(probabilities: Floats, labels: Ints) -> dict[str, Any]:
    """What is gained by answering the surest pictures only (El-Yaniv and Wiener 2010).

    Returns:
        `steps`: at some coverages, the confidence asked for and the error with its interval; `curve`: (coverage,
        error) at up to 100 places; `area`: mean error over all coverages.
    """
    n = len(labels)
    order = np.argsort(-probabilities.max(axis=1), kind="stable")
    wrong = np.cumsum((probabilities.argmax(axis=1) != labels)[order])
    kept = np.arange(1, n + 1)
    places = np.unique(np.linspace(1, n, min(n, 100)).astype(int))
    steps = []
    for wanted in COVERAGES:
        count = max(1, round(wanted * n))
        steps.append(
            {
                "coverage": count / n,
                "confidence": float(probabilities.max(axis=1)[order[count - 1]]),
                "error": share(int(wrong[count - 1]), count),
                "images": count,
            }
        )
    return {
        "steps": steps,
        "curve": [[int(i) / n, float(wrong[i - 1] / i)] for i in places],
        "area": float((wrong / kept).mean()),
    }


# --- parts of them ------------------------------------------------------------------------------------------


def slices(right: Bools, groups: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Accuracy of parts of the images.

    Args:
        right: (n,) which were answered right.
        groups: name of a division → the part each image belongs to, (n,).

    Returns:
        For each division and part: images, accuracy with its interval, `few` when there are too few to say anything,
        `low` when the part is worse than the rest beyond chance. A one-sided exact test (Fisher) at 5 % divided by
        the number of parts that were looked at (Bonferroni): of twenty parts one looks bad by luck.
    """
    from scipy.stats import hypergeom

    found: list[dict[str, Any]] = []
    for division, parts in groups.items():
        names = np.array(parts)
        begin = len(found)
        for part in sorted(set(parts)):
            chosen = names == part
            n, hits = int(chosen.sum()), int(right[chosen].sum())
            # How likely at most so many right answers are when they fall on this part as on any other.
            p = float(hypergeom.cdf(hits, len(right), int(right.sum()), n))
            found.append(
                {"division": division, "part": part, "images": n, "accuracy": share(hits, n), "few": n < FEW, "p": p}
            )
        found[begin:] = sorted(found[begin:], key=lambda one: one["accuracy"]["value"])
    tried = sum(not one["few"] for one in found) or 1
    for one in found:
        one["low"] = not one["few"] and one.pop("p") < 0.05 / tried
        one.pop("p", None)
    return found


def thirds(values: Floats, names: tuple[str, str, str], form: str) -> list[str]:
    """Each value's third with its bounds; equal values are never parted.

    Args:
        names: of the lowest, the middle and the highest third.
        form: how a bound is written, such as `{:.0f} px`.
    """
    low, high = np.quantile(values, [1 / 3, 2 / 3])
    lower, upper = form.format(low), form.format(high)
    parts = (f"{names[0]} (to {lower})", f"{names[1]} (to {upper})", f"{names[2]} (above {upper})")
    return [parts[0] if value <= low else parts[1] if value <= high else parts[2] for value in values]


def bootstrap_mean(values: Floats, level: float, *, resamples: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of (n,) values with one-sided bounds at `level` each, by the percentile bootstrap, in bounded memory."""
    rng = np.random.default_rng(seed)
    n = len(values)
    step = max(1, 4_000_000 // n)
    means = np.concatenate(
        [
            values[rng.integers(0, n, size=(min(step, resamples - start), n), dtype=np.int32)].mean(axis=1)
            for start in range(0, resamples, step)
        ]
    )
    low, high = np.quantile(means, [level, 1 - level])
    return float(values.mean()), float(low), float(high)
