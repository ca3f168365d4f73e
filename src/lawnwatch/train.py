"""From a snapshot to a training run: candidates, the best of them by validation, and the graph that will be served.

Every training picture is seen as it is and in a fixed number of augmented views. The frozen part of the network runs
once for each view and its results are cached by content, so that training a head takes seconds and fine-tuning runs
the top blocks only. Three candidates:

    linear_probe    logistic regression on the frozen embedding
    fine_tuned      starts from the probe and trains the top blocks, batch norm in inference mode
    color_baseline  colour and texture statistics, no network: shows what the network is worth; never served

The servable candidate with the smallest validation log loss (at its fitted temperature) is exported. The computation
is local and checkpointed below `home/cache/train/<fingerprint>`; it is logged to MLflow when it is whole, so a run that
was killed, or whose MLflow went away, continues from what was done.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lawnwatch import bundle, dataset, images, model, registry
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings
from lawnwatch.errors import DataError, IntegrityError, NotFound, Unavailable
from lawnwatch.store import ObjectStore

# Changes whenever the code below would train something else from the same input.
RECIPE = "1"
VIEWS = 4  # augmented views of a training picture, beside the picture itself
VIEW_SIZE = 256  # side from which augmented views are cropped
FINE_TUNE_IMAGES = 2000  # cut activations take 37 kB a view; beyond this, fine-tuning draws from so many pictures
PREPARED_AT_ONCE = 2  # pictures decoded and augmented beside the network, which takes every core it gets
PROBE_C = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
LEARNING_RATE = 1e-4
PATIENCE = 3

Progress = Callable[[str], None]
Floats = NDArray[np.float32]


# --- results ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """Whether there is anything to train on."""

    unchanged: bool
    snapshot: str
    fingerprint: str
    champion_version: int
    message: str


@dataclass(frozen=True)
class Candidate:
    """One trained candidate, as measured on the validation split.

    Attributes:
        val_log_loss: at the temperature that was fitted on the same split.
        curves: name → one value an epoch (or a tried C).
        note: why it is out, when it is.
    """

    name: str
    servable: bool
    val_accuracy: float
    val_log_loss: float
    temperature: float
    seconds: float
    params: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class TrainResult:
    """What training came to.

    Attributes:
        run_id: the MLflow run that holds the model; the champion's own when unchanged.
        candidates: every candidate's name and validation figures.
        best: the candidate that was exported.
        unchanged: nothing that training reads has changed since the champion was trained.
        recorded: this very training had been done before, and its run was returned.
    """

    run_id: str
    snapshot: str
    candidates: list[dict[str, Any]]
    best: str
    unchanged: bool
    recorded: bool
    seconds: float
    message: str


# --- the step -----------------------------------------------------------------------------------------------


def check(
    settings: Settings,
    catalog: Catalog,
    store: ObjectStore,
    *,
    snapshot_id: str | None = None,
    force: bool = False,
    reason: str = "",
) -> Check:
    """Whether anything that training reads has changed since the champion was trained. Trains nothing.

    Raises:
        NotFound: no such snapshot. SettingsError: the weights file is missing.
    """
    snapshot = dataset.load_snapshot(catalog, store, snapshot_id or "latest")
    return _check(settings, catalog, snapshot, force=force, reason=reason)


def _check(settings: Settings, catalog: Catalog, snapshot: dataset.Snapshot, *, force: bool, reason: str) -> Check:
    fingerprint = fingerprint_of(settings, snapshot, model.find_weights(settings.weights))
    champion = registry.champion(settings, catalog)
    version = champion.version if champion else 0
    same = champion is not None and champion.fingerprint == fingerprint
    if same and not force:
        message = f"Nothing that training reads has changed; champion is v{version}."
    elif same:
        message = f"Nothing has changed since champion v{version}; training all the same: {reason or 'forced'}."
    elif champion is not None:
        message = f"Snapshot, settings or code differ from those of champion v{version}: there is something to train."
    else:
        message = "There is no champion yet: there is something to train."
    return Check(same and not force, snapshot.id, fingerprint, version, message)


def fingerprint_of(settings: Settings, snapshot: dataset.Snapshot, weights: model.Weights) -> str:
    """Hash of all that training reads: snapshot, settings, starting weights and the code's recipe."""
    read = {
        "recipe": RECIPE,
        "snapshot": snapshot.id,
        "train": settings.train.model_dump(mode="json"),
        "weights": weights.sha256,
        "preprocessing": images.PREPROCESSING,
    }
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def run(
    settings: Settings,
    catalog: Catalog,
    store: ObjectStore,
    *,
    snapshot_id: str | None = None,
    force: bool = False,
    reason: str = "",
    progress: Progress,
) -> TrainResult:
    """Train the candidates on a snapshot, export the best, log it all as one MLflow run with nested runs.

    Args:
        snapshot_id: the newest snapshot when None.
        force: train even when nothing has changed.
        reason: why; recorded with the run.
        progress: called with a line for people at each step.

    Raises:
        NotFound: no such snapshot. SettingsError: the weights file is missing.
        DataError: the snapshot cannot be trained on, or no candidate came out usable.
        Unavailable: MLflow, the store or the weights' download does not answer; what was done is kept.
    """
    begun = time.monotonic()
    snapshot = dataset.load_snapshot(catalog, store, snapshot_id or "latest")
    _must_be_trainable(snapshot)
    found = _check(settings, catalog, snapshot, force=force, reason=reason)
    progress(found.message)
    # MLflow is asked before the work, so that a server that is down is said now and not after it.
    with registry.tracking(settings) as client:
        experiment = registry.experiment_id(settings, client)
        champion = registry.champion(settings, catalog)
        if found.unchanged and champion is not None:
            return _recorded(client.get_run(champion.run_id), snapshot, unchanged=True, message=found.message)
        if not force:
            done = client.search_runs(
                [experiment],
                f"tags.`lawnwatch.fingerprint` = '{found.fingerprint}' and tags.`lawnwatch.complete` = 'true'",
                max_results=1,
            )
            if done:
                message = f"This training was done before, as run {done[0].info.run_id}."
                return _recorded(done[0], snapshot, unchanged=False, message=message)

    work = settings.home / "cache" / "train" / found.fingerprint
    with _disk(work):
        work.mkdir(parents=True, exist_ok=True)
        candidates, best = _compute(settings, store, snapshot, found.fingerprint, work, reason, begun, progress)
    progress("Logging the run to MLflow.")
    run_id = _log(settings, experiment, snapshot, found.fingerprint, work, candidates, best, reason, force)
    shutil.rmtree(work, ignore_errors=True)
    seconds = time.monotonic() - begun
    return TrainResult(
        run_id=run_id,
        snapshot=snapshot.id,
        candidates=[_summary(candidate) for candidate in candidates],
        best=best.name,
        unchanged=False,
        recorded=False,
        seconds=round(seconds, 1),
        message=f"Trained {len(candidates)} candidates in {seconds:.0f} s; best on validation is {best.name} with "
        f"accuracy {best.val_accuracy:.1%} and log loss {best.val_log_loss:.3f}.",
    )


def _must_be_trainable(snapshot: dataset.Snapshot) -> None:
    if len(snapshot.classes) < 2:
        raise DataError(
            f"snapshot {snapshot.id[:12]} has the class(es) {snapshot.classes}; training needs at least two.",
            hint="Add image records of another class, ingest, and create a snapshot.",
        )
    for split in ("train", "validation"):
        missing = set(snapshot.classes) - {row.label for row in snapshot.split(split)}
        if missing:
            raise DataError(
                f"the {split} split of snapshot {snapshot.id[:12]} has no image of {sorted(missing)}.",
                hint="Add more images of these classes, ingest, and create a snapshot.",
            )


def _recorded(run: Any, snapshot: dataset.Snapshot, *, unchanged: bool, message: str) -> TrainResult:
    return TrainResult(
        run_id=run.info.run_id,
        snapshot=snapshot.id,
        candidates=json.loads(run.data.tags.get("lawnwatch.candidates", "[]")),
        best=run.data.tags.get("lawnwatch.candidate", ""),
        unchanged=unchanged,
        recorded=True,
        seconds=0.0,
        message=message,
    )


def _summary(candidate: Candidate) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "servable": candidate.servable,
        "val_accuracy": round(candidate.val_accuracy, 4),
        "val_log_loss": round(candidate.val_log_loss, 4) if math.isfinite(candidate.val_log_loss) else None,
        "seconds": round(candidate.seconds, 1),
        "note": candidate.note,
    }


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """A full or read-only disk is said as such; what was written before stays for the next try."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise Unavailable(
            f"training cannot write below {folder}: {error.strerror}.",
            hint="Free disk space and run the step again: it continues from what was done.",
        ) from error


# --- computing ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """What the frozen network and the baseline say of a split.

    Attributes:
        labels: (n,) int64, index into the snapshot's classes.
        pooled: (n, views, 1280) float32; view 0 is the picture as serving sees it.
        cut: (m, views, 14, 14, 96) float16 of the first m pictures; m is 0 when nothing is fine-tuned.
        color: (n, k) float32.
    """

    labels: NDArray[np.int64]
    pooled: Floats
    cut: NDArray[np.float16]
    color: Floats


def _compute(
    settings: Settings,
    store: ObjectStore,
    snapshot: dataset.Snapshot,
    fingerprint: str,
    work: Path,
    reason: str,
    begun: float,
    progress: Progress,
) -> tuple[list[Candidate], Candidate]:
    """Train what is not yet in `work`, export the best to `work/model`. Repeating it repeats nothing."""
    weights = model.find_weights(settings.weights)
    progress(f"Starting TensorFlow and MobileNetV2 with weights {weights.describe()[:60]}.")
    if weights.source == "none":
        progress("WARNING: LAWNWATCH_WEIGHTS=none: the network starts from random weights; expect poor accuracy.")
    model.keras().utils.set_random_seed(settings.train.seed)
    clock = time.monotonic()
    # Random weights carry too little signal to the top blocks for training them to be worth its time.
    tune = settings.train.fine_tune_epochs > 0 and weights.source != "none"
    pictures, basis = None, weights.sha256
    if weights.source == "none":
        pictures, basis = _first_pictures(settings, store, snapshot), f"none, scaled on snapshot {snapshot.id}"
    network = model.load_network(weights, scale_on=pictures)
    original = network.top.get_weights()
    extractor = Extractor(settings, store, network, basis)
    train = extractor.features(snapshot, "train", views=VIEWS, cuts=FINE_TUNE_IMAGES if tune else 0, progress=progress)
    val = extractor.features(snapshot, "validation", views=0, cuts=10**9 if tune else 0, progress=progress)
    progress(f"Features of {len(train.labels)} + {len(val.labels)} images in {time.monotonic() - clock:.0f} s.")
    if not (np.isfinite(train.pooled).all() and np.isfinite(val.pooled).all()):
        raise DataError(
            "the network's features are not finite numbers: the starting weights are broken.",
            hint="Set LAWNWATCH_WEIGHTS to an intact file.",
        )

    n = len(snapshot.classes)
    candidates: list[Candidate] = []

    def done(name: str, make: Callable[[], tuple[Candidate, dict[str, NDArray[Any]]]]) -> None:
        place = work / f"{name}.json"
        if place.exists():
            candidate = Candidate(**json.loads(place.read_text()))
            progress(f"{name}: kept from the run that was cut off.")
        else:
            clock = time.monotonic()
            candidate, arrays = make()
            candidate = replace(candidate, seconds=time.monotonic() - clock)
            np.savez(work / f"{name}.npz", allow_pickle=False, **arrays)
            _write(place, json.dumps(asdict(candidate)).encode())
        progress(
            f"{name}: validation accuracy {candidate.val_accuracy:.1%}, log loss {candidate.val_log_loss:.3f} "
            f"({candidate.seconds:.0f} s){'; ' + candidate.note if candidate.note else ''}."
        )
        candidates.append(candidate)

    done("color_baseline", lambda: color_baseline(train, val, n))
    done("linear_probe", lambda: linear_probe(train, val, n))
    if tune:
        with np.load(work / "linear_probe.npz", allow_pickle=False) as arrays:
            head = arrays["kernel"], arrays["bias"]
        deadline = begun + settings.train.budget_seconds
        done("fine_tuned", lambda: fine_tuned(settings, network, train, val, head, deadline, progress))

    usable = [c for c in candidates if c.servable and math.isfinite(c.val_log_loss)]
    if not usable:
        raise DataError(
            "no candidate came out usable: " + "; ".join(f"{c.name}: {c.note or 'no finite loss'}" for c in candidates),
            hint="Look at the labels and the pictures, or at the training settings.",
        )
    best = min(usable, key=lambda c: c.val_log_loss)
    _export(settings, store, snapshot, fingerprint, work, network, original, best, weights, reason, progress)
    return candidates, best


def _first_pictures(settings: Settings, store: ObjectStore, snapshot: dataset.Snapshot) -> NDArray[np.uint8]:
    """Up to 64 training pictures, by hash, as (n, 224, 224, 3) uint8."""
    rows = sorted(snapshot.split("train"), key=lambda row: row.sha256)[:64]
    return _decoded(settings, store, snapshot, rows)


def _decoded(
    settings: Settings, store: ObjectStore, snapshot: dataset.Snapshot, rows: Sequence[dataset.Row]
) -> NDArray[np.uint8]:
    """A few pictures as serving sees them, (n, 224, 224, 3) uint8."""
    found = dataset.Stream(
        rows,
        store,
        dataset.ObjectCache.of(settings),
        classes=snapshot.classes,
        batch=len(rows),
        prepare=dataset.decoder(model.SIZE, max_pixels=settings.images.max_pixels),
        shape=(model.SIZE, model.SIZE, 3),
    )
    return np.concatenate([pictures for pictures, _ in found])


class Extractor:
    """Runs the frozen network over pictures and their views, once; results are cached by content."""

    def __init__(self, settings: Settings, store: ObjectStore, network: model.Network, basis: str) -> None:
        tf = model.tensorflow()
        self._settings = settings
        self._store = store
        self._pictures = dataset.ObjectCache.of(settings)
        self._cache = settings.home / "cache" / "features"
        self._kind = f"{RECIPE}|{basis}|{settings.train.seed}|{json.dumps(images.PREPROCESSING, sort_keys=True)}"

        def forward(batch: Any) -> Any:
            cut = network.bottom(batch, training=False)
            return tf.cast(cut, tf.float16), tf.reduce_mean(network.top(cut, training=False), [1, 2])

        signature = [tf.TensorSpec([None, model.SIZE, model.SIZE, 3], tf.uint8)]
        self._forward = tf.function(forward, input_signature=signature)

    def features(
        self, snapshot: dataset.Snapshot, split: str, *, views: int, cuts: int, progress: Progress
    ) -> Features:
        """Features of a split.

        Args:
            views: augmented views of each picture beside the picture itself.
            cuts: of how many pictures the cut activations are kept.
        """
        # By hash: the first few are then a fair draw over classes and sources.
        rows = sorted(snapshot.split(split), key=lambda row: str(row.sha256))
        cuts = min(cuts, len(rows))
        cut = np.zeros((cuts, views + 1, *model.CUT_SHAPE), np.float16)
        pooled = np.zeros((len(rows), views + 1, model.EMBEDDING), np.float32)
        color = np.zeros((len(rows), COLOR_FEATURES), np.float32)
        said = time.monotonic()

        def keep(i: int, arrays: dict[str, NDArray[Any]]) -> None:
            nonlocal said
            pooled[i], color[i] = arrays["pooled"], arrays["color"]
            if i < cuts:
                cut[i] = arrays["cut"]
            if time.monotonic() - said > 10:
                said = time.monotonic()
                progress(f"Features of the {split} split: {i + 1} of {len(rows)} images.")

        missing = []
        for i, row in enumerate(rows):
            known = self._known(self._file(row, i < cuts, views))
            if known is None:
                missing.append(i)
            else:
                keep(i, known)
        # Pictures are fetched, decoded and augmented in other threads while the network works on those before.
        prepared = dataset.Stream(
            [rows[i] for i in missing],
            self._store,
            self._pictures,
            classes=snapshot.classes,
            batch=max(1, 32 // (views + 1)),
            prepare=partial(self._views, views=views),
            shape=(views + 1, model.SIZE, model.SIZE, 3),
            parallel=PREPARED_AT_ONCE,
        )
        waiting = iter(missing)
        for pictures, _ in prepared:
            outputs = (part.numpy() for part in self._forward(pictures.reshape(-1, *pictures.shape[2:])))
            cuts_of, pooled_of = (part.reshape(*pictures.shape[:2], *part.shape[1:]) for part in outputs)
            for seen, cut_of, pool_of in zip(pictures, cuts_of, pooled_of, strict=True):
                i = next(waiting)
                arrays = {"color": color_features(seen[0]), "pooled": pool_of}
                if i < cuts:
                    arrays["cut"] = cut_of
                buffer = io.BytesIO()
                np.savez(buffer, allow_pickle=False, **arrays)
                _write(self._file(rows[i], i < cuts, views), buffer.getvalue())
                keep(i, arrays)
        labels = np.array([snapshot.classes.index(row.label) for row in rows], dtype=np.int64)
        return Features(labels, pooled, cut, color)

    def _file(self, row: dataset.Row, cut: bool, views: int) -> Path:
        name = hashlib.sha256(f"{row.sha256}|{views}|{cut}|{self._kind}".encode()).hexdigest()
        return self._cache / name[:2] / f"{name}.npz"

    @staticmethod
    def _known(file: Path) -> dict[str, NDArray[Any]] | None:
        """Features kept before; None when they are not there or were cut off, and must be made anew."""
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return None

    def _views(self, row: dataset.Row, data: bytes, *, views: int) -> NDArray[np.uint8]:
        """(views + 1, 224, 224, 3) uint8: the picture as serving sees it, and its augmented views."""
        limit = self._settings.images.max_pixels
        pictures = [images.decode(data, size=model.SIZE, max_pixels=limit)]
        if views:
            large = images.decode(data, size=VIEW_SIZE, max_pixels=limit)
            rng = np.random.default_rng([self._settings.train.seed, int(row.sha256[:16], 16)])
            pictures += [augment(large, rng) for _ in range(views)]
        return np.stack(pictures)


def augment(rgb: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """One view of a picture as another phone might have taken it: crop, flip, tilt, light, blur, JPEG.

    Args:
        rgb: (side, side, 3) uint8.

    Returns:
        (224, 224, 3) uint8.
    """
    side, size = len(rgb), model.SIZE
    area, ratio = rng.uniform(0.7, 1.0), math.exp(rng.uniform(-0.12, 0.12))
    width, height = (min(side, int(side * math.sqrt(area * r))) for r in (ratio, 1 / ratio))
    x, y = int(rng.integers(0, side - width + 1)), int(rng.integers(0, side - height + 1))
    view: NDArray[Any] = rgb[y : y + height, x : x + width]
    if rng.random() < 0.5:
        view = view[:, ::-1]
    view = cv2.resize(np.ascontiguousarray(view), (size, size), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.25:
        turn = cv2.getRotationMatrix2D((size / 2, size / 2), rng.uniform(-20, 20), 1.0)
        view = cv2.warpAffine(view, turn, (size, size), borderMode=cv2.BORDER_REFLECT)
    light = view.astype(np.float32) * rng.uniform(0.7, 1.3)
    light = light.mean() + (light - light.mean()) * rng.uniform(0.75, 1.25)  # contrast
    grey = light.mean(axis=2, keepdims=True)
    light = (grey + (light - grey) * rng.uniform(0.7, 1.3)) * rng.uniform(0.93, 1.07, size=3)  # saturation, white
    view = light.clip(0, 255).astype(np.uint8)
    if rng.random() < 0.25:
        view = cv2.GaussianBlur(view, (0, 0), rng.uniform(0.4, 1.4))
    if rng.random() < 0.3:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 80))]
        # Channels go in and come out in the same order, whatever OpenCV calls them.
        return np.asarray(cv2.imdecode(cv2.imencode(".jpg", view, quality)[1], cv2.IMREAD_COLOR), dtype=np.uint8)
    return np.asarray(view, dtype=np.uint8)


COLOR_FEATURES = 8 * 8 + 8 + 6 + 2


def color_features(rgb: NDArray[np.uint8]) -> Floats:
    """(COLOR_FEATURES,) float32: hue-saturation and value histograms, channel means and spreads, two of texture."""
    hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
    hue_saturation = cv2.calcHist([hsv], [0, 1], None, [8, 8], [0, 180, 0, 256]).ravel() / hsv[..., 0].size
    value = cv2.calcHist([hsv], [2], None, [8], [0, 256]).ravel() / hsv[..., 0].size
    channels = rgb.reshape(-1, 3) / 255.0
    texture = [math.log1p(images.sharpness(rgb)) / 10, images.brightness(rgb)]
    return np.concatenate([hue_saturation, value, channels.mean(0), channels.std(0), texture]).astype(np.float32)


# --- the candidates -----------------------------------------------------------------------------------------


def log_loss(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Mean negative log probability of the truth; (n, k) and (n,)."""
    truth = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.clip(truth, 1e-12, 1)).mean())


def fit_temperature(logits: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> float:
    """The temperature that makes the softmax honest on labelled pictures, 0.25 to 10.

    The targets are Platt's, (n + 1) / (n + k) instead of 1: a small split without a single mistake would
    otherwise drive the temperature to zero and every answer to certainty.
    """
    from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]

    n, k = logits.shape
    right = (n + 1) / (n + k)
    targets = np.full((n, k), (1 - right) / (k - 1))
    targets[np.arange(n), labels] = right

    def loss(log_temperature: float) -> float:
        p = bundle.probabilities(logits, math.exp(log_temperature))
        return float(-(targets * np.log(np.clip(p, 1e-12, 1))).sum(axis=1).mean())

    best = minimize_scalar(loss, bounds=(math.log(0.25), math.log(10)), method="bounded")
    return float(math.exp(best.x))


def _judge(logits: NDArray[Any], labels: NDArray[np.int64]) -> tuple[float, float, float]:
    """Validation accuracy, log loss at the fitted temperature, temperature."""
    if not np.isfinite(logits).all():
        return 0.0, math.inf, 1.0
    temperature = fit_temperature(logits, labels)
    accuracy = float((logits.argmax(axis=1) == labels).mean())
    return accuracy, log_loss(bundle.probabilities(logits, temperature), labels), temperature


def _logistic(
    x: NDArray[Any], y: NDArray[np.int64], c: float, n_classes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Class-balanced logistic regression on standardised features, folded into kernel (d, n) and bias (n,)."""
    from sklearn.linear_model import LogisticRegression

    mean, spread = x.mean(axis=0), x.std(axis=0) + 1e-3
    fitted = LogisticRegression(C=c, class_weight="balanced", max_iter=1000).fit((x - mean) / spread, y)
    coefficients, intercept = fitted.coef_, fitted.intercept_
    if n_classes == 2:  # one row of coefficients: give half of it to each class, so that the map shows both
        coefficients, intercept = np.vstack([-coefficients, coefficients]) / 2, np.hstack([-intercept, intercept]) / 2
    kernel = (coefficients / spread).T
    return kernel, intercept - mean @ kernel


def linear_probe(train: Features, val: Features, n_classes: int) -> tuple[Candidate, dict[str, NDArray[Any]]]:
    """Logistic regression on the frozen embedding; strength and use of the augmented views by validation."""
    tried = []
    for views in (1, train.pooled.shape[1]):
        x = train.pooled[:, :views].reshape(-1, model.EMBEDDING).astype(np.float64)
        y = np.repeat(train.labels, views)
        for c in PROBE_C:
            kernel, bias = _logistic(x, y, c, n_classes)
            accuracy, loss, temperature = _judge(val.pooled[:, 0] @ kernel + bias, val.labels)
            tried.append((loss, accuracy, temperature, views, c, kernel, bias))
    loss, accuracy, temperature, views, c, kernel, bias = min(tried, key=lambda one: one[0])
    candidate = Candidate(
        name="linear_probe",
        servable=True,
        val_accuracy=accuracy,
        val_log_loss=loss,
        temperature=temperature,
        seconds=0.0,
        params={"C": c, "views": views, "class_weight": "balanced"},
        curves={"val_log_loss_by_C": [one[0] for one in tried]},
    )
    return candidate, {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}


def color_baseline(train: Features, val: Features, n_classes: int) -> tuple[Candidate, dict[str, NDArray[Any]]]:
    """Logistic regression on colour and texture: what can be had without a network."""
    kernel, bias = _logistic(train.color.astype(np.float64), train.labels, 1.0, n_classes)
    accuracy, loss, temperature = _judge(val.color @ kernel + bias, val.labels)
    candidate = Candidate(
        name="color_baseline",
        servable=False,
        val_accuracy=accuracy,
        val_log_loss=loss,
        temperature=temperature,
        seconds=0.0,
        params={"C": 1.0, "features": COLOR_FEATURES},
        note="a yardstick, never served",
    )
    return candidate, {"kernel": kernel, "bias": bias}


def fine_tuned(
    settings: Settings,
    network: model.Network,
    train: Features,
    val: Features,
    head: tuple[Floats, Floats],
    deadline: float,
    progress: Progress,
) -> tuple[Candidate, dict[str, NDArray[Any]]]:
    """Train the top blocks and the head from the cut activations, starting from the probe's head.

    Adam on a cosine schedule, class weights; each epoch draws one view of every picture. Stops when
    the validation loss has not improved for PATIENCE epochs, or at the deadline (`time.monotonic`).
    """
    tf, k = model.tensorflow(), model.keras()
    n, size = len(train.cut), settings.train.batch_size
    labels = train.labels[:n]
    n_classes = head[0].shape[1]
    weights = (len(labels) / (n_classes * np.maximum(np.bincount(labels, minlength=n_classes), 1))).astype(np.float32)
    kernel, bias = k.Variable(head[0], name="kernel"), k.Variable(head[1], name="bias")
    variables = [*model.unfreeze_top(network), kernel, bias]
    epochs = settings.train.fine_tune_epochs
    steps = epochs * math.ceil(n / size)
    optimizer = k.optimizers.Adam(k.optimizers.schedules.CosineDecay(LEARNING_RATE, steps))
    optimizer.build(variables)

    def logits_of(cut: Any) -> Any:
        features = network.top(tf.cast(cut, tf.float32), training=False)
        return tf.matmul(tf.reduce_mean(features, [1, 2]), kernel.value) + bias.value

    signature = [tf.TensorSpec([None, *model.CUT_SHAPE], tf.float16)]
    predict = tf.function(logits_of, input_signature=signature)

    @tf.function(input_signature=[*signature, tf.TensorSpec([None], tf.int64)])  # type: ignore[untyped-decorator]
    def step(cut: Any, truth: Any) -> Any:
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(truth, logits_of(cut))
            loss = tf.reduce_mean(losses * tf.gather(weights, truth))
        optimizer.apply(tape.gradient(loss, [variable.value for variable in variables]), variables)
        return loss

    def validate() -> NDArray[Any]:
        parts = [predict(val.cut[i : i + 64, 0]).numpy() for i in range(0, len(val.cut), 64)]
        return np.concatenate(parts)

    rng = np.random.default_rng(settings.train.seed)
    # Infinite until an epoch ended well: a candidate that never trained must not pass for a trained one.
    best = (0.0, math.inf, 1.0, 0, network.top.get_weights(), kernel.numpy(), bias.numpy())
    curves: dict[str, list[float]] = {"loss": [], "val_accuracy": [], "val_log_loss": []}
    note = ""
    for epoch in range(1, epochs + 1):
        order, losses = rng.permutation(n), []
        for start in range(0, n, size):
            chosen = order[start : start + size]
            views = rng.integers(0, train.cut.shape[1], size=len(chosen))
            losses.append(float(step(train.cut[chosen, views], labels[chosen])))
        accuracy, loss, temperature = _judge(validate(), val.labels)
        if not (math.isfinite(loss) and np.isfinite(losses).all()):
            note = f"the loss was not finite in epoch {epoch}; the weights before it are kept"
            break
        for name, value in (("loss", float(np.mean(losses))), ("val_accuracy", accuracy), ("val_log_loss", loss)):
            curves[name].append(value)
        progress(f"fine_tuned: epoch {epoch} of {epochs}, loss {np.mean(losses):.3f}, validation log loss {loss:.3f}.")
        if loss < best[1]:
            best = (accuracy, loss, temperature, epoch, network.top.get_weights(), kernel.numpy(), bias.numpy())
        if epoch - best[3] >= PATIENCE:
            note = f"stopped early after epoch {epoch}"
            break
        if time.monotonic() > deadline:
            note = f"stopped by the time budget after epoch {epoch}"
            break
    accuracy, loss, temperature, epoch, top, best_kernel, best_bias = best
    candidate = Candidate(
        name="fine_tuned",
        servable=True,
        val_accuracy=accuracy,
        val_log_loss=loss,
        temperature=temperature,
        seconds=0.0,
        params={
            "best_epoch": epoch,
            "learning_rate": LEARNING_RATE,
            "schedule": "cosine",
            "batch_size": size,
            "images": n,
            "cut": model.CUT_LAYER,
        },
        curves=curves,
        note=note,
    )
    arrays = {f"top_{i:03}": array for i, array in enumerate(top)}
    return candidate, {"kernel": best_kernel, "bias": best_bias, **arrays}


# --- export and log -----------------------------------------------------------------------------------------


def _export(
    settings: Settings,
    store: ObjectStore,
    snapshot: dataset.Snapshot,
    fingerprint: str,
    work: Path,
    network: model.Network,
    original: list[NDArray[Any]],
    best: Candidate,
    weights: model.Weights,
    reason: str,
    progress: Progress,
) -> None:
    """Write `work/model`: the graph, the Keras weights and what they are; sealed with hashes."""
    home = work / "model"
    if (home / "files.json").exists():
        progress("The exported model is kept from the run that was cut off.")
        return
    clock = time.monotonic()
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    with np.load(work / f"{best.name}.npz", allow_pickle=False) as arrays:
        top = [arrays[name] for name in sorted(arrays) if name.startswith("top_")]
        network.top.set_weights(top or original)
        whole = model.build(network, len(snapshot.classes))
        model.set_head(whole, arrays["kernel"], arrays["bias"])
    graph = model.export_litert(whole)
    difference = _compare(settings, store, snapshot, whole, graph)
    (home / bundle.MODEL).write_bytes(graph)
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
        "outputs": {name: spec.model_dump() for name, spec in model.describe_outputs(len(snapshot.classes)).items()},
        "litert_max_difference": difference,
    }
    (home / "model.json").write_text(json.dumps(facts, indent=1, sort_keys=True))
    registry.seal(home)
    progress(
        f"Exported {best.name} as LiteRT ({len(graph) / 1e6:.1f} MB, {time.monotonic() - clock:.0f} s); "
        f"its logits differ from Keras' by {difference:.1e} at most."
    )


def _compare(settings: Settings, store: ObjectStore, snapshot: dataset.Snapshot, whole: Any, graph: bytes) -> float:
    """Largest difference of a probability between the Keras model and the exported graph, on real pictures."""
    run_graph = bundle.Graph(graph, classes=len(snapshot.classes))
    rows = sorted(snapshot.split("validation"), key=lambda row: str(row.sha256))[:8]
    worst = 0.0
    for picture in _decoded(settings, store, snapshot, rows):
        expected = np.asarray(whole(picture[np.newaxis], training=False)["logits"])[0]
        worst = max(worst, float(np.abs(run_graph(picture).logits - expected).max()))
    if not worst < 0.01:
        raise IntegrityError(
            f"the exported graph answers differently from the trained model: logits differ by {worst:.3g}.",
            hint="Nothing was published. Please report this with the versions of tensorflow and ai-edge-litert.",
        )
    return worst


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


def _log(
    settings: Settings,
    experiment: str,
    snapshot: dataset.Snapshot,
    fingerprint: str,
    work: Path,
    candidates: list[Candidate],
    best: Candidate,
    reason: str,
    force: bool,
) -> str:
    """One MLflow run with a nested run a candidate. The tag `lawnwatch.complete` is written last."""
    with registry.tracking(settings) as client:
        half = work / "run_id"
        if half.exists():  # logged in part before MLflow went away
            with suppress(NotFound):
                _discard(client, experiment, half.read_text())
        tags = {
            "lawnwatch.fingerprint": fingerprint,
            "lawnwatch.snapshot": snapshot.id,
            "lawnwatch.candidate": best.name,
            "lawnwatch.candidates": json.dumps([_summary(candidate) for candidate in candidates]),
            "lawnwatch.samples": str(snapshot.samples).lower(),
            "lawnwatch.reason": reason or ("forced" if force else ""),
            "mlflow.source.git.commit": git_commit(settings),
            "mlflow.note.content": _note(snapshot, candidates, best),
        }
        run = client.create_run(experiment, run_name=f"train {snapshot.id[:8]}", tags=tags)
        run_id = str(run.info.run_id)
        half.write_text(run_id)
        _log_inputs(client, run_id, snapshot)
        params = {f"train.{name}": value for name, value in settings.train.model_dump(mode="json").items()}
        params |= {"views": VIEWS, "recipe": RECIPE, "classes": ",".join(snapshot.classes), "best": best.name}
        params |= {f"images.{split}": len(snapshot.split(split)) for split in ("train", "validation", "test")}
        _log_batch(client, run_id, params, {"val_accuracy": [best.val_accuracy], "val_log_loss": [best.val_log_loss]})
        client.log_dict(run_id, [asdict(candidate) for candidate in candidates], "candidates.json")
        client.log_dict(run_id, _environment(), "environment.json")
        for name, figure in _plots(candidates).items():
            client.log_figure(run_id, figure, f"plots/{name}.png")
        client.log_artifacts(run_id, str(work / "model"), "model")
        for candidate in candidates:
            child = client.create_run(experiment, run_name=candidate.name, tags={"mlflow.parentRunId": run_id})
            figures = {"val_accuracy": [candidate.val_accuracy], "val_log_loss": [candidate.val_log_loss]}
            figures |= {"temperature": [candidate.temperature], "seconds": [candidate.seconds]}
            curves = {f"epoch_{name}": values for name, values in candidate.curves.items()}
            _log_batch(client, child.info.run_id, candidate.params, figures | curves)
            client.set_terminated(child.info.run_id)
        client.set_terminated(run_id)
        client.set_tag(run_id, "lawnwatch.complete", "true")
    return run_id


def _discard(client: Any, experiment: str, run_id: str) -> None:
    for child in client.search_runs([experiment], f"tags.mlflow.parentRunId = '{run_id}'"):
        client.delete_run(child.info.run_id)
    client.delete_run(run_id)


def _log_batch(client: Any, run_id: str, params: dict[str, Any], metrics: dict[str, list[float]]) -> None:
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    points = [
        Metric(name, value, now, step)
        for name, values in metrics.items()
        for step, value in enumerate(values, 1)
        if math.isfinite(value)
    ]
    client.log_batch(run_id, metrics=points[:1000], params=[Param(k, str(v)) for k, v in params.items()])


def _log_inputs(client: Any, run_id: str, snapshot: dataset.Snapshot) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    counts = {split: len(snapshot.split(split)) for split in ("train", "validation", "test")}
    data = Dataset(
        name="lawnwatch-snapshot",
        digest=snapshot.id[:36],
        source_type="lawnwatch",
        source=json.dumps({"snapshot": snapshot.id, "manifest": f"snapshots/{snapshot.id}/manifest.parquet"}),
        schema=json.dumps({"image": "JPEG, PNG or WebP", "label": snapshot.classes}),
        profile=json.dumps(counts),
    )
    client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])])


def _note(snapshot: dataset.Snapshot, candidates: list[Candidate], best: Candidate) -> str:
    lines = [
        f"Trained on snapshot `{snapshot.id}`: {len(snapshot.split('train'))} training and "
        f"{len(snapshot.split('validation'))} validation images of {', '.join(snapshot.classes)}.",
        "" if not snapshot.samples else "\n**Trained on drawn sample pictures, not on photographs.**",
        "\n| candidate | validation accuracy | validation log loss | note |\n|---|---|---|---|",
    ]
    for one in candidates:
        mark = "**" if one.name == best.name else ""
        lines.append(f"| {mark}{one.name}{mark} | {one.val_accuracy:.1%} | {one.val_log_loss:.3f} | {one.note} |")
    return "\n".join(lines)


def _environment() -> dict[str, str]:
    names = ("tensorflow", "keras", "scikit-learn", "numpy", "opencv-python-headless", "pillow", "ai-edge-litert")
    return {name: metadata.version(name) for name in names}


def _plots(candidates: list[Candidate]) -> dict[str, Any]:
    from matplotlib.figure import Figure

    comparison = Figure(figsize=(6, 3.5), layout="constrained")
    axes = comparison.subplots()
    axes.barh([c.name for c in candidates], [c.val_accuracy for c in candidates], color="#5a9")
    axes.set(xlim=(0, 1), xlabel="validation accuracy", title="Candidates")
    plots = {"candidates": comparison}
    for candidate in candidates:
        if "val_log_loss" in candidate.curves:
            figure = Figure(figsize=(6, 3.5), layout="constrained")
            axes = figure.subplots()
            for name in ("loss", "val_log_loss"):
                values = candidate.curves[name]
                axes.plot(range(1, len(values) + 1), values, marker="o", label=name)
            axes.set(xlabel="epoch", title=candidate.name)
            axes.legend()
            plots[f"curves_{candidate.name}"] = figure
    return plots


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all: a killed run leaves no half file under a final name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    part.replace(path)
