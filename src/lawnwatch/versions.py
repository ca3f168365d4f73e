"""Questions about model versions: where one comes from, what was made of a picture, how two differ, and whether one can
be made again. Reads what the steps recorded; only `reproduce` computes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lawnwatch import bundle, dataset, evaluate, gate, registry, train
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings, TrainSettings
from lawnwatch.errors import IntegrityError, NotFound
from lawnwatch.store import ObjectStore

Progress = Callable[[str], None]


# --- lineage ------------------------------------------------------------------------------------------------


def lineage(
    settings: Settings, catalog: Catalog, store: ObjectStore, version: str | int = "champion", *, limit: int = 20
) -> dict[str, Any]:
    """From a version to its run, its snapshot and the image records in it.

    Args:
        limit: most images listed; all are counted.

    Raises:
        NotFound: no such version. IntegrityError. Unavailable.
    """
    info = registry.show(settings, catalog, version)
    facts = json.loads((registry.artifacts(settings, info.run_id, "model") / "model.json").read_text())
    snapshot = dataset.load_snapshot(catalog, store, info.snapshot)
    listed = [
        {"url": row.url, "sha256": row.sha256, "label": row.label, "split": row.split} for row in snapshot.rows[:limit]
    ]
    return {
        "version": info.version,
        "aliases": info.aliases,
        "bundle_sha256": info.bundle_sha256,
        "decision": info.decision,
        "reason": info.reason,
        "run_id": info.run_id,
        "candidate": facts["candidate"],
        "git_commit": facts["git_commit"],
        "weights": facts["weights"],
        "trained_at": facts["created_at"],
        "snapshot": snapshot.id,
        "counts": snapshot.counts,
        "image_total": len(snapshot.rows),
        "images": listed,
        "message": f"Version {info.version} is {facts['candidate']} of run {info.run_id[:8]}, trained on snapshot "
        f"{snapshot.id[:12]} of {len(snapshot.rows)} images.",
    }


def lineage_of_image(settings: Settings, catalog: Catalog, store: ObjectStore, image: str) -> dict[str, Any]:
    """From a picture back to the snapshots that hold it and to the versions that were made with it.

    Args:
        image: its source URL, or its SHA-256 or the beginning of one (8 digits at least).

    Raises:
        NotFound: no snapshot holds it.
    """
    is_hash = len(image) >= 8 and set(image) <= set("0123456789abcdef")
    versions = registry.list_versions(settings, catalog)
    snapshots: list[dict[str, Any]] = []
    made_with: list[dict[str, Any]] = []
    for listed in dataset.list_snapshots(catalog):
        snapshot = dataset.load_snapshot(catalog, store, listed["snapshot"])
        for row in snapshot.rows:
            if not (row.url == image or (is_hash and row.sha256.startswith(image))):
                continue
            place = {"sha256": row.sha256, "url": row.url, "label": row.label, "split": row.split}
            snapshots.append({"snapshot": snapshot.id, **place})
            use = {"train": "trained on it", "validation": "chosen with it", "test": "measured on it"}[row.split]
            made_with += [
                {"version": info.version, "aliases": info.aliases, "use": use, "snapshot": snapshot.id}
                for info in versions
                if info.snapshot == snapshot.id
            ]
    if not snapshots:
        raise NotFound(
            f"no snapshot holds the image {image}.",
            hint="Give its source URL or its SHA-256; `lawnwatch catalog show URL` says what became of it.",
        )
    trained = sorted({one["version"] for one in made_with if one["use"] == "trained on it"})
    named = ", ".join(f"v{number}" for number in trained) or "none"
    return {
        "image": image,
        "snapshots": snapshots,
        "versions": sorted(made_with, key=lambda one: -one["version"]),
        "message": f"{len({one['snapshot'] for one in snapshots})} snapshot(s) hold it; trained on it: {named}.",
    }


# --- comparing ----------------------------------------------------------------------------------------------


def compare(
    settings: Settings, catalog: Catalog, store: ObjectStore, one: str | int, other: str | int
) -> dict[str, Any]:
    """Two versions side by side, and the second against the first on the test images that both were measured on.

    Raises:
        NotFound: no such version. IntegrityError. Unavailable.
    """
    infos = [registry.show(settings, catalog, version) for version in (one, other)]
    judged = [_judged(settings, info.run_id) for info in infos]
    figures = {
        name: {
            f"v{info.version}": {part: round(found["metrics"][name][part], 4) for part in ("value", "low", "high")}
            for info, (found, _) in zip(infos, judged, strict=True)
        }
        for name in judged[0][0]["metrics"]
        if name in judged[1][0]["metrics"]
    }
    (_, first), (_, second) = judged
    # A relabelled picture is another question: only those with the same label are compared.
    common = [sha for sha in first if sha in second and first[sha]["label"] == second[sha]["label"]]
    document: dict[str, Any] = {
        "versions": [
            {"version": i.version, "aliases": i.aliases, "candidate": i.candidate, "snapshot": i.snapshot}
            for i in infos
        ],
        "metrics": figures,
        "data": _difference(catalog, store, infos[0].snapshot, infos[1].snapshot),
        "paired": None,
    }
    names = f"v{infos[1].version} against v{infos[0].version}"
    if not common:
        return {**document, "message": f"{names}: they were measured on no common test image."}
    right = [np.array([a[sha]["predicted"] == a[sha]["label"] for sha in common]) for a in (first, second)]
    pair = gate.paired_gain(right[1], right[0], alpha=settings.gate.alpha, margin=settings.gate.margin)
    said = f"{100 * pair.gain:+.1f} points ({100 * pair.low:+.1f} to {100 * pair.high:+.1f})"
    return {
        **document,
        "paired": asdict(pair),
        "message": f"{names}, on {pair.images} common test images: {said}, {pair.wins} won, {pair.losses} lost.",
    }


def _judged(settings: Settings, run_id: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The evaluation of a run, and its answer to each test picture by SHA-256."""
    home = registry.artifacts(settings, run_id, "evaluation")
    answers = json.loads((home / "predictions.json").read_text())["test"]
    return json.loads((home / bundle.EVALUATION).read_text()), {answer["sha256"]: answer for answer in answers}


def _difference(catalog: Catalog, store: ObjectStore, one: str, other: str) -> dict[str, int] | None:
    """What the second snapshot trains on beside the first; None when one of them is gone."""
    if one == other:
        return {"new": 0, "withdrawn": 0, "relabelled": 0}
    try:
        before, after = (dataset.load_snapshot(catalog, store, name) for name in (one, other))
    except (NotFound, IntegrityError):
        return None
    then, now = ({row.sha256: row.label for row in snapshot.rows} for snapshot in (before, after))
    return {
        "new": len(now.keys() - then.keys()),
        "withdrawn": len(then.keys() - now.keys()),
        "relabelled": sum(then.get(sha256, label) != label for sha256, label in now.items()),
    }


# --- making one again ---------------------------------------------------------------------------------------


def reproduce(
    settings: Settings, catalog: Catalog, store: ObjectStore, version: str | int, *, progress: Progress
) -> dict[str, Any]:
    """Train a version again from its record, without any cache, and say what differs.

    The snapshot, the seed and the settings are the recorded ones; the code and the machine are those at hand. The new
    run is kept in MLflow and is neither judged nor promoted.

    Raises:
        NotFound: no such version, or its snapshot is gone. SettingsError: the weights are not there.
        DataError, Unavailable: as in training.
    """
    info = registry.show(settings, catalog, version)
    source = registry.artifacts(settings, info.run_id, "model")
    facts = json.loads((source / "model.json").read_text())
    params = registry.run_params(settings, info.run_id)
    recorded = {
        name.removeprefix("train."): _plain(value) for name, value in params.items() if name.startswith("train.")
    }
    with tempfile.TemporaryDirectory(prefix="reproduce-", dir=_room(settings)) as room:
        again = settings.model_copy(
            update={"home": Path(room), "train": TrainSettings.model_validate(recorded)}
        )  # a home of its own: nothing that was computed before is used
        progress(f"Training version {info.version} again: snapshot {info.snapshot[:12]}, seed {again.train.seed}.")
        result = train.run(
            again,
            catalog,
            store,
            snapshot_id=info.snapshot,
            force=True,
            reason=f"reproduction of version {info.version}",
            resume=False,
            progress=progress,
        )
        home = registry.artifacts(again, result.run_id, "model")
        new = json.loads((home / "model.json").read_text())
        differences = [
            {"what": name, "recorded": facts.get(name), "now": new.get(name)}
            for name in ("candidate", "classes", "preprocessing", "weights", "git_commit", "fingerprint")
            if facts.get(name) != new.get(name)
        ]
        files = {name: {"recorded": _sha256(source, name), "now": _sha256(home, name)} for name in (bundle.MODEL,)}
        moved, accuracy = _moved(settings, catalog, store, info, evaluate.Model.open(home, new))
    same_bytes = all(one["recorded"] == one["now"] for one in files.values())
    return {
        "version": info.version,
        "run_id": result.run_id,
        "identical_bytes": same_bytes,
        "files": files,
        "largest_probability_difference": moved,
        "test_accuracy": accuracy,
        "differences": differences,
        "message": f"Version {info.version} was made again as run {result.run_id[:8]}: "
        + ("the same bytes. " if same_bytes else "other bytes. ")
        + f"No test probability moves by more than {moved:.2g}; test accuracy was {accuracy['recorded']:.1%} and is "
        f"{accuracy['now']:.1%}. "
        + (
            f"Otherwise: {', '.join(str(one['what']) for one in differences)}."
            if differences
            else "Nothing else differs."
        ),
    }


def _room(settings: Settings) -> Path:
    folder = settings.home / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("reproduce-*"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    return folder


def _plain(value: str) -> Any:
    """A parameter as MLflow keeps it, text, as the value that it was."""
    try:
        return json.loads(value.replace("'", '"'))
    except ValueError:
        return value


def _sha256(folder: Path, name: str) -> str:
    return str(json.loads((folder / "files.json").read_text())[name])


def _moved(
    settings: Settings, catalog: Catalog, store: ObjectStore, info: registry.VersionInfo, model: evaluate.Model
) -> tuple[float, dict[str, float]]:
    """The largest difference of a test probability, at the recorded temperature, and both accuracies."""
    found, answers = _judged(settings, info.run_id)
    rows = [row for row in dataset.load_snapshot(catalog, store, info.snapshot).split("test") if row.sha256 in answers]
    logits = evaluate.ask(settings, store, model.graph, rows).logits
    now = bundle.probabilities(logits, found["temperature"])
    then = np.array([[answers[row.sha256]["probabilities"][label] for label in model.classes] for row in rows])
    right = {
        "recorded": float(np.mean([answers[row.sha256]["predicted"] == row.label for row in rows])),
        "now": float(model.right(now, rows).mean()),
    }
    return float(np.abs(now - then).max()), right
