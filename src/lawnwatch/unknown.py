"""Learning what is none of the classes: made pictures of other things, the detector's statistics, and its threshold.

The method is a Gaussian model of the classes plus a background head (see `bundle.UnknownDetector`). The Gaussian, which
knows the classes only, tells photographs of other things; it is weak on noise and drawings, whose embeddings are dull
rather than far. The head was shown just those. Chosen by cross-validation on 400 photographs of dandelions and grass,
against photographs and kinds of drawings that the head had not seen; every training run repeats the comparison on its
own pictures (`compare`) and records it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from lawnwatch import bundle
from lawnwatch.bundle import Unknown, UnknownDetector
from lawnwatch.errors import DataError

METHOD: Literal["mahalanobis_background"] = "mahalanobis_background"
ACCEPT_RATE = 0.97  # share of held-out pictures of the classes that the threshold lets pass
FOLDS = 5
MADE_PER_KIND = 12
CROPS = 30  # of each sample photograph
AXES = 128  # of the shared covariance; more of them move no score
SHRINKAGE = 0.6
NEIGHBOUR = 5
BACKGROUND_C = 0.01

Rgb = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]


# --- pictures of other things -------------------------------------------------------------------------------


def strangers(size: int, seed: int = 0) -> tuple[list[str], list[Rgb]]:
    """Pictures that belong to no class: drawn ones of ten kinds, and crops of scikit-learn's two sample photographs.

    Returns:
        The kind of each, and each as (size, size, 3) uint8 RGB; the same for the same seed.
    """
    rng = np.random.default_rng(seed)
    kinds, pictures = [], []
    for kind, draw in KINDS.items():
        for _ in range(MADE_PER_KIND):
            kinds.append(kind)
            pictures.append(draw(rng, size))
    for name, photograph in _sample_photographs().items():
        height, width = photograph.shape[:2]
        for _ in range(CROPS):
            share = rng.uniform(0.25, 1)
            h, w = int(height * share), int(width * share)
            y, x = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            crop = cv2.resize(photograph[y : y + h, x : x + w], (size, size), interpolation=cv2.INTER_AREA)
            light = crop.astype(np.float32) * rng.uniform(0.7, 1.3) * rng.uniform(0.9, 1.1, 3)
            kinds.append(f"photograph: {name}")
            pictures.append(_pixels(light if rng.random() < 0.5 else light[:, ::-1]))
    return kinds, pictures


@cache
def _sample_photographs() -> dict[str, Rgb]:
    from sklearn.datasets import load_sample_image

    return {name: np.asarray(load_sample_image(f"{name}.jpg"), np.uint8) for name in ("china", "flower")}


def _pixels(values: NDArray[Any]) -> Rgb:
    return np.ascontiguousarray(values.clip(0, 255).astype(np.uint8))


def _color(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
    return red, green, blue


def _between(rng: np.random.Generator, share: NDArray[Any]) -> Rgb:
    """(size, size) shares of two colours."""
    first, second = (np.array(_color(rng), float) for _ in range(2))
    return _pixels(first + (second - first) * share[..., np.newaxis])


def _point(rng: np.random.Generator, size: int) -> tuple[int, int]:
    return int(rng.integers(0, size)), int(rng.integers(0, size))


def _noise(rng: np.random.Generator, size: int) -> Rgb:
    side = int(rng.choice([size, size, int(rng.integers(4, 60))]))
    if rng.random() < 0.4:
        flat = rng.uniform(30, 220, 3) + rng.standard_normal((side, side, 3)) * rng.uniform(5, 60)
    else:
        flat = rng.integers(0, 256, (side, side, int(rng.choice([1, 3])))) * np.ones(3)
    way = int(rng.choice([cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_CUBIC]))
    return _pixels(cv2.resize(flat, (size, size), interpolation=way))


def _clouds(rng: np.random.Generator, size: int) -> Rgb:
    """Noise whose power falls with frequency, as in clouds, stone and bark."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    frequency[0, 0] = 1
    falling = frequency ** -rng.uniform(0.5, 2.2)
    common, mix = rng.standard_normal((size, size)), rng.uniform()
    layers = []
    for _ in range(3):
        white = mix * common + (1 - mix) * rng.standard_normal((size, size))
        layer = np.fft.ifft2(np.fft.fft2(white) * falling).real
        layers.append((layer - layer.mean()) / (layer.std() + 1e-9))
    return _pixels(rng.uniform(60, 200, 3) + np.stack(layers, 2) * rng.uniform(15, 60))


def _plain(rng: np.random.Generator, size: int) -> Rgb:
    return np.full((size, size, 3), _color(rng), np.uint8)


def _gradient(rng: np.random.Generator, size: int) -> Rgb:
    y, x = np.mgrid[0:size, 0:size] / size
    turn = rng.uniform(0, 2 * math.pi)
    ramp = np.cos(turn) * x + np.sin(turn) * y if rng.random() < 0.6 else np.hypot(x - rng.random(), y - rng.random())
    return _between(rng, (ramp - ramp.min()) / np.ptp(ramp))


def _shapes(rng: np.random.Generator, size: int) -> Rgb:
    picture = _plain(rng, size)
    for _ in range(int(rng.integers(3, 60))):
        kind, filled = rng.integers(4), -1 if rng.random() < 0.7 else 3
        if kind == 0:
            cv2.circle(picture, _point(rng, size), int(rng.integers(4, 70)), _color(rng), filled, cv2.LINE_AA)
        elif kind == 1:
            cv2.rectangle(picture, _point(rng, size), _point(rng, size), _color(rng), filled)
        elif kind == 2:
            cv2.fillPoly(picture, [rng.integers(0, size, (4, 2)).astype(np.int32)], _color(rng), cv2.LINE_AA)
        else:
            width = int(rng.integers(1, 8))
            cv2.line(picture, _point(rng, size), _point(rng, size), _color(rng), width, cv2.LINE_AA)
    return _soft(rng, picture)


def _soft(rng: np.random.Generator, picture: Rgb) -> Rgb:
    return _pixels(cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.6, 5))) if rng.random() < 0.5 else picture


def _text(rng: np.random.Generator, size: int) -> Rgb:
    dark = rng.random() < 0.3
    picture = np.full((size, size, 3), rng.integers(0, 60) if dark else rng.integers(200, 256), np.uint8)
    ink, scale = (230, 230, 230) if dark else (20, 20, 20), rng.uniform(0.3, 1.2)
    for y in range(12, size, int(14 + 20 * scale)):
        line = "".join(chr(int(letter)) for letter in rng.integers(97, 123, 40))
        at = (int(rng.integers(0, 12)), y)
        cv2.putText(picture, line, at, int(rng.integers(0, 4)), scale, ink, 1 + int(scale > 0.8), cv2.LINE_AA)
    return picture


def _stripes(rng: np.random.Generator, size: int) -> Rgb:
    y, x = np.mgrid[0:size, 0:size]
    turn, frequency = rng.uniform(0, math.pi), rng.uniform(0.02, 0.6)
    wave = np.sin((np.cos(turn) * x + np.sin(turn) * y) * frequency)
    if rng.random() < 0.5:
        wave = np.sign(wave)
    if rng.random() < 0.3:
        wave = wave * np.sign(np.sin((np.sin(turn) * x - np.cos(turn) * y) * frequency))
    return _between(rng, (wave + 1) / 2)


def _cells(rng: np.random.Generator, size: int) -> Rgb:
    n = int(rng.integers(5, 80))
    centres = rng.uniform(0, size, (n, 2))
    y, x = np.mgrid[0:size, 0:size]
    nearest = ((x[..., np.newaxis] - centres[:, 0]) ** 2 + (y[..., np.newaxis] - centres[:, 1]) ** 2).argmin(axis=2)
    return _soft(rng, rng.integers(0, 256, (n, 3), dtype=np.uint8)[nearest])


def _chart(rng: np.random.Generator, size: int) -> Rgb:
    picture = np.full((size, size, 3), 255 if rng.random() < 0.7 else 25, np.uint8)
    for y in range(20, size, 34):
        cv2.line(picture, (20, y), (size - 10, y), (90, 90, 90), 1)
    for _ in range(int(rng.integers(1, 4))):
        color = _color(rng)
        if rng.random() < 0.5:
            heights = np.cumsum(rng.standard_normal(40)) * 12 + size / 2
            line = np.stack([np.linspace(20, size - 10, 40), heights], 1).astype(np.int32)
            cv2.polylines(picture, [line], False, color, 2, cv2.LINE_AA)
        else:
            for x in range(24, size - 20, 22):
                cv2.rectangle(picture, (x, size - 20), (x + 14, int(rng.integers(20, size - 20))), color, -1)
    return picture


def _stars(rng: np.random.Generator, size: int) -> Rgb:
    picture = np.zeros((size, size, 3), np.uint8)
    for _ in range(int(rng.integers(20, 400))):
        cv2.circle(picture, _point(rng, size), int(rng.choice([0, 0, 0, 1, 1, 2, 4])), _color(rng), -1, cv2.LINE_AA)
    return _pixels(cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.4, 1.5)))


KINDS: dict[str, Callable[[np.random.Generator, int], Rgb]] = {
    "noise": _noise,
    "clouds": _clouds,
    "plain": _plain,
    "gradient": _gradient,
    "shapes": _shapes,
    "text": _text,
    "stripes": _stripes,
    "cells": _cells,
    "chart": _chart,
    "stars": _stars,
}


# --- fitting ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """A detector, and what is written into the bundle for it.

    Attributes:
        spec: method, threshold and the rate it was chosen for.
        statistics: what `unknown.npz` holds.
    """

    spec: Unknown
    statistics: dict[str, NDArray[Any]]

    def to_bytes(self) -> bytes:
        """`unknown.npz`, without pickles."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **self.statistics)
        return buffer.getvalue()


def unit(embeddings: Floats) -> NDArray[np.float64]:
    """Scaled to unit length, row by row."""
    wide = embeddings.astype(np.float64)
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12))


def statistics(method: str, known: Floats, labels: NDArray[np.int64], others: Floats) -> dict[str, NDArray[Any]]:
    """The arrays that a method needs (`bundle.STATISTICS`), without `centre` and `scale`.

    Args:
        known: (n, d) embeddings of the classes' training pictures; labels (n,).
        others: (m, d) embeddings of pictures of other things.
    """
    wanted, x = bundle.STATISTICS.get(method, {}), unit(known)
    found: dict[str, NDArray[Any]] = {}
    if "bank" in wanted:
        found["bank"] = x.astype(np.float16)  # half the file; the score moves by less than 0.001
    if "means" in wanted:
        means = np.stack([x[labels == label].mean(axis=0) for label in np.unique(labels)])
        away = x - means[np.searchsorted(np.unique(labels), labels)]
        _, spread, axes = np.linalg.svd(away, full_matrices=False)
        variances, mean = spread**2 / len(x), max(float((spread**2).sum()) / away.size, 1e-12)
        kept = min(AXES, len(axes))
        found |= {
            "means": means.astype(np.float32),
            "axes": axes[:kept].astype(np.float16),
            "variances": ((1 - SHRINKAGE) * variances[:kept] + SHRINKAGE * mean).astype(np.float32),
            "rest": np.array(SHRINKAGE * mean, np.float32),
        }
    if "weight" in wanted:
        from sklearn.linear_model import LogisticRegression

        both = np.concatenate([x, unit(others)])
        mean_of, spread_of = both.mean(axis=0), both.std(axis=0) + 0.1 * both.std()
        is_other = np.repeat([0, 1], [len(x), len(others)])
        head = LogisticRegression(C=BACKGROUND_C, class_weight="balanced", max_iter=200)
        head.fit((both - mean_of) / spread_of, is_other)
        weight = head.coef_[0] / spread_of
        found |= {
            "weight": weight.astype(np.float32),
            "bias": np.array(head.intercept_[0] - mean_of @ weight, np.float32),
        }
    return found


def folds(
    labels: NDArray[np.int64], seed: int, groups: NDArray[np.int64] | None = None
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(rest, fold) indices of FOLDS stratified folds; fewer where a class has fewer pictures.

    Args:
        groups: (n,) copies of one picture share a number and a fold.

    Raises:
        DataError: a class has too few different pictures to be left out and kept at once.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    group = np.arange(len(labels)) if groups is None else groups
    n = min(FOLDS, *(len(np.unique(group[labels == label])) for label in np.unique(labels)))
    parts = []
    if n >= 2:
        parts = list(StratifiedGroupKFold(n, shuffle=True, random_state=seed).split(labels, labels, group))
    whole = len(np.unique(labels))
    if not parts or any(len(np.unique(labels[rest])) < whole or not len(fold) for rest, fold in parts):
        raise DataError(
            "a class has too few different pictures for cross-validation.",
            hint="Add pictures of the smallest class, ingest, and create a snapshot.",
        )
    return parts


def fit(
    known: Floats,
    labels: NDArray[np.int64],
    others: Floats,
    *,
    seed: int,
    groups: NDArray[np.int64] | None = None,
    held_out: Floats | None = None,
    accept_rate: float = ACCEPT_RATE,
) -> Fitted:
    """Fit the detector, and the threshold that lets the stated share of pictures of the classes pass.

    The threshold is a score by rank among those of n pictures that did not fit it, so that a new picture passes at the
    stated rate whatever the scores' distribution is (split conformal prediction, Vovk et al. 2005; pooled over folds,
    where this is nearly so: Vovk 2015, Barber et al. 2021). Too few pictures cannot promise it: then the largest score
    is the threshold, and the rate that it can promise, n / (n + 1), is recorded.

    Args:
        known: (n, d) embeddings of training pictures; labels (n,).
        others: (m, d) embeddings of pictures of other things.
        held_out: (h, d) embeddings of pictures on which neither the network nor the detector was trained. None: the
            network was not trained on `known` either; the detector's own scores of them are then had by
            cross-validation.
    """
    if held_out is None:
        parts = [
            _two_scores(statistics(METHOD, known[rest], labels[rest], others), known[fold])
            for rest, fold in folds(labels, seed, groups)
        ]
        two = np.concatenate(parts)
    else:
        two = _two_scores(statistics(METHOD, known, labels, others), held_out)
    centre = np.median(two, axis=0)
    scale = np.maximum(two.std(axis=0), 1e-6)
    scores = ((two - centre) / scale).sum(axis=1)
    n = len(scores)
    # The next number above, because the threshold itself already means unknown.
    threshold = float(np.nextafter(np.sort(scores)[rank(n, accept_rate) - 1], np.inf))
    whole = statistics(METHOD, known, labels, others)
    whole |= {"centre": centre.astype(np.float32), "scale": scale.astype(np.float32)}
    spec = Unknown(method=METHOD, threshold=threshold, accept_rate=min(accept_rate, n / (n + 1)), k=1)
    return Fitted(spec, whole)


def rank(n: int, accept_rate: float) -> int:
    """Which of n held-out scores, from the smallest, is the last that passes; the last of all when n is too small."""
    return min(n, math.ceil(round((n + 1) * accept_rate, 6)))  # rounded: 100 * 0.97 must not be above 97


def called_unknown_range(n: int, accept_rate: float, images: int) -> tuple[float, float]:
    """Which share of new pictures of the classes is called unknown in 95 % of cases.

    Both the n pictures that the threshold rests on and those that are counted are a draw: beta-binomial (Marques 2023).
    """
    from scipy.stats import betabinom  # type: ignore[import-untyped]

    passing = rank(n, accept_rate)
    low, high = betabinom.ppf([0.025, 0.975], images, n + 1 - passing, passing)
    return float(low / images), float(high / images)


def _two_scores(found: dict[str, NDArray[Any]], embeddings: Floats) -> NDArray[np.float64]:
    """(n, 2): the Gaussian's and the head's scores, not yet on one scale."""
    logits = np.zeros((len(embeddings), 1))
    both = [
        UnknownDetector(spec, 1.0, found).scores(logits, embeddings)
        for spec in (
            Unknown(method="mahalanobis", threshold=0, accept_rate=1, k=1),
            Unknown(method="background", threshold=0, accept_rate=1, k=1),
        )
    ]
    return np.stack(both, axis=1).astype(np.float64)


# --- the comparison -----------------------------------------------------------------------------------------


def compare(
    known: Floats,
    known_logits: Floats,
    labels: NDArray[np.int64],
    others: Floats,
    other_logits: Floats,
    kinds: Sequence[str],
    *,
    seed: int,
    temperature: float,
    groups: NDArray[np.int64] | None = None,
) -> list[dict[str, Any]]:
    """How well each method tells the classes from kinds of pictures that it has not seen.

    Pictures of the classes are scored out of fold; a kind of other pictures is scored by statistics that were fitted
    without that kind. For a linear probe of two classes max_softmax and energy are one score: its logits are ± z / 2,
    and both put pictures in the order of - |z|.

    Args:
        known_logits: (n, k), by heads that were not fitted on the picture.
        kinds: (m,) the kind of each of the other pictures.
        groups: (n,) copies of one picture share a number and a fold.

    Returns:
        For each method its name, `auroc` over all kinds, over `photographs` and over `drawings`, and `rejected`: the
        share of other pictures above the threshold that lets ACCEPT_RATE of the classes' pictures pass.
    """
    kind_of = np.array(kinds)
    photograph = np.char.startswith(kind_of, "photograph")
    found: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    for method in ("max_softmax", "energy", "knn", "mahalanobis", "background"):
        spec = Unknown.model_validate({"method": method, "threshold": 0, "accept_rate": ACCEPT_RATE, "k": NEIGHBOUR})
        inside, outside = np.zeros(len(known)), np.zeros(len(others))
        for rest, fold in folds(labels, seed, groups):
            detector = UnknownDetector(spec, temperature, statistics(method, known[rest], labels[rest], others))
            inside[fold] = detector.scores(known_logits[fold], known[fold])
        # Only the head is shown pictures of other things; the rest of the methods need no leaving out.
        for kind in np.unique(kind_of) if method == "background" else [None]:
            mine = np.ones(len(others), bool) if kind is None else kind_of == kind
            shown = others if kind is None else others[~mine]
            detector = UnknownDetector(spec, temperature, statistics(method, known, labels, shown))
            outside[mine] = detector.scores(other_logits[mine], others[mine])
        found[method] = inside, outside
    both = [found["mahalanobis"], found["background"]]
    found[METHOD] = (
        sum((one[0] - np.median(one[0])) / max(one[0].std(), 1e-6) for one in both),
        sum((one[1] - np.median(one[0])) / max(one[0].std(), 1e-6) for one in both),
    )
    return [
        {
            "method": method,
            "auroc": _auroc(inside, outside),
            "photographs": _auroc(inside, outside[photograph]),
            "drawings": _auroc(inside, outside[~photograph]),
            "rejected": round(float((outside > np.sort(inside)[rank(len(inside), ACCEPT_RATE) - 1]).mean()), 4),
            "chosen": method == METHOD,
        }
        for method, (inside, outside) in found.items()
    ]


def _auroc(inside: NDArray[np.float64], outside: NDArray[np.float64]) -> float:
    """How often a picture of something else has the higher score."""
    from sklearn.metrics import roc_auc_score

    truth = np.repeat([0, 1], [len(inside), len(outside)])
    return round(float(roc_auc_score(truth, np.concatenate([inside, outside]))), 4)
