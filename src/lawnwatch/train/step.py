"""The step: is there anything to train, train what is missing, export the best and log it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from lawnwatch import bundle, dataset, images, model, registry
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings
from lawnwatch.errors import DataError, SettingsError, Unavailable
from lawnwatch.store import ObjectStore
from lawnwatch.train.candidates import (
    CANDIDATES,
    FINE_TUNING,
    HELD_OUT_IMAGES,
    TEACHERS,
    Candidate,
    FineTuning,
    Lesson,
    color_baseline,
    fine_tuned,
    held_out,
    linear_probe,
    pick,
    small_input,
)
from lawnwatch.train.checkpoint import Arrays, Checkpoint
from lawnwatch.train.export import answering, export
from lawnwatch.train.features import PROBE_IMAGES, RECIPE, Progress, decoded
from lawnwatch.train.materials import Materials
from lawnwatch.train.sweep import Trials, probe_sweep, tuning_sweep
from lawnwatch.train.tracking import record, summary


@dataclass(frozen=True)
class Check:
    """Whether there is anything to train on.

    Attributes:
        unchanged: nothing that training reads has changed since the champion was trained, or since a model was that was
            rolled back.
        candidates: those that can be trained side by side, each as a step of its own; none when unchanged, or when
            this training was done before and waits for its verdict.
    """

    unchanged: bool
    snapshot: str
    fingerprint: str
    champion_version: int
    candidates: list[str]
    message: str


@dataclass(frozen=True)
class CandidateResult:
    """What training one candidate came to.

    Attributes:
        kept: it had been trained before, and nothing was done.
    """

    name: str
    snapshot: str
    fingerprint: str
    val_accuracy: float
    val_log_loss: float | None
    seconds: float
    kept: bool
    note: str
    message: str


@dataclass(frozen=True)
class TrainResult:
    """What training came to.

    Attributes:
        run_id: the MLflow run that holds the model; the champion's own when unchanged.
        candidates: every candidate's name and validation figures.
        best: the candidate that was exported.
        unchanged: as in Check.
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
    """Whether anything that training reads has changed since the champion was trained, or since a model was that was
    rolled back. Trains nothing.

    Raises:
        NotFound: no such snapshot. SettingsError: the weights file is missing. Unavailable: MLflow does not answer.
    """
    snapshot = dataset.load_snapshot(catalog, store, snapshot_id or "latest")
    found = _check(settings, catalog, snapshot, force=force, reason=reason)
    if found.unchanged or force:
        return found
    with registry.tracking(settings) as client:
        done = _done(client, registry.experiment_id(settings, client), found.fingerprint)
    return found if done is None else replace(found, candidates=[], message=_done_before(done))


def _check(settings: Settings, catalog: Catalog, snapshot: dataset.Snapshot, *, force: bool, reason: str) -> Check:
    fingerprint = fingerprint_of(settings, snapshot, model.find_weights(settings.weights))
    champion = registry.champion(settings, catalog)
    version = champion.version if champion else 0
    same = champion is not None and champion.fingerprint == fingerprint
    back = None if same else registry.rolled_back(settings, catalog, fingerprint)
    if back is not None and not force:
        message = (
            f"This training was done before: {back.sentence}. Champion stays v{version}; "
            f"`lawnwatch model promote --run {back.run_id} --again REASON` would promote the other one all the same."
        )
    elif same and not force:
        message = f"Nothing that training reads has changed; champion is v{version}."
    elif same:
        message = f"Nothing has changed since champion v{version}; training all the same: {reason or 'forced'}."
    elif champion is not None:
        message = f"Snapshot, settings or code differ from those of champion v{version}: there is something to train."
    else:
        message = "There is no champion yet: there is something to train."
    unchanged = (same or back is not None) and not force
    apart = [] if unchanged else [name for name in _wanted(settings) if name != "small_input"]
    return Check(unchanged, snapshot.id, fingerprint, version, apart, message)


def _wanted(settings: Settings) -> list[str]:
    """The candidates that these settings lead to, in order."""
    wanted = [name for name in CANDIDATES if name in (settings.train.candidates or CANDIDATES)]
    # Random weights carry too little signal for training blocks on them, or for a second size, to be worth its time.
    left_out = {"fine_tuned", "small_input"} if settings.weights == "none" else set()
    left_out |= {"fine_tuned"} if settings.train.fine_tune_epochs == 0 else set()
    return [name for name in wanted if name not in left_out]


def fingerprint_of(settings: Settings, snapshot: dataset.Snapshot, weights: model.Weights) -> str:
    """Hash of all that training reads: snapshot, settings, starting weights and the code's recipe."""
    read = {
        "recipe": RECIPE,
        "snapshot": snapshot.id,
        "train": settings.train.model_dump(mode="json", exclude={"device"}),
        "weights": weights.sha256,
        "preprocessing": images.PREPROCESSING,
    }
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def run_candidate(
    settings: Settings,
    catalog: Catalog,
    store: ObjectStore,
    name: str,
    *,
    snapshot_id: str | None = None,
    progress: Progress,
) -> CandidateResult:
    """Train one candidate and leave it in the store for `run`, which is started afterwards with the same settings.

    Args:
        name: one of those that `check` names.
        snapshot_id: the newest snapshot when None.

    Raises:
        SettingsError: these settings train no such candidate, or the weights file is missing.
        NotFound: no such snapshot. DataError: the snapshot cannot be trained on.
        Unavailable: the store or the weights' download does not answer.
    """
    snapshot = dataset.load_snapshot(catalog, store, snapshot_id or "latest")
    must_be_trainable(snapshot)
    found = _check(settings, catalog, snapshot, force=True, reason="")
    if name not in found.candidates:
        raise SettingsError(
            f"there is no candidate {name[:40]!r} to train by itself.",
            hint=f"Name one of {', '.join(found.candidates)}.",
        )
    begun = time.monotonic()
    checkpoint = Checkpoint(store, found.fingerprint)
    kept = checkpoint.load(name) is not None
    if not kept and name != "color_baseline":  # which needs no network; importing TensorFlow takes six seconds
        model.start(settings.train.seed, settings.train.device)
    with _workplace(settings, found.fingerprint) as work:
        # With the cuts for all, where one will be fine-tuned: side by side on one machine they share what is computed.
        cuts = "fine_tuned" in found.candidates
        materials = Materials(settings, store, snapshot, work, cuts=cuts, progress=progress)
        candidate, _ = _trained(name, materials, checkpoint, begun, progress)
    said = "had been trained before" if kept else f"trained in {candidate.seconds:.0f} s"
    return CandidateResult(
        name=name,
        snapshot=snapshot.id,
        fingerprint=found.fingerprint,
        val_accuracy=candidate.val_accuracy,
        val_log_loss=candidate.val_log_loss if math.isfinite(candidate.val_log_loss) else None,
        seconds=round(candidate.seconds, 1),
        kept=kept,
        note=candidate.note,
        message=f"{name} {said}; validation accuracy {candidate.val_accuracy:.1%}.",
    )


def run(
    settings: Settings,
    catalog: Catalog,
    store: ObjectStore,
    *,
    snapshot_id: str | None = None,
    force: bool = False,
    reason: str = "",
    resume: bool = True,
    progress: Progress,
) -> TrainResult:
    """Train the candidates that are not trained yet, export the best, log it all as one MLflow run with nested runs.

    Args:
        snapshot_id: the newest snapshot when None.
        force: train even when nothing has changed.
        reason: why; recorded with the run.
        resume: take what an earlier run, or `run_candidate`, left in the store.
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
        if not force and (done := _done(client, experiment, found.fingerprint)) is not None:
            return _recorded(done, snapshot, unchanged=False, message=_done_before(done))

    checkpoint = Checkpoint(store, found.fingerprint)
    if not resume:
        checkpoint.clear()
    model.start(settings.train.seed, settings.train.device)
    with _workplace(settings, found.fingerprint) as work:
        candidates, best = _compute(settings, store, snapshot, checkpoint, work, reason, begun, progress)
    progress("Logging the run to MLflow.")
    run_id = record(settings, experiment, snapshot, found.fingerprint, work, candidates, best, reason, force)
    shutil.rmtree(work, ignore_errors=True)
    checkpoint.clear()
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
    checkpoint: Checkpoint,
    work: Path,
    reason: str,
    begun: float,
    progress: Progress,
) -> tuple[list[Candidate], Candidate]:
    """Train what is not in the checkpoint, export the best to `work/model`. Repeating it repeats nothing."""
    wanted = _wanted(settings)
    tune = "fine_tuned" in wanted and checkpoint.load("fine_tuned") is None
    materials = Materials(settings, store, snapshot, work, cuts=tune, progress=progress)
    trained = {name: _trained(name, materials, checkpoint, begun, progress) for name in wanted if name != "small_input"}
    usable = [trained[name][0] for name in TEACHERS if name in trained and math.isfinite(trained[name][0].val_log_loss)]
    if not usable:
        raise DataError(
            "no candidate came out usable: "
            + "; ".join(f"{name}: {one.note or 'no finite loss'}" for name, (one, _) in trained.items()),
            hint="Look at the labels and the pictures, or at the training settings.",
        )
    best = pick(usable)
    if "small_input" in wanted:
        trained["small_input"] = _distilled(materials, checkpoint, trained[best.name], progress)
    small = trained["small_input"][1] if "small_input" in trained else None
    export(materials, checkpoint.fingerprint, work / "model", best, trained[best.name][1], small, reason, progress)
    return [trained[name][0] for name in wanted], best


def _trained(
    name: str, materials: Materials, checkpoint: Checkpoint, begun: float, progress: Progress
) -> tuple[Candidate, Arrays]:
    """A candidate from the checkpoint, or trained now and left there."""
    found = checkpoint.load(name)
    if found is not None:
        progress(f"{name}: kept from what was trained before.")
        return found
    settings = materials.settings
    if name == "color_baseline":
        (train, val), parts = materials.colors, materials.pictures
        clock = time.monotonic()
        made = color_baseline(
            train, parts[0].labels[:PROBE_IMAGES], val, parts[1].labels[:PROBE_IMAGES], materials.classes
        )
    elif name == "linear_probe":
        train_features, val_features = materials.features
        clock = time.monotonic()
        probe_of = partial(linear_probe, train_features, val_features, materials.classes, settings.train.seed)
        if settings.train.sweep_seconds > 0:
            grid, trials = probe_sweep(
                settings, lambda views, c: float(probe_of([(views, c)])[0].params["cv_log_loss"]), progress
            )
            made = _swept(probe_of(grid), trials)
        else:
            made = probe_of()
    else:
        probe = _trained("linear_probe", materials, checkpoint, begun, progress)[1]  # where fine-tuning starts
        train_features, val_features = materials.features
        clock, deadline = time.monotonic(), begun + settings.train.budget_seconds + settings.train.sweep_seconds
        head = probe["start_kernel"], probe["start_bias"]

        def tune(tuning: FineTuning) -> tuple[Candidate, Arrays]:
            try:
                return fine_tuned(
                    settings, materials.network, train_features, val_features, head, deadline, progress, tuning
                )
            finally:
                materials.restore()

        if settings.train.sweep_seconds > 0:
            tuning, trials = tuning_sweep(settings, lambda one: tune(one)[0].val_log_loss, progress)
            made = _swept(tune(tuning), trials)
        else:
            made = tune(FINE_TUNING)
    return _keep(name, made, time.monotonic() - clock, checkpoint, progress)


def _swept(made: tuple[Candidate, Arrays], trials: Trials) -> tuple[Candidate, Arrays]:
    return replace(made[0], sweep=trials), made[1]


def _distilled(
    materials: Materials, checkpoint: Checkpoint, best: tuple[Candidate, Arrays], progress: Progress
) -> tuple[Candidate, Arrays]:
    """The cheap candidate, taught by the best."""
    teacher, arrays = best
    found = checkpoint.load("small_input")
    if found is not None and found[0].params.get("teacher") == teacher.name:
        progress("small_input: kept from what was trained before.")
        return found
    clock = time.monotonic()
    train, val = materials.pictures
    if "fold_of" in arrays:
        lesson = Lesson.of_probe(arrays, teacher.temperature, held_out(arrays, train, val))
    else:
        whole = answering(materials.network, arrays, materials.classes)
        rows, asked = train.rows[:HELD_OUT_IMAGES], val.rows[:HELD_OUT_IMAGES]
        logits = []
        for start in range(0, len(rows), 64):
            some = decoded(materials.settings, materials.store, materials.snapshot, rows[start : start + 64])
            logits.append(np.asarray(whole(some, training=False)["logits"]))
        answers = bundle.probabilities(np.concatenate(logits), teacher.temperature)
        lesson = Lesson(
            teacher.name, rows, train.labels[: len(rows)], answers, asked, val.labels[: len(asked)]
        )  # the tuned network has seen the training pictures: validation judges
    known = materials.small_pooled(lesson.rows)
    asked_pooled = known if lesson.asked is lesson.rows else materials.small_pooled(lesson.asked)
    made = small_input((known, asked_pooled), lesson, materials.classes)
    return _keep("small_input", made, time.monotonic() - clock, checkpoint, progress)


def _keep(
    name: str, made: tuple[Candidate, Arrays], seconds: float, checkpoint: Checkpoint, progress: Progress
) -> tuple[Candidate, Arrays]:
    candidate = replace(made[0], seconds=seconds)
    checkpoint.save(name, candidate, made[1])
    progress(
        f"{name}: validation accuracy {candidate.val_accuracy:.1%}, log loss {candidate.val_log_loss:.3f} "
        f"({seconds:.0f} s){'; ' + candidate.note if candidate.note else ''}."
    )
    return candidate, made[1]


def _must_be_known(wanted: Sequence[str]) -> None:
    if set(wanted) - set(CANDIDATES) or (wanted and not set(wanted) & set(TEACHERS)):
        raise SettingsError(
            f"the candidates {sorted(wanted)} cannot be trained.",
            hint=f"Name some of {', '.join(CANDIDATES)}, with at least one of {', '.join(TEACHERS)}; or none, for all.",
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


def _done(client: Any, experiment: str, fingerprint: str) -> Any | None:
    """The run that finished this very training."""
    runs = client.search_runs(
        [experiment],
        f"tags.`lawnwatch.fingerprint` = '{fingerprint}' and tags.`lawnwatch.complete` = 'true'",
        max_results=1,
    )
    return runs[0] if runs else None


def _done_before(run: Any) -> str:
    return f"This training was done before, as run {run.info.run_id}."


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
def _workplace(settings: Settings, fingerprint: str) -> Iterator[Path]:
    """A folder to work in, linear algebra in one thread; a full or read-only disk is said as such."""
    import scipy.linalg  # type: ignore[import-untyped]  # noqa: F401 - what is loaded later would not be limited

    folder = settings.home / "cache" / "train" / fingerprint
    try:
        # Many small systems are solved: threads of linear algebra wait for one another longer than they work.
        with threadpool_limits(1, "blas"):
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
    except OSError as error:
        if error.errno is None:
            raise
        raise Unavailable(
            f"training cannot write below {folder}: {error.strerror}.",
            hint="Free disk space and run the step again: it continues from what was done.",
        ) from error
