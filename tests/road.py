"""A home folder with real photographs, a snapshot and a trained run: what judging, promoting and releasing start from.

Training takes a minute, so it is done once a session. Every test works on a copy of that home, with a catalog, an
MLflow and a champion of its own: nothing that one test does is there for the next.

Challengers are made from the trained model by editing the head's numbers inside the LiteRT graph, which gives truly
worse, constant and broken models in no time.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lawnwatch import bundle, registry
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings
from lawnwatch.store import ObjectStore, open_store

if TYPE_CHECKING:
    from lawnwatch import dataset, train


def quiet(line: str) -> None:
    """A step's progress that nobody reads; still, it must be a sentence."""
    assert line and "Traceback" not in line


@dataclass
class Road:
    """An installation whose newest snapshot was trained on."""

    settings: Settings
    catalog: Catalog
    store: ObjectStore
    snapshot: dataset.Snapshot
    result: train.TrainResult

    def copy(self, home: Path) -> Road:
        """The same installation in a folder of its own."""
        from mlflow.tracking._tracking_service import utils

        old = self.settings.home
        # MLflow remembers for the life of the process where a run's artifacts are; here one run is in many places.
        utils._artifact_repos_cache.clear()
        self.catalog.engine.dispose()
        # Without copies of artifacts: a test that alters an artifact must be read from the store, not from those.
        shutil.copytree(old, home, ignore=lambda folder, names: {"runs"} & set(names))
        _move_artifacts(home / "mlflow.db", (old / "mlartifacts").as_uri(), (home / "mlartifacts").as_uri())
        given = self.settings.model_dump(include={"weights", "fetch", "train", "gate"})
        settings = Settings(home=home, **given)
        return Road(settings, Catalog(settings), open_store(settings), self.snapshot, self.result)


def _move_artifacts(database: Path, old: str, new: str) -> None:
    """MLflow keeps the absolute address of every artifact."""
    columns = (
        ("experiments", "artifact_location"),
        ("runs", "artifact_uri"),
        ("model_versions", "source"),
        ("model_versions", "storage_location"),
        ("logged_models", "artifact_location"),
    )
    with sqlite3.connect(database) as connection:
        for table, column in columns:
            connection.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (old, new))  # noqa: S608
    connection.close()


def floors(weights: str) -> dict[str, float]:
    """The gate's settings: random features see nothing in darkened pictures; the rest of the gate is the real one."""
    return {"min_robust_accuracy": 0.3} if weights == "none" else {}


def floor_variables(weights: str) -> dict[str, str]:
    """The same for the environment of another process."""
    return {f"LAWNWATCH_GATE__{name.upper()}": str(floor) for name, floor in floors(weights).items()}


def build(home: Path, photos: Path, photo_web: str, weights: str) -> Road:
    """Photographs to a trained run, by the steps themselves."""
    from lawnwatch import dataset, ingest, train

    fetch = {"allow_cidrs": ["127.0.0.0/8"]}
    settings = Settings(home=home, weights=weights, fetch=fetch, gate=floors(weights))  # type: ignore[arg-type]
    catalog, store = Catalog(settings), open_store(settings)
    catalog.migrate()
    for path in sorted(photos.glob("*/*.jpg")):
        catalog.add(f"{photo_web}/{path.parent.name}/{path.name}", path.parent.name)
    ingest.run(settings, catalog, store, progress=quiet)
    snapshot = dataset.create_snapshot(settings, catalog, store)
    result = train.run(settings, catalog, store, progress=quiet)
    return Road(settings, catalog, store, snapshot, result)


def challenger(
    road: Road,
    edit: Callable[[np.ndarray], np.ndarray] = lambda kernel: kernel * 1.01,
    *,
    reason: str = "",
    change: Callable[[Path, dict], None] | None = None,
) -> str:
    """A run whose graph is the trained one with an edited head kernel (classes, 1280).

    Args:
        edit: by default a head that is surer by a hundredth and gives the same answers.
        change: done to the folder and to the contents of its `model.json` before they are sealed.
    """
    source = registry.artifacts(road.settings, road.result.run_id, "model")
    folder = road.settings.home / "challenger" / "model"
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(source, folder)
    graph = (folder / bundle.MODEL).read_bytes()
    kernel = _head(graph)
    assert graph.count(kernel.tobytes()) >= 1, "the head's kernel is not in the graph as expected"
    edited = edit(kernel.copy()).astype(np.float32)
    (folder / bundle.MODEL).write_bytes(graph.replace(kernel.tobytes(), edited.tobytes()))
    facts = json.loads((folder / "model.json").read_text())
    facts |= {"reason": reason, "fingerprint": f"challenger {time.monotonic()}"}
    if change is not None:
        change(folder, facts)
    (folder / "model.json").write_text(json.dumps(facts))
    registry.seal(folder)
    with registry.tracking(road.settings) as client:
        run = client.create_run(registry.experiment_id(road.settings, client), run_name="challenger")
        client.log_artifacts(run.info.run_id, str(folder), "model")
    return str(run.info.run_id)


def _head(graph: bytes) -> np.ndarray:
    """The (classes, 1280) float32 kernel of the head of a graph."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=graph)
    interpreter.allocate_tensors()
    (index,) = (
        one["index"]
        for one in interpreter.get_tensor_details()
        if tuple(one["shape"]) == (2, 1280) and one["dtype"] is np.float32
    )
    return np.ascontiguousarray(interpreter.get_tensor(index))
