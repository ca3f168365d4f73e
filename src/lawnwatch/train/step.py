"""The step: is there anything to train, train what is missing, export the best and log it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from lawnwatch import dataset, images, model, registry
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings
from lawnwatch.errors import DataError, SettingsError, Unavailable
from lawnwatch.store import ObjectStore
from lawnwatch.train.candidates import CANDIDATES, Candidate, color_baseline, fine_tuned, linear_probe, pick
from lawnwatch.train.export import export
from lawnwatch.train.features import RECIPE, Extractor, Progress, first_pictures, write_whole
from lawnwatch.train.tracking import record, summary

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Check:
    """Whether there is anything to train on."""

    unchanged: bool
    snapshot: str
    fingerprint: str
    champion_version: int
    message: str


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
    must_be_trainable(snapshot)
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
    run_id = record(settings, experiment, snapshot, found.fingerprint, work, candidates, best, reason, force)
    shutil.rmtree(work, ignore_errors=True)
    seconds = time.monotonic() - begun
    return TrainResult(
        run_id=run_id,
        snapshot=snapshot.id,
        candidates=[summary(candidate) for candidate in candidates],
        best=best.name,
        unchanged=False,
        recorded=False,
        seconds=round(seconds, 1),
        message=f"Trained {len(candidates)} candidates in {seconds:.0f} s; best on validation is {best.name} with "
        f"accuracy {best.val_accuracy:.1%} and log loss {best.val_log_loss:.3f}.",
    )


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
        pictures, basis = first_pictures(settings, store, snapshot), f"none, scaled on snapshot {snapshot.id}"
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
            write_whole(place, json.dumps(asdict(candidate)).encode())
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
    export(
        settings, store, snapshot, fingerprint, work, network, trained, (train, val), best, weights, reason, progress
    )
    return candidates, best


def _must_be_known(wanted: Sequence[str]) -> None:
    if set(wanted) - set(CANDIDATES) or (wanted and not set(wanted) & set(CANDIDATES[1:])):
        raise SettingsError(
            f"the candidates {sorted(wanted)} cannot be trained.",
            hint=f"Name some of {', '.join(CANDIDATES)}, at least one besides {CANDIDATES[0]}; or none, for all.",
        )


def must_be_trainable(snapshot: dataset.Snapshot) -> None:
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
