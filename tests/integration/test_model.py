"""Training on real pictures, with real MLflow in the embedded mode."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from lawnwatch import evaluate, registry, release, train
from lawnwatch.errors import IntegrityError, NotFound, SettingsError, Unavailable
from road import Road, quiet

pytestmark = pytest.mark.integration


def test_the_run_page_answers_what_it_was_trained_on_and_how_good_it_is(trained: Road) -> None:
    with registry.tracking(trained.settings) as client:
        run = client.get_run(trained.result.run_id)
        children = client.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{trained.result.run_id}'")
        files = {entry.path for entry in client.list_artifacts(trained.result.run_id, "model")}
    assert run.info.status == "FINISHED"
    assert run.data.tags["lawnwatch.snapshot"] == trained.snapshot.id
    assert run.data.tags["mlflow.source.git.commit"]
    assert run.inputs.dataset_inputs[0].dataset.digest == trained.snapshot.id[:36]
    assert "validation accuracy" in run.data.tags["mlflow.note.content"]
    assert {child.info.run_name for child in children} == set(train.CANDIDATES)
    assert {"model/model.tflite", "model/model.weights.h5", "model/model.json", "model/calibration.json"} <= files
    assert {"cv_ece", "unknown_auroc_mahalanobis_background", "unknown_auroc_knn", "int8_speedup"} <= set(
        run.data.metrics
    )
    assert run.info.artifact_uri.startswith((trained.settings.home / "mlartifacts").as_uri())
    assert trained.result.best in ("linear_probe", "fine_tuned")
    assert not (trained.settings.home / "cache" / "train" / run.data.tags["lawnwatch.fingerprint"]).exists()


def test_30_35_a_killed_run_and_one_without_mlflow_continue_from_their_checkpoints(
    road: Road, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off after the probe, then MLflow dies after the work was done: what was done is not done again."""
    for variable in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(variable, "2")
    down = road.settings.model_copy(update={"mlflow_tracking_uri": "http://127.0.0.1:9"})
    begun = time.monotonic()
    with pytest.raises(Unavailable, match="MLflow"):
        train.run(down, road.catalog, road.store, force=True, reason="r", progress=quiet)
    assert time.monotonic() - begun < 60

    class Killed(BaseException):
        pass

    def die_after_the_probe(line: str) -> None:
        if line.startswith("linear_probe: validation"):
            raise Killed

    with pytest.raises(Killed):
        train.run(road.settings, road.catalog, road.store, force=True, reason="r", progress=die_after_the_probe)

    checked = train.check(road.settings, road.catalog, road.store)
    lines: list[str] = []
    home = road.settings.home / "mlartifacts"
    home.rename(road.settings.home / "gone")
    home.write_text("a file where MLflow wants a folder")
    try:
        with pytest.raises(Unavailable, match="MLflow"):
            train.run(road.settings, road.catalog, road.store, force=True, reason="r", progress=lines.append)
    finally:
        home.unlink()
        (road.settings.home / "gone").rename(home)
    assert "linear_probe: kept from what was trained before." in lines
    work = road.settings.home / "cache" / "train" / checked.fingerprint
    assert (work / "model" / "files.json").exists()

    lines.clear()
    result = train.run(road.settings, road.catalog, road.store, force=True, reason="r", progress=lines.append)
    assert sum("kept from" in line for line in lines) == len(result.candidates) + 1, lines
    assert result.run_id != road.result.run_id
    assert not work.exists()


def test_random_weights_give_features_of_ordinary_size(photos: Path) -> None:
    """Without weights the road must still be walked: an unscaled random network answers 1e-12 to every picture."""
    from lawnwatch import images, model

    files = sorted(photos.glob("*/*.jpg"))[:: max(1, len(list(photos.glob("*/*.jpg"))) // 16)][:16]
    pictures = np.stack([images.decode(file.read_bytes(), max_pixels=50_000_000) for file in files])
    spread = {}
    for name, scale_on in (("plain", None), ("scaled", pictures)):
        model.keras().utils.set_random_seed(17)
        network = model.load_network(model.find_weights("none"), scale_on=scale_on)
        pooled = network.top(network.bottom(pictures)).numpy().mean(axis=(1, 2))
        spread[name] = float(pooled.std(axis=0).mean())
    assert spread["plain"] < 1e-6 < 1e-2 < spread["scaled"]


def test_artifacts_that_were_altered_are_refused(road: Road) -> None:
    (file,) = (road.settings.home / "mlartifacts").glob(f"{road.result.run_id}/artifacts/model/model.tflite")
    shutil.rmtree(road.settings.home / "cache" / "runs", ignore_errors=True)
    data = file.read_bytes()
    try:
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(IntegrityError, match=r"model\.tflite"):
            registry.artifacts(road.settings, road.result.run_id, "model")
    finally:
        file.write_bytes(data)


def test_what_is_missing_is_said(road: Road, tmp_path: Path) -> None:
    settings, catalog, store = road.settings, road.catalog, road.store
    lost = settings.model_copy(update={"weights": str(tmp_path / "none.h5")})
    with pytest.raises(SettingsError, match=r"none\.h5"):
        train.run(lost, catalog, store, force=True, progress=quiet)
    with pytest.raises(NotFound, match="no verdict"):
        registry.promote(settings, catalog, "nothing")
    with pytest.raises(NotFound):
        evaluate.run(settings, catalog, store, "0" * 32, progress=quiet)
    with pytest.raises(NotFound, match="there is no model version"):
        release.publish(settings, catalog, store, "7", progress=quiet)
    with pytest.raises(NotFound, match="no previous"):
        registry.rollback(settings, catalog)
