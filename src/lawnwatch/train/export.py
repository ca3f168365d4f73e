"""The trained model as graphs, the choice of the one that is served, and its calibration on held-out pictures."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lawnwatch import bundle, dataset, images, model, registry, unknown
from lawnwatch.config import GateSettings, Settings
from lawnwatch.errors import IntegrityError
from lawnwatch.store import ObjectStore
from lawnwatch.train.candidates import Candidate, by_fold, judge, probed
from lawnwatch.train.features import Features, Progress, decoded

CALIBRATION = "calibration.json"
HELD_OUT_IMAGES = 2000  # pictures on which a graph is calibrated and its variants are compared
QUANTIZE_IMAGES = 40  # pictures whose activations set the ranges of int8


def export(
    settings: Settings,
    store: ObjectStore,
    snapshot: dataset.Snapshot,
    fingerprint: str,
    work: Path,
    network: model.Network,
    trained: dict[str, NDArray[Any]],
    features: tuple[Features, Features],
    best: Candidate,
    weights: model.Weights,
    reason: str,
    progress: Progress,
) -> None:
    """Write `work/model`: the graphs, calibration, the Keras weights and what they are; sealed with hashes.

    Files beside `model.json`: `model.tflite`, the graph that is served; the other variant; `calibration.json`;
    `unknown.npz`; `model.weights.h5`.
    """
    home = work / "model"
    if (home / "files.json").exists():
        progress("The exported model is kept from the run that was cut off.")
        return
    clock = time.monotonic()
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    n = len(snapshot.classes)
    whole = model.build(network, n)
    model.set_head(whole, trained["kernel"], trained["bias"])
    ranges = decoded(settings, store, snapshot, features[0].rows[:QUANTIZE_IMAGES])
    graphs = {"float32": model.export_litert(whole), "int8": model.export_litert(whole, ranges=ranges)}
    difference = _compare(whole, graphs["float32"], n, ranges[:8])
    progress(f"Exported {best.name} in float32 and int8 ({time.monotonic() - clock:.0f} s); comparing the two.")

    asked = _Asked(settings, store, snapshot, features, trained)
    served, variants = _choose_variant(settings.gate, asked, whole, graphs, ranges)
    progress(variants["int8"].reason)
    for name, variant in variants.items():
        (home / variant.file).write_bytes(graphs[name])
    calibration, detector, comparison = _calibrate(settings, asked, graphs[served])
    progress(
        f"Calibrated on {calibration['images']} held-out images: temperature {calibration['temperature']:.2f}, "
        f"ECE {calibration['ece']:.3f}; unknown from {detector.spec.threshold:.2f} on."
    )
    (home / bundle.UNKNOWN).write_bytes(detector.to_bytes())
    calibration |= {"unknown": detector.spec.model_dump(), "unknown_comparison": comparison}
    (home / CALIBRATION).write_text(json.dumps(calibration, indent=1, sort_keys=True))
    whole.save_weights(home / "model.weights.h5")
    facts = {
        "classes": snapshot.classes,
        "preprocessing": images.PREPROCESSING,
        "candidate": best.name,
        "snapshot": snapshot.id,
        "fingerprint": fingerprint,
        "samples": snapshot.samples,
        "weights": weights.describe(),
        "git_commit": git_commit(settings),
        "reason": reason,
        "created_at": datetime.now(UTC).isoformat(),
        "inputs": {name: spec.model_dump() for name, spec in model.describe_inputs().items()},
        "outputs": {name: spec.model_dump() for name, spec in model.describe_outputs(n).items()},
        "variants": {name: variant.model_dump() for name, variant in variants.items()},
        "served": served,
        "litert_max_difference": difference,
    }
    (home / "model.json").write_text(json.dumps(facts, indent=1, sort_keys=True))
    registry.seal(home)
    progress(
        f"Exported {best.name}: {served} is served ({len(graphs[served]) / 1e6:.1f} MB, "
        f"{time.monotonic() - clock:.0f} s); float32's logits differ from Keras' by {difference:.1e} at most."
    )


def _compare(whole: Any, graph: bytes, n_classes: int, pictures: NDArray[np.uint8]) -> float:
    """Largest difference of a logit between the Keras model and the exported float32 graph, on real pictures."""
    run_graph = bundle.Graph(graph, classes=n_classes)
    worst = 0.0
    for picture in pictures:
        expected = np.asarray(whole(picture[np.newaxis], training=False)["logits"])[0]
        worst = max(worst, float(np.abs(run_graph(picture).logits - expected).max()))
    if not worst < 0.01:
        raise IntegrityError(
            f"the exported graph answers differently from the trained model: logits differ by {worst:.3g}.",
            hint="Nothing was published. Please report this with the versions of tensorflow and ai-edge-litert.",
        )
    return worst


class _Asked:
    """What graphs say of training and validation pictures, by heads that have not seen them.

    For a probe, whose network was trained on none of these pictures, that is every picture, by the head of the fold
    that left it out; for a tuned network the validation pictures.

    Attributes:
        labels: (n,). groups: (n,), None when the answers are not cross-validated. classes: how many there are.
    """

    def __init__(
        self,
        settings: Settings,
        store: ObjectStore,
        snapshot: dataset.Snapshot,
        features: tuple[Features, Features],
        trained: dict[str, NDArray[Any]],
    ) -> None:
        train, val = features
        self._read = partial(decoded, settings, store, snapshot)
        self.classes = len(snapshot.classes)
        self._train = train
        if "fold_of" in trained:
            parts = probed(train), probed(val)
            first = [*parts[0].rows, *parts[1].rows]
            self._chosen = np.sort(np.random.default_rng(settings.train.seed).permutation(len(first))[:HELD_OUT_IMAGES])
            self._rows = [first[i] for i in self._chosen]
            self.labels = np.concatenate([part.labels for part in parts])[self._chosen]
            self.groups: NDArray[np.int64] | None = np.unique([row.group for row in self._rows], return_inverse=True)[1]
            self._heads = trained["fold_of"][self._chosen], trained["fold_kernels"], trained["fold_biases"]
            self._keras = np.concatenate([part.pooled for part in parts])[self._chosen]
        else:
            self._rows, self.labels, self.groups = val.rows[:HELD_OUT_IMAGES], val.labels[:HELD_OUT_IMAGES], None

    def keras(self, whole: Any) -> NDArray[Any]:
        """(n, k) logits of the Keras model."""
        if self.groups is not None:
            return by_fold(self._keras, *self._heads)
        parts = [np.asarray(whole(pictures, training=False)["logits"]) for pictures in self._batches(self._rows)]
        return np.concatenate(parts)

    def graph(self, data: bytes) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """(n, k) logits and (n, d) embeddings of a graph."""
        logits, embeddings = self._run(data, self._rows)
        return (by_fold(embeddings, *self._heads) if self.groups is not None else logits), embeddings

    def trained_on(self, data: bytes) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(m, d) embeddings and (m,) labels of training pictures, for a network that was tuned on them."""
        some = self._train.rows[:HELD_OUT_IMAGES]
        return self._run(data, some)[1], self._train.labels[: len(some)]

    def _run(self, data: bytes, rows: Sequence[dataset.Row]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        graph = bundle.Graph(data, classes=self.classes)
        outputs = [graph(picture) for pictures in self._batches(rows) for picture in pictures]
        return np.stack([one.logits for one in outputs]), np.stack([one.embedding for one in outputs])

    def _batches(self, rows: Sequence[dataset.Row]) -> Iterator[NDArray[np.uint8]]:
        for start in range(0, len(rows), 64):
            yield self._read(rows[start : start + 64])


def _choose_variant(
    policy: GateSettings, asked: _Asked, whole: Any, graphs: dict[str, bytes], pictures: NDArray[np.uint8]
) -> tuple[str, dict[str, bundle.Variant]]:
    """Which graph is served: int8 when it is not worse than the Keras model, paired, and faster than float32."""
    n = len(asked.labels)
    keras = asked.keras(whole).argmax(axis=1)
    speedup = _speedup(graphs["float32"], graphs["int8"], asked.classes, pictures)
    try:
        small = asked.graph(graphs["int8"])[0].argmax(axis=1)
    except IntegrityError as error:
        change, changed, passed, said = -1.0, n, False, error.message
    else:
        change = float((small == asked.labels).mean() - (keras == asked.labels).mean())
        changed = int((small != keras).sum())
        passed = change >= -policy.variant_loss and speedup >= policy.variant_speedup
        said = (
            f"int8 answers {changed} of {n} held-out images otherwise than Keras; its accuracy is {change:+.1%} "
            f"({-policy.variant_loss:+.1%} is allowed), its speed {speedup:.2f} times float32's "
            f"({policy.variant_speedup} is asked): it is {'served' if passed else 'not served'}."
        )
    served = "int8" if passed else "float32"
    files = {name: bundle.MODEL if name == served else f"model_{name}.tflite" for name in graphs}
    return served, {
        "float32": bundle.Variant(
            file=files["float32"], arithmetic="float32", images=n, reason="What the others are compared with."
        ),
        "int8": bundle.Variant(
            file=files["int8"],
            arithmetic="int8",
            images=n,
            accuracy_change=change,
            changed_answers=changed,
            speedup=round(speedup, 2),
            passed=passed,
            reason=said,
        ),
    }


def _speedup(slow: bytes, fast: bytes, n_classes: int, pictures: NDArray[np.uint8]) -> float:
    """How many times as fast one graph is as another, one thread: they take turns, so that a busy machine slows both.

    Of each picture the quickest of some turns counts, of the pictures the median.
    """
    graphs = [bundle.Graph(data, classes=n_classes) for data in (slow, fast)]
    times = np.full((2, min(len(pictures), 10)), np.inf)
    for _ in range(6):
        for j in range(times.shape[1]):
            for i, graph in enumerate(graphs):
                begun = time.perf_counter()
                graph(pictures[j])
                times[i, j] = min(times[i, j], time.perf_counter() - begun)
    return float(np.median(times[0]) / np.median(times[1]))


def _calibrate(
    settings: Settings, asked: _Asked, graph: bytes
) -> tuple[dict[str, Any], unknown.Fitted, list[dict[str, Any]]]:
    """Temperature and detector of a graph, from its answers to pictures its head has not seen."""
    logits, embeddings = asked.graph(graph)
    judged = judge(logits, asked.labels)
    p = bundle.probabilities(logits, judged.temperature)
    kinds, pictures = unknown.strangers(model.SIZE)
    run_graph = bundle.Graph(graph, classes=p.shape[1])
    others = [run_graph(picture) for picture in pictures]
    strange, strange_logits = np.stack([o.embedding for o in others]), np.stack([o.logits for o in others])
    seed = settings.train.seed
    if asked.groups is not None:
        detector = unknown.fit(embeddings, asked.labels, strange, seed=seed, groups=asked.groups)
    else:
        known, labels = asked.trained_on(graph)
        detector = unknown.fit(known, labels, strange, seed=seed, held_out=embeddings)
    comparison = unknown.compare(
        embeddings, logits, asked.labels, strange, strange_logits, kinds, seed=seed, temperature=judged.temperature
    )
    confidence, right = p.max(axis=1), p.argmax(axis=1) == asked.labels
    bins = np.minimum((confidence * 10).astype(int), 9)
    gaps = np.bincount(bins, weights=right.astype(float) - confidence, minlength=10)
    return (
        {
            "temperature": judged.temperature,
            "method": "cross-validated heads" if asked.groups is not None else "validation split",
            "images": len(asked.labels),
            "accuracy": judged.accuracy,
            "log_loss": judged.loss,
            "ece": float(np.abs(gaps).sum() / len(p)),
        },
        detector,
        comparison,
    )


@dataclass(frozen=True)
class Calibration:
    """What training fitted on held-out pictures for the graph that is served.

    Attributes:
        unknown: how other things are recognised; statistics: the bytes of `unknown.npz`.
        comparison: each method's figures on this run's pictures.
    """

    temperature: float
    unknown: bundle.Unknown
    statistics: bytes
    comparison: list[dict[str, Any]]


def load_calibration(home: Path) -> Calibration:
    """Read it from a run's `model` artifacts. Raises IntegrityError when they are of a release that had none."""
    try:
        found = json.loads((home / CALIBRATION).read_text())
        statistics = (home / bundle.UNKNOWN).read_bytes()
        spec = bundle.Unknown.model_validate(found["unknown"])
    except (OSError, ValueError, KeyError) as error:
        raise IntegrityError(
            f"the run's model has no calibration that this release can read: {error}",
            hint="Train again with this release of lawnwatch.",
        ) from error
    return Calibration(float(found["temperature"]), spec, statistics, found["unknown_comparison"])


def git_commit(settings: Settings) -> str:
    """The commit of this code, `-dirty` when changed; the setting where there is no repository, else `unknown`."""
    if settings.git_commit:
        return settings.git_commit
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        state = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "."],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if commit.returncode != 0:
        return "unknown"
    return commit.stdout.strip() + ("-dirty" if state.stdout.strip() else "")
