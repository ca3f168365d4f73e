"""How good answers are: figures with 95 % intervals, and where they are good and where not. Pure functions of arrays.

Wilson's interval for shares (Wilson 1927), the percentile bootstrap over images for everything else (Efron 1979).
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
    return max(0.0, centre - half), min(1.0, centre + half)


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
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    gaps = np.bincount(_bins(confidence), weights=right.astype(float) - confidence, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(labels))


def _bins(confidence: Floats) -> Ints:
    return np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)


def area_under_curve(probabilities: Floats, labels: Ints) -> float | None:
    """Area under the ROC curve; of more than two classes the mean of one against the rest. None with one class only.

    The chance that a picture of the class gets more of its probability than one of another class; ties count half.
    """
    from scipy.stats import rankdata  # type: ignore[import-untyped]

    n, classes = probabilities.shape
    areas = []
    for k in range(1 if classes == 2 else 0, classes):  # of two classes, both have the same area
        mine = labels == k
        count = int(mine.sum())
        if 0 < count < n:
            ranks = rankdata(probabilities[:, k])[mine].sum()
            areas.append((ranks - count * (count + 1) / 2) / (count * (n - count)))
    return float(np.mean(areas)) if areas else None


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


def measure(probabilities: Floats, labels: Ints, classes: Sequence[str]) -> dict[str, Any]:
    """All figures with 95 % intervals, per class too; confusion, reliability and what leaving out the unsure brings.

    Args:
        probabilities: (n, k), calibrated.
        labels: (n,), indices into classes.
    """
    n = len(labels)
    rng = np.random.default_rng(0)
    resamples = [figures(probabilities[i], labels[i]) for i in rng.integers(0, n, size=(RESAMPLES, n))]
    metrics = {}
    for name, value in figures(probabilities, labels).items():
        low, high = np.quantile([one[name] for one in resamples if name in one], [0.025, 0.975])
        if name == "accuracy":
            low, high = wilson(round(value * n), n)
        # A mean of absolute values, such as the calibration error, is larger in every resample: the bootstrap's
        # interval may lie above the value.
        metrics[name] = {"value": value, "low": float(min(low, value)), "high": float(max(high, value))}
    matrix = confusion(probabilities.argmax(axis=1), labels, len(classes))
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
