"""From a snapshot to a training run: candidates, the best of them by validation, and the graph that will be served.

Every training picture is seen as it is and in a fixed number of augmented views. The frozen part of the network runs
once for each view and its results are cached by content, so that training a head takes seconds and fine-tuning runs
the top blocks only. Three candidates:

    color_baseline  colour and texture statistics, no network: shows what the network is worth; never served
    linear_probe    logistic regression on the frozen embedding, its strength chosen by cross-validation
    fine_tuned      starts from the probe and trains the top blocks, batch norm in inference mode

The simplest servable candidate is exported whose validation log loss (at its fitted temperature) is within one
standard error of the smallest (Breiman et al. 1984): what cannot be told apart on so few pictures is decided for the
model that adapted less. It is exported in float32 and in int8; int8 is served where it is not worse than the Keras
model and is faster. Temperature and the threshold of "unknown" rest on pictures that the answering head has not seen:
by cross-validation for the probe, on the validation split for a network that was tuned on the rest. The computation
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
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from lawnwatch import bundle, dataset, images, model, registry, unknown
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings
from lawnwatch.errors import DataError, IntegrityError, NotFound, SettingsError, Unavailable
from lawnwatch.store import ObjectStore

# Changes whenever the code below would train something else from the same input.
RECIPE = "2"
CALIBRATION = "calibration.json"
SPLITS = ("train", "validation")
VIEWS = 4  # augmented views of a training picture, beside the picture itself
VIEW_SIZE = 256  # side from which augmented views are cropped
FINE_TUNE_IMAGES = 2000  # cut activations take 37 kB a view; beyond this, fine-tuning draws from so many pictures
PREPARED_AT_ONCE = 2  # pictures decoded and augmented beside the network, which takes every core it gets
PROBE_C = (0.001, 0.003, 0.01, 0.03, 0.1)
PROBE_IMAGES = 10_000  # a head of 1280 numbers a class learns nothing from more; beyond this, the first by hash
HELD_OUT_IMAGES = 2000  # pictures on which a graph is calibrated and its variants are compared
QUANTIZE_IMAGES = 40  # pictures whose activations set the ranges of int8
INT8_LOSS = 0.005  # of accuracy that int8 may lose against the Keras model
INT8_SPEEDUP = 1.1  # by which it must be faster to be served
TEMPERATURE_SPREAD = 0.5
CANDIDATES = ("color_baseline", "linear_probe", "fine_tuned")  # the servable ones from the simplest on
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
        val_losses: of each validation picture, by hash.
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
    val_losses: list[float] = field(default_factory=list)


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
    _must_be_known(settings.train.candidates)
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
    # Many small systems are solved: threads of linear algebra wait for one another longer than they work.
    with _disk(work), threadpool_limits(1, "blas"):
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


def _must_be_known(wanted: Sequence[str]) -> None:
    if set(wanted) - set(CANDIDATES) or (wanted and not set(wanted) & set(CANDIDATES[1:])):
        raise SettingsError(
            f"the candidates {sorted(wanted)} cannot be trained.",
            hint=f"Name some of {', '.join(CANDIDATES)}, at least one besides {CANDIDATES[0]}; or none, for all.",
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
        rows: the n pictures, by hash: the first few are then a fair draw over classes and sources.
        labels: (n,) int64, index into the snapshot's classes.
        groups: (n,) int64; copies of one picture share a number.
        pooled: (n, 1280) float32 of the pictures as serving sees them; on disk, so that memory does not grow with n.
        views: (m, VIEWS, 1280) float32 of the augmented views of the first m pictures.
        cut: (m, VIEWS + 1, 14, 14, 96) float16 of these pictures and their views; (0, ...) when nothing is fine-tuned.
        color: (n, k) float32.
    """

    rows: list[dataset.Row]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]
    pooled: Floats
    views: Floats
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
    wanted = settings.train.candidates or list(CANDIDATES)
    tune = "fine_tuned" in wanted and settings.train.fine_tune_epochs > 0 and weights.source != "none"
    pictures, basis = None, weights.sha256
    if weights.source == "none":
        pictures, basis = _first_pictures(settings, store, snapshot), f"none, scaled on snapshot {snapshot.id}"
    network = model.load_network(weights, scale_on=pictures)
    original = network.top.get_weights()
    extractor = Extractor(settings, store, network, basis)
    train, val = (extractor.features(snapshot, split, work, cuts=tune, progress=progress) for split in SPLITS)
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
        if name in wanted:  # fine-tuning starts from the probe, wanted or not
            candidates.append(candidate)

    if "color_baseline" in wanted:
        done("color_baseline", lambda: color_baseline(train, val, n))
    done("linear_probe", lambda: linear_probe(train, val, n, settings.train.seed))
    if tune:
        with np.load(work / "linear_probe.npz", allow_pickle=False) as arrays:
            head = arrays["start_kernel"], arrays["start_bias"]
        deadline = begun + settings.train.budget_seconds
        done("fine_tuned", lambda: fine_tuned(settings, network, train, val, head, deadline, progress))

    usable = [c for c in candidates if c.servable and math.isfinite(c.val_log_loss)]
    if not usable:
        raise DataError(
            "no candidate came out usable: " + "; ".join(f"{c.name}: {c.note or 'no finite loss'}" for c in candidates),
            hint="Look at the labels and the pictures, or at the training settings.",
        )
    best = pick(usable)
    place = work / f"{best.name}.npz"
    with np.load(place, allow_pickle=False) as arrays:
        trained = dict(arrays)
    network.top.set_weights([trained[name] for name in sorted(trained) if name.startswith("top_")] or original)
    _export(
        settings, store, snapshot, fingerprint, work, network, trained, (train, val), best, weights, reason, progress
    )
    return candidates, best


def pick(candidates: Sequence[Candidate]) -> Candidate:
    """The simplest candidate whose validation log loss is within one standard error of the smallest, paired.

    Args:
        candidates: usable ones, the simplest first.
    """
    best = min(candidates, key=lambda one: one.val_log_loss)
    for one in candidates:
        n = min(len(one.val_losses), len(best.val_losses))
        behind = np.array(one.val_losses[:n]) - np.array(best.val_losses[:n])
        if n > 1 and behind.mean() <= behind.std(ddof=1) / math.sqrt(n):
            return one
    return best


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
        self, snapshot: dataset.Snapshot, split: str, work: Path, *, cuts: bool, progress: Progress
    ) -> Features:
        """Features of a split; those of every picture are kept in a file below `work`.

        Args:
            cuts: whether the cut activations are wanted too.
        """
        rows = sorted(snapshot.split(split), key=lambda row: str(row.sha256))
        viewed = min(len(rows), FINE_TUNE_IMAGES)
        shape = (len(rows), model.EMBEDDING)
        pooled = np.lib.format.open_memmap(work / f"pooled_{split}.npy", mode="w+", dtype=np.float32, shape=shape)
        views = np.zeros((viewed, VIEWS, model.EMBEDDING), np.float32)
        cut = np.zeros((viewed if cuts else 0, VIEWS + 1, *model.CUT_SHAPE), np.float16)
        color = np.zeros((len(rows), COLOR_FEATURES), np.float32)
        said = time.monotonic()

        def keep(i: int, arrays: dict[str, NDArray[Any]]) -> None:
            nonlocal said
            pooled[i], color[i] = arrays["pooled"][0], arrays["color"]
            if i < viewed:
                views[i] = arrays["pooled"][1:]
            if i < len(cut):
                cut[i] = arrays["cut"]
            if time.monotonic() - said > 10:
                said = time.monotonic()
                progress(f"Features of the {split} split: {i + 1} of {len(rows)} images.")

        self._each(rows[:viewed], snapshot.classes, VIEWS, cuts, keep)
        self._each(rows[viewed:], snapshot.classes, 0, False, lambda i, arrays: keep(viewed + i, arrays))
        labels = np.array([snapshot.classes.index(row.label) for row in rows], dtype=np.int64)
        groups = np.unique([row.group for row in rows], return_inverse=True)[1].astype(np.int64)
        return Features(rows, labels, groups, pooled, views, cut, color)

    def _each(
        self,
        rows: Sequence[dataset.Row],
        classes: list[str],
        views: int,
        cuts: bool,
        keep: Callable[[int, dict[str, NDArray[Any]]], None],
    ) -> None:
        """Call `keep` with the arrays of each picture, from the cache or from the network."""
        missing = []
        for i, row in enumerate(rows):
            known = self._known(self._file(row, cuts, views))
            if known is None:
                missing.append(i)
            else:
                keep(i, known)
        # Pictures are fetched, decoded and augmented in other threads while the network works on those before.
        prepared = dataset.Stream(
            [rows[i] for i in missing],
            self._store,
            self._pictures,
            classes=classes,
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
                if cuts:
                    arrays["cut"] = cut_of
                buffer = io.BytesIO()
                np.savez(buffer, allow_pickle=False, **arrays)
                _write(self._file(rows[i], cuts, views), buffer.getvalue())
                keep(i, arrays)

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
    """The temperature that makes the softmax honest on labelled pictures, 0.25 to 10 (Guo et al. 2017).

    A small split without a single mistake would drive the temperature to zero and every answer to certainty. Two
    things hold against it: the targets are Platt's, (n + 1) / (n + k) instead of 1, and the logarithm of the
    temperature has a normal prior around 0 with a spread of TEMPERATURE_SPREAD, which hundreds of pictures outweigh.
    """
    from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]

    n, k = logits.shape
    right = (n + 1) / (n + k)
    targets = np.full((n, k), (1 - right) / (k - 1))
    targets[np.arange(n), labels] = right

    def loss(log_temperature: float) -> float:
        p = bundle.probabilities(logits, math.exp(log_temperature))
        fit = -(targets * np.log(np.clip(p, 1e-12, 1))).sum()
        return float(fit + 0.5 * (log_temperature / TEMPERATURE_SPREAD) ** 2)

    best = minimize_scalar(loss, bounds=(math.log(0.25), math.log(10)), method="bounded")
    return float(math.exp(best.x))


@dataclass(frozen=True)
class _Judged:
    """Accuracy, log loss at the fitted temperature, that temperature, and each picture's loss."""

    accuracy: float = 0.0
    loss: float = math.inf
    temperature: float = 1.0
    losses: list[float] = field(default_factory=list)


def _judge(logits: NDArray[Any], labels: NDArray[np.int64]) -> _Judged:
    if not np.isfinite(logits).all():
        return _Judged()
    temperature = fit_temperature(logits, labels)
    p = bundle.probabilities(logits, temperature)
    losses = -np.log(np.clip(p[np.arange(len(labels)), labels], 1e-12, 1))
    accuracy = float((logits.argmax(axis=1) == labels).mean())
    return _Judged(accuracy, float(losses.mean()), temperature, [round(float(one), 5) for one in losses])


def _logistic(
    x: NDArray[Any], y: NDArray[np.int64], c: float, n_classes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Class-balanced logistic regression on standardised features, folded into kernel (d, n) and bias (n,)."""
    from sklearn.linear_model import LogisticRegression

    x = x.astype(np.float64)
    mean, spread = x.mean(axis=0), x.std(axis=0) + 1e-3
    fitted = LogisticRegression(C=c, class_weight="balanced", max_iter=1000, tol=1e-3).fit((x - mean) / spread, y)
    coefficients, intercept = fitted.coef_, fitted.intercept_
    if n_classes == 2:  # one row of coefficients: give half of it to each class, so that the map shows both
        coefficients, intercept = np.vstack([-coefficients, coefficients]) / 2, np.hstack([-intercept, intercept]) / 2
    kernel = (coefficients / spread).T
    return kernel, intercept - mean @ kernel


def linear_probe(
    train: Features, val: Features, n_classes: int, seed: int
) -> tuple[Candidate, dict[str, NDArray[Any]]]:
    """Logistic regression on the frozen embedding, fitted on the training and the validation split.

    Its strength and whether it sees the augmented views are chosen by cross-validation, by log loss on pictures as
    serving sees them. The figures are of the validation pictures, each by the head of the fold that left it out.

    Returns:
        The candidate, and: `kernel`, `bias`; `fold_of` (m,), `fold_kernels` (folds, 1280, k) and `fold_biases`
        (folds, k), the heads that did not see picture i; `start_kernel`, `start_bias`, fitted on the training split.
    """
    both = [_probed(train), _probed(val)]
    x = np.concatenate([part.pooled for part in both])
    labels = np.concatenate([part.labels for part in both])
    groups = np.concatenate([both[0].groups, both[1].groups + len(train.rows)])  # no group spans two splits
    n, of_val = len(labels), slice(len(both[0].labels), None)
    seen = [np.arange(len(part.views)) + start for part, start in zip(both, (0, len(both[0].labels)), strict=True)]
    viewed = np.concatenate(seen)
    views = np.concatenate([part.views for part in both])

    def head(rows: NDArray[np.int64], with_views: bool, c: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        chosen, truth = [x[rows]], [labels[rows]]
        if with_views:
            mine = np.isin(viewed, rows)
            chosen.append(views[mine].reshape(-1, model.EMBEDDING))
            truth.append(np.repeat(labels[viewed[mine]], VIEWS))
        return _logistic(np.concatenate(chosen), np.concatenate(truth), c, n_classes)

    parts = unknown.folds(labels, seed, groups)
    fold_of = np.zeros(n, np.int64)
    for k, (_, fold) in enumerate(parts):
        fold_of[fold] = k
    tried: list[tuple[float, bool, float, NDArray[Any], list[tuple[NDArray[Any], NDArray[Any]]]]] = []
    for with_views in (False, True):
        for c in PROBE_C:
            heads = [head(rest, with_views, c) for rest, _ in parts]
            logits = by_fold(x, fold_of, np.stack([k for k, _ in heads]), np.stack([b for _, b in heads]))
            tried.append((_judge(logits, labels).loss, with_views, c, logits, heads))
    loss, with_views, c, logits, heads = min(tried, key=lambda one: one[0])
    whole, judged = _judge(logits, labels), _judge(logits[of_val], labels[of_val])
    candidate = Candidate(
        name="linear_probe",
        servable=True,
        val_accuracy=judged.accuracy,
        val_log_loss=judged.loss,
        temperature=whole.temperature,
        seconds=0.0,
        params={
            "C": c,
            "views": VIEWS if with_views else 0,
            "class_weight": "balanced",
            "folds": len(parts),
            "cv_images": n,
            "cv_accuracy": round(whole.accuracy, 4),
            "cv_log_loss": round(loss, 4),
        },
        curves={"cv_log_loss_by_C": [one[0] for one in tried]},
        val_losses=judged.losses,
    )
    kernel, bias = head(np.arange(n), with_views, c)
    start_kernel, start_bias = head(np.arange(len(both[0].labels)), with_views, c)
    arrays = {
        "kernel": kernel,
        "bias": bias,
        "start_kernel": start_kernel,
        "start_bias": start_bias,
        "fold_kernels": np.stack([k for k, _ in heads]),
        "fold_biases": np.stack([b for _, b in heads]),
    }
    return candidate, {name: array.astype(np.float32) for name, array in arrays.items()} | {"fold_of": fold_of}


def _probed(part: Features) -> Features:
    """The pictures that the probe looks at: all, or the first PROBE_IMAGES."""
    n = min(len(part.rows), PROBE_IMAGES)
    return replace(part, rows=part.rows[:n], labels=part.labels[:n], groups=part.groups[:n], pooled=part.pooled[:n])


def by_fold(
    embeddings: NDArray[Any], fold_of: NDArray[np.int64], kernels: NDArray[Any], biases: NDArray[Any]
) -> NDArray[np.float64]:
    """(n, k) logits of (n, d) embeddings, each by the head of its fold: kernels (folds, d, k), biases (folds, k)."""
    logits = np.zeros((len(embeddings), biases.shape[1]))
    for k in range(len(kernels)):
        logits[fold_of == k] = embeddings[fold_of == k] @ kernels[k] + biases[k]
    return logits


def color_baseline(train: Features, val: Features, n_classes: int) -> tuple[Candidate, dict[str, NDArray[Any]]]:
    """Logistic regression on colour and texture: what can be had without a network."""
    kernel, bias = _logistic(train.color[:PROBE_IMAGES], train.labels[:PROBE_IMAGES], 1.0, n_classes)
    judged = _judge(val.color @ kernel + bias, val.labels)
    candidate = Candidate(
        name="color_baseline",
        servable=False,
        val_accuracy=judged.accuracy,
        val_log_loss=judged.loss,
        temperature=judged.temperature,
        seconds=0.0,
        params={"C": 1.0, "features": COLOR_FEATURES},
        note="a yardstick, never served",
        val_losses=judged.losses,
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
    best = (_Judged(), 0, network.top.get_weights(), kernel.numpy(), bias.numpy())
    curves: dict[str, list[float]] = {"loss": [], "val_accuracy": [], "val_log_loss": []}
    note = ""
    for epoch in range(1, epochs + 1):
        order, losses = rng.permutation(n), []
        for start in range(0, n, size):
            chosen = order[start : start + size]
            views = rng.integers(0, train.cut.shape[1], size=len(chosen))
            losses.append(float(step(train.cut[chosen, views], labels[chosen])))
        judged = _judge(validate(), val.labels[: len(val.cut)])
        if not (math.isfinite(judged.loss) and np.isfinite(losses).all()):
            note = f"the loss was not finite in epoch {epoch}; the weights before it are kept"
            break
        for name, value in (
            ("loss", float(np.mean(losses))),
            ("val_accuracy", judged.accuracy),
            ("val_log_loss", judged.loss),
        ):
            curves[name].append(value)
        progress(
            f"fine_tuned: epoch {epoch} of {epochs}, loss {np.mean(losses):.3f}, validation log loss {judged.loss:.3f}."
        )
        if judged.loss < best[0].loss:
            best = (judged, epoch, network.top.get_weights(), kernel.numpy(), bias.numpy())
        if epoch - best[1] >= PATIENCE:
            note = f"stopped early after epoch {epoch}"
            break
        if time.monotonic() > deadline:
            note = f"stopped by the time budget after epoch {epoch}"
            break
    judged, epoch, top, best_kernel, best_bias = best
    candidate = Candidate(
        name="fine_tuned",
        servable=True,
        val_accuracy=judged.accuracy,
        val_log_loss=judged.loss,
        temperature=judged.temperature,
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
        val_losses=judged.losses,
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
    ranges = _decoded(settings, store, snapshot, features[0].rows[:QUANTIZE_IMAGES])
    graphs = {"float32": model.export_litert(whole), "int8": model.export_litert(whole, ranges=ranges)}
    difference = _compare(whole, graphs["float32"], n, ranges[:8])
    progress(f"Exported {best.name} in float32 and int8 ({time.monotonic() - clock:.0f} s); comparing the two.")

    asked = _Asked(settings, store, snapshot, features, trained)
    served, variants = _choose_variant(asked, whole, graphs, ranges)
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
        self._read = partial(_decoded, settings, store, snapshot)
        self.classes = len(snapshot.classes)
        self._train = train
        if "fold_of" in trained:
            parts = _probed(train), _probed(val)
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
    asked: _Asked, whole: Any, graphs: dict[str, bytes], pictures: NDArray[np.uint8]
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
        passed = change >= -INT8_LOSS and speedup >= INT8_SPEEDUP
        said = (
            f"int8 answers {changed} of {n} held-out images otherwise than Keras; its accuracy is {change:+.1%} "
            f"({-INT8_LOSS:+.1%} is allowed), its speed {speedup:.2f} times float32's ({INT8_SPEEDUP} is asked): it is "
            f"{'served' if passed else 'not served'}."
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
    judged = _judge(logits, asked.labels)
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
        read = settings.train.model_dump(mode="json")
        params: dict[str, Any] = {f"train.{name}": json.dumps(value) for name, value in read.items()}
        params |= {"views": VIEWS, "recipe": RECIPE, "classes": ",".join(snapshot.classes), "best": best.name}
        params |= {f"images.{split}": len(snapshot.split(split)) for split in ("train", "validation", "test")}
        _log_batch(client, run_id, params, {"val_accuracy": [best.val_accuracy], "val_log_loss": [best.val_log_loss]})
        client.log_dict(run_id, [asdict(candidate) for candidate in candidates], "candidates.json")
        client.log_dict(run_id, _environment(), "environment.json")
        for name, figure in _plots(candidates).items():
            client.log_figure(run_id, figure, f"plots/{name}.png")
        client.log_artifacts(run_id, str(work / "model"), "model")
        calibration = json.loads((work / "model" / CALIBRATION).read_text())
        figures = {f"cv_{name}": [calibration[name]] for name in ("accuracy", "log_loss", "ece", "temperature")}
        figures |= {f"unknown_auroc_{one['method']}": [one["auroc"]] for one in calibration["unknown_comparison"]}
        small = json.loads((work / "model" / "model.json").read_text())["variants"]["int8"]
        figures |= {f"int8_{name}": [small[name]] for name in ("accuracy_change", "changed_answers", "speedup")}
        _log_batch(client, run_id, {}, figures)
        client.log_figure(run_id, _unknown_plot(calibration["unknown_comparison"]), "plots/unknown.png")
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


def _unknown_plot(comparison: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    names, y = [one["method"] + (" (kept)" if one["chosen"] else "") for one in comparison], np.arange(len(comparison))
    for shift, kind, color in ((-0.2, "photographs", "#395"), (0.2, "drawings", "#9bc")):
        axes.barh(y + shift, [one[kind] for one in comparison], height=0.38, color=color, label=kind)
    axes.set(xlim=(0.4, 1), xlabel="AUROC against kinds not seen before", title="Telling what is no class")
    axes.set_yticks(y, names)
    axes.legend(loc="lower left")
    return figure


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all: a killed run leaves no half file under a final name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    part.replace(path)
