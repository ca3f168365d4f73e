"""Training on real pictures, with real MLflow in the embedded mode."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lawnwatch import bundle, evaluate, registry, release, train
from lawnwatch.config import Settings
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
    left_out = {"fine_tuned", "small_input"} if trained.settings.weights == "none" else set()
    assert {child.info.run_name for child in children} == set(train.CANDIDATES) - left_out
    assert {"model/model.tflite", "model/model.weights.h5", "model/model.json", "model/calibration.json"} <= files
    assert {"cv_ece", "unknown_auroc_mahalanobis_background", "unknown_auroc_knn", "int8_speedup"} <= set(
        run.data.metrics
    )
    assert run.info.artifact_uri.startswith((trained.settings.home / "mlartifacts").as_uri())
    assert trained.result.best in ("linear_probe", "fine_tuned")
    assert not (trained.settings.home / "cache" / "train" / run.data.tags["lawnwatch.fingerprint"]).exists()


def test_30_35_a_killed_run_and_one_without_mlflow_continue_from_their_checkpoints(
    road: Road, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Cut off after the probe, then MLflow dies after the work was done: what was done is not done again."""
    for variable in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(variable, "2")
    down = road.settings.model_copy(update={"mlflow_tracking_uri": "http://127.0.0.1:9"})
    begun = time.monotonic()
    with pytest.raises(Unavailable, match="MLflow"):
        train.run(down, road.catalog, road.store, force=True, reason="r", progress=quiet)
    assert time.monotonic() - begun < 60

    environment = os.environ | {
        "LAWNWATCH_HOME": str(road.settings.home),
        "LAWNWATCH_MODEL_NAME": road.settings.model_name,
        "LAWNWATCH_WEIGHTS": road.settings.weights,
    }
    with subprocess.Popen(
        [sys.executable, "-m", "lawnwatch", "train", "--force", "--reason=r"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as killed:
        assert killed.stderr is not None
        said = []
        for line in killed.stderr:
            said.append(line)
            if line.startswith("linear_probe: validation"):
                killed.terminate()
        killed.wait(60)
    assert killed.returncode not in (0, None) and "Traceback" not in "".join(said)
    assert "linear_probe: validation" in "".join(said) and "Exported" not in "".join(said)

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
    assert not [str(one) for one in recwarn if "/mlflow/" in one.filename], "its advice is not for who trains"


def test_what_was_trained_and_is_no_champion_yet_is_not_trained_again(trained: Road) -> None:
    found = train.check(trained.settings, trained.catalog, trained.store)
    assert (found.unchanged, found.candidates) == (False, []) and trained.result.run_id in found.message
    assert train.check(trained.settings, trained.catalog, trained.store, force=True).candidates
    again = train.run(trained.settings, trained.catalog, trained.store, progress=quiet)
    assert (again.run_id, again.recorded) == (trained.result.run_id, True)


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


def test_a_candidate_trained_as_a_step_of_its_own_is_taken_by_the_run_that_follows(road: Road) -> None:
    """As mapped pods do; by another home, which shares only the store."""
    settings = road.settings.model_copy(
        update={"train": road.settings.train.model_copy(update={"seed": 18, "candidates": ["linear_probe"]})}
    )
    apart = train.check(settings, road.catalog, road.store).candidates
    assert apart == ["linear_probe"]
    first = train.run_candidate(settings, road.catalog, road.store, "linear_probe", progress=quiet)
    again = train.run_candidate(settings, road.catalog, road.store, "linear_probe", progress=quiet)
    assert (first.kept, again.kept) == (False, True)
    assert (again.val_accuracy, again.fingerprint) == (first.val_accuracy, first.fingerprint)
    with pytest.raises(SettingsError, match="no candidate"):
        train.run_candidate(settings, road.catalog, road.store, "small_input", progress=quiet)
    lines: list[str] = []
    result = train.run(settings, road.catalog, road.store, progress=lines.append)
    assert "linear_probe: kept from what was trained before." in lines and result.best == "linear_probe"
    assert not any("Features of" in line for line in lines), "the hand-over holds what the export needs"
    assert list(road.store.list(f"train/{first.fingerprint}/")) == []


def test_the_logged_model_loads_by_its_signature_and_answers_as_the_served_graph(trained: Road) -> None:
    import mlflow

    with registry.tracking(trained.settings) as client:
        uri = client.get_run(trained.result.run_id).info.artifact_uri
    loaded = mlflow.pyfunc.load_model(f"{uri}/mlflow_model")
    assert loaded.metadata.get_input_schema().inputs[0].shape == (-1, 224, 224, 3)
    home = registry.artifacts(trained.settings, trained.result.run_id, "model")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    graph = bundle.Graph((home / bundle.MODEL).read_bytes(), classes=2)
    temperature = train.load_calibration(home).temperature
    expected = [bundle.probabilities(graph(picture).logits, temperature) for picture in pictures]
    assert loaded.predict(pictures) == pytest.approx(np.stack(expected), abs=1e-6)


@pytest.mark.parametrize("broken", ["activations", "learning rate"])
def test_38_fine_tuning_that_ends_in_no_numbers_is_no_candidate(broken: str) -> None:
    from lawnwatch import model
    from lawnwatch.train.candidates import FineTuning, fine_tuned
    from lawnwatch.train.features import Features

    rng, labels = np.random.default_rng(0), np.arange(8) % 2
    cut = rng.standard_normal((8, 1, *model.CUT_SHAPE)).astype(np.float16)
    if broken == "activations":
        cut[3] = np.nan
    none = np.zeros((8, 0, 1280), np.float32)
    part = Features([], labels, np.arange(8), np.zeros((8, 1280), np.float32), none, cut)
    model.start(1, "cpu")
    network = model.load_network(model.find_weights("none"))
    head = rng.standard_normal((1280, 2)).astype(np.float32), np.zeros(2, np.float32)
    tuning = FineTuning(1e-4 if broken == "activations" else math.inf, 2)
    made, _ = fine_tuned(Settings(), network, part, part, head, math.inf, quiet, tuning)
    assert made.val_log_loss == math.inf and "not finite" in made.note
