"""The trained model as graphs, the choice of the one that is served, and its calibration on held-out pictures."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
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
from lawnwatch.train.candidates import HELD_OUT_IMAGES, Candidate, by_fold, held_out, judge
from lawnwatch.train.checkpoint import Arrays
from lawnwatch.train.features import Pictures, Progress, decoded
from lawnwatch.train.materials import Materials

CALIBRATION = "calibration.json"
QUANTIZE_IMAGES = 40  # pictures whose activations set the ranges of int8
SMALL = "small_int8"


def export(
    materials: Materials,
    fingerprint: str,
    home: Path,
    best: Candidate,
    trained: Arrays,
    small: Arrays | None,
    reason: str,
    progress: Progress,
) -> None:
    """Write the folder `home`: the graphs, calibration, the Keras weights and what they are; sealed with hashes.

    Files beside `model.json`: `model.tflite`, the graph that is served; the other variants; `calibration.json`;
    `unknown.npz`; `model.weights.h5`; and in `home.parent/keras` the Keras model as MLflow loads it.

    Args:
        best: the candidate that is exported. trained: its arrays.
        small: the arrays of the head that was distilled from it for smaller pictures; None leaves that variant out.
    """
    if (home / "files.json").exists():
        progress("The exported model is kept from the run that was cut off.")
        return
    clock = time.monotonic()
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    settings, snapshot, n = materials.settings, materials.snapshot, materials.classes
    whole = answering(materials.network, trained, n)
    read = partial(decoded, settings, materials.store, snapshot)
    ranges = read(materials.pictures[0].rows[:QUANTIZE_IMAGES])
    graphs = model.export_litert(whole, ranges)
    difference = _compare(whole, graphs["float32"], n, ranges[:8])
    if small is not None:
        cheaper = answering(materials.small_network, small, n)
        graphs[SMALL] = model.export_litert(cheaper, ranges, ["int8"])["int8"]
    progress(f"Exported {best.name} as {', '.join(graphs)} ({time.monotonic() - clock:.0f} s); comparing them.")

    asked = Asked(read, materials.pictures, trained, n)
    heads = dict.fromkeys(graphs, trained) | ({SMALL: small} if small is not None else {})
    served, variants = _choose_variant(settings.gate, asked, whole, graphs, heads, ranges)
    for variant in variants.values():
        progress(variant.reason)
    for name, variant in variants.items():
        (home / variant.file).write_bytes(graphs[name])
    calibration, detector, comparison = _calibrate(settings, asked, graphs[served], heads[served])
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
        "weights": materials.weights.describe(),
        "git_commit": git_commit(settings),
        "reason": reason,
        "created_at": datetime.now(UTC).isoformat(),
        "inputs": {name: spec.model_dump() for name, spec in model.describe_inputs().items()},
        "outputs": {name: spec.model_dump() for name, spec in model.describe_outputs(graphs[served], n).items()},
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


def answering(network: model.Network, trained: Arrays, n_classes: int) -> Any:
    """The whole Keras model with a candidate's weights."""
    top = [trained[name] for name in sorted(trained) if name.startswith("top_")]
    if top:
        network.top.set_weights(top)
    whole = model.build(network, n_classes)
    model.set_head(whole, trained["kernel"], trained["bias"])
    return whole


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


class Asked:
    """What graphs say of training and validation pictures, by heads that have not seen them.

    For a probe, whose network was trained on none of these pictures, that is a draw of all of them, each by the head of
    the fold that left it out; for a tuned network the validation pictures.

    Args:
        read: pictures as serving sees them.
        pictures: of the training and of the validation split.
        trained: the arrays of the candidate.
        classes: how many there are.

    Attributes:
        labels: (n,). groups: (n,), None when the answers are not cross-validated.
    """

    def __init__(
        self,
        read: Callable[[Sequence[dataset.Row]], NDArray[np.uint8]],
        pictures: tuple[Pictures, Pictures],
        trained: Arrays,
        classes: int,
    ) -> None:
        train, val = pictures
        self._read = read
        self._train = train
        self._trained = trained
        self.classes = classes
        self.groups: NDArray[np.int64] | None = None
        if "fold_of" in trained:
            chosen = held_out(trained, train, val)
            self.rows, self.labels, self.groups = chosen.rows, chosen.labels, chosen.groups
        else:
            self.rows, self.labels = val.rows[:HELD_OUT_IMAGES], val.labels[:HELD_OUT_IMAGES]

    def keras(self, whole: Any) -> NDArray[Any]:
        """(n, k) logits of the Keras model."""
        if self.groups is not None:
            return self._by_fold(self._trained["held_out_pooled"], self._trained)
        return np.concatenate([np.asarray(whole(some, training=False)["logits"]) for some in self._batches(self.rows)])

    def graph(self, data: bytes, heads: Arrays) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """(n, k) logits and (n, d) embeddings of a graph, by the fold heads of its candidate where there are some."""
        logits, embeddings = self._run(data, self.rows)
        return (self._by_fold(embeddings, heads) if self.groups is not None else logits), embeddings

    def trained_on(self, data: bytes) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(m, d) embeddings and (m,) labels of training pictures, for a network that was tuned on them."""
        some = self._train.rows[:HELD_OUT_IMAGES]
        return self._run(data, some)[1], self._train.labels[: len(some)]

    def _by_fold(self, embeddings: NDArray[Any], heads: Arrays) -> NDArray[np.float64]:
        fold_of = self._trained["fold_of"][self._trained["held_out"]]
        return by_fold(embeddings, fold_of, heads["fold_kernels"], heads["fold_biases"])

    def _run(self, data: bytes, rows: Sequence[dataset.Row]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        graph = bundle.Graph(data, classes=self.classes)
        outputs = [graph(picture) for pictures in self._batches(rows) for picture in pictures]
        return np.stack([one.logits for one in outputs]), np.stack([one.embedding for one in outputs])

    def _batches(self, rows: Sequence[dataset.Row]) -> Iterator[NDArray[np.uint8]]:
        for start in range(0, len(rows), 64):
            yield self._read(rows[start : start + 64])


def _choose_variant(
    policy: GateSettings,
    asked: Asked,
    whole: Any,
    graphs: dict[str, bytes],
    heads: dict[str, Arrays],
    pictures: NDArray[np.uint8],
) -> tuple[str, dict[str, bundle.Variant]]:
    """Which graph is served: the fastest of those that pass.

    A graph passes when on the same held-out pictures its accuracy is at most `variant_loss` below the Keras model's,
    its log loss is within one standard error of that model's, and it is faster than float32.
    """
    n = len(asked.labels)
    keras = asked.keras(whole)
    answers, reference = keras.argmax(axis=1), judge(keras, asked.labels)
    spread = float(np.std(reference.losses, ddof=1) / math.sqrt(n)) if n > 1 else math.inf
    speedups = _speedups(graphs, asked.classes, pictures)
    found: dict[str, dict[str, Any]] = {"float32": {"reason": "What the others are compared with."}}
    for name in graphs.keys() - {"float32"}:
        speedup = round(speedups[name], 2)
        try:
            logits = asked.graph(graphs[name], heads[name])[0]
        except IntegrityError as error:
            said = f"{name}: {error.message}"
            found[name] = {"accuracy_change": -1.0, "changed_answers": n, "speedup": speedup, "passed": False}
        else:
            change = float((logits.argmax(axis=1) == asked.labels).mean() - (answers == asked.labels).mean())
            behind = judge(logits, asked.labels).loss - reference.loss
            passed = change >= -policy.variant_loss and behind <= spread and speedup >= policy.variant_speedup
            changed = int((logits.argmax(axis=1) != answers).sum())
            said = (
                f"{name} answers {changed} of {n} held-out images otherwise than Keras; accuracy {change:+.1%} "
                f"({-policy.variant_loss:+.1%} is allowed), log loss {behind:+.3f} ({spread:+.3f} is), speed "
                f"{speedup:.2f} times float32's ({policy.variant_speedup} is asked): it "
                f"{'may' if passed else 'must not'} be served."
            )
            found[name] = {
                "accuracy_change": change, "changed_answers": changed, "speedup": speedup, "passed": passed,
            }  # fmt: skip
        found[name]["reason"] = said
    served = max(("float32", *(name for name in found if found[name].get("passed"))), key=lambda name: speedups[name])
    return served, {
        name: bundle.Variant(
            file=bundle.MODEL if name == served else f"model_{name}.tflite",
            arithmetic="float32" if name == "float32" else "int8",
            images=n,
            **found[name],
        )
        for name in graphs
    }


def _speedups(graphs: dict[str, bytes], n_classes: int, pictures: NDArray[np.uint8]) -> dict[str, float]:
    """How many times as fast as float32 each graph is, one thread: they take turns, so that a busy machine slows all.

    Of each picture the quickest of some turns counts, of the pictures the median.
    """
    runners = {name: bundle.Graph(data, classes=n_classes) for name, data in graphs.items()}
    times = {name: np.full(min(len(pictures), 10), np.inf) for name in graphs}
    for _ in range(6):
        for j in range(min(len(pictures), 10)):
            for name, graph in runners.items():
                begun = time.perf_counter()
                graph(pictures[j])
                times[name][j] = min(times[name][j], time.perf_counter() - begun)
    return {name: float(np.median(times["float32"]) / np.median(each)) for name, each in times.items()}


def _calibrate(
    settings: Settings, asked: Asked, graph: bytes, heads: Arrays
) -> tuple[dict[str, Any], unknown.Fitted, list[dict[str, Any]]]:
    """Temperature and detector of a graph, from its answers to pictures its head has not seen."""
    logits, embeddings = asked.graph(graph, heads)
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
        embeddings,
        logits,
        asked.labels,
        strange,
        strange_logits,
        kinds,
        seed=seed,
        temperature=judged.temperature,
        groups=asked.groups,
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
        images: held-out pictures that the temperature and the threshold of "unknown" rest on.
        unknown: how other things are recognised; statistics: the bytes of `unknown.npz`.
        comparison: each method's figures on this run's pictures.
    """

    temperature: float
    images: int
    unknown: bundle.Unknown
    statistics: bytes
    comparison: list[dict[str, Any]]

    def called_unknown(self, images: int) -> dict[str, float]:
        """Between which shares of so many new pictures of the classes are called unknown, in 95 % of cases."""
        low, high = unknown.called_unknown_range(self.images, self.unknown.accept_rate, images)
        return {"low": low, "high": high}


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
    return Calibration(float(found["temperature"]), int(found["images"]), spec, statistics, found["unknown_comparison"])


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
