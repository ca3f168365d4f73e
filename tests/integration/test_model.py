"""The road from a snapshot to a published bundle, on real pictures, with real MLflow in the embedded mode.

One training run serves the whole file. Challengers are made from its model by editing the head's numbers inside the
LiteRT graph, which gives truly worse, constant and broken models in no time.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from typer.testing import CliRunner

from lawnwatch import (
    bundle,
    cli,
    config,
    dataset,
    evaluate,
    images,
    ingest,
    registry,
    release,
    train,
    unknown,
    versions,
)
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings
from lawnwatch.errors import Conflict, DataError, IntegrityError, NotFound, SettingsError, Unavailable
from lawnwatch.sketch import Sketch
from lawnwatch.store import ObjectStore, open_store
from lawnwatch.train.export import SMALL, VARIANT_LOSS

pytestmark = pytest.mark.integration


def quiet(line: str) -> None:
    assert line and "Traceback" not in line


@dataclass
class Road:
    """A home folder with pictures, a snapshot and a trained run."""

    settings: Settings
    catalog: Catalog
    store: ObjectStore
    snapshot: dataset.Snapshot
    result: train.TrainResult


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, photos: Path, photo_web: str, weights: str) -> Road:
    settings = Settings(
        home=tmp_path_factory.mktemp("road"),
        weights=weights,
        fetch={"allow_cidrs": ["127.0.0.0/8"]},  # type: ignore[arg-type]
    )
    catalog, store = Catalog(settings), open_store(settings)
    catalog.migrate()
    for path in sorted(photos.glob("*/*.jpg")):
        catalog.add(f"{photo_web}/{path.parent.name}/{path.name}", path.parent.name)
    ingest.run(settings, catalog, store, progress=quiet)
    snapshot = dataset.create_snapshot(settings, catalog, store)
    result = train.run(settings, catalog, store, progress=quiet)
    return Road(settings, catalog, store, snapshot, result)


@pytest.fixture
def road(trained: Road, request: pytest.FixtureRequest) -> Road:
    """The same run and pictures under another model name: no champion, no versions yet."""
    name = f"lawnwatch-{request.node.name}"[:100].replace("[", "-").replace("]", "")
    return replace(trained, settings=trained.settings.model_copy(update={"model_name": name}))


@pytest.fixture
def champion(road: Road) -> registry.Promotion:
    evaluate.run(road.settings, road.catalog, road.store, road.result.run_id, progress=quiet)
    return registry.promote(road.settings, road.catalog, road.result.run_id)


def head_kernel(graph: bytes) -> np.ndarray:
    """The (classes, 1280) float32 constant of a graph."""
    interpreter = Interpreter(model_content=graph)
    interpreter.allocate_tensors()
    (index,) = (
        one["index"]
        for one in interpreter.get_tensor_details()
        if tuple(one["shape"]) == (2, 1280) and one["dtype"] is np.float32
    )
    return np.ascontiguousarray(interpreter.get_tensor(index))


def challenger(
    road: Road, edit: Callable[[np.ndarray], np.ndarray], *, reason: str = "", classes: tuple[str, ...] = ()
) -> str:
    """A run whose graph is the trained one with an edited head kernel (n, 1280)."""
    source = registry.artifacts(road.settings, road.result.run_id, "model")
    folder = road.settings.home / "challenger" / "model"
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(source, folder)
    graph = (folder / bundle.MODEL).read_bytes()
    kernel = head_kernel(graph)
    assert graph.count(kernel.tobytes()) >= 1, "the head's kernel is not in the graph as expected"
    edited = edit(kernel.copy()).astype(np.float32)
    (folder / bundle.MODEL).write_bytes(graph.replace(kernel.tobytes(), edited.tobytes()))
    facts = json.loads((folder / "model.json").read_text())
    facts["classes"] = list(classes) or facts["classes"]
    facts |= {"reason": reason, "fingerprint": f"challenger {time.monotonic()}"}
    (folder / "model.json").write_text(json.dumps(facts))
    registry.seal(folder)
    with registry.tracking(road.settings) as client:
        run = client.create_run(registry.experiment_id(road.settings, client), run_name="challenger")
        client.log_artifacts(run.info.run_id, str(folder), "model")
    return str(run.info.run_id)


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


def test_the_test_split_is_measured_on_the_served_graph(road: Road, weights: str, photos: Path) -> None:
    verdict = evaluate.run(road.settings, road.catalog, road.store, road.result.run_id, progress=quiet)
    found = verdict.evaluation
    assert verdict.decision == "promote", verdict.reason
    assert found["images"] == len(road.snapshot.split("test"))
    assert np.array(found["confusion"]["matrix"]).sum() == found["images"]
    if weights != "none" and not road.snapshot.samples and len(road.snapshot.rows) >= 390:
        assert found["metrics"]["accuracy"]["value"] >= 0.93
    again = evaluate.run(road.settings, road.catalog, road.store, road.result.run_id, progress=quiet)
    assert (again.created_at, again.decision) == (verdict.created_at, "promote")
    assert {one["status"] for one in again.checks} == {"passed"} and again.claim == "floors"
    assert again.thresholds == road.settings.gate.model_dump()
    assert set(found["robustness"]["altered"]) == set(evaluate.ALTERATIONS)
    assert {one["division"] for one in found["slices"]} == {
        "shorter side", "brightness", "sharpness", "source host", "label source",
    }  # fmt: skip


def test_the_report_is_kept_with_the_run_and_in_the_store(road: Road) -> None:
    verdict = evaluate.run(road.settings, road.catalog, road.store, road.result.run_id, progress=quiet)
    page = road.store.get(evaluate.report_key(road.result.run_id))
    kept = registry.artifacts(road.settings, road.result.run_id, "evaluation") / "report.html"
    assert kept.read_bytes() == page
    assert verdict.report_url.endswith(f"/reports/evaluation/{road.result.run_id}")
    assert len(page) < 3_000_000
    text = page.decode()
    assert verdict.reason in text and "what speaks for" in text  # the class activation maps are there
    assert not re.findall(r"""<(?:script|link rel="stylesheet)|src="(?!data:)|url\(""", text), "it loads something"
    with registry.tracking(road.settings) as client:
        tags = client.get_run(road.result.run_id).data.tags
    assert (tags["lawnwatch.decision"], tags["lawnwatch.claim"]) == ("promote", "floors")


def test_a_graph_without_a_map_only_leaves_the_overlays_out(road: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = bundle.Graph.__call__
    monkeypatch.setattr(bundle.Graph, "__call__", lambda self, image: ask(self, image)._replace(cam=None))
    policy = road.settings.gate.model_copy(update={"max_latency_ms": 251.0})  # else the recorded verdict stands
    settings = road.settings.model_copy(update={"gate": policy})
    evaluate.run(settings, road.catalog, road.store, road.result.run_id, progress=quiet)
    assert "what speaks for" not in road.store.get(evaluate.report_key(road.result.run_id)).decode()


def test_a_promoted_model_is_published_and_every_step_repeats_without_change(
    road: Road, champion: registry.Promotion
) -> None:
    settings, catalog, store = road.settings, road.catalog, road.store
    assert (champion.version, champion.changed) == (1, True)
    first = release.publish(settings, catalog, store, progress=quiet)
    found = bundle.read(store, first.sha256)
    assert first.created
    assert found.manifest.lineage.snapshot == road.snapshot.id
    assert found.manifest.lineage.run_id == road.result.run_id
    assert found.manifest.evaluation["verdict"]["decision"] == "promote"  # type: ignore[index,call-overload]
    assert Sketch.from_bytes(found.bytes_of(bundle.SKETCH)).count == len(road.snapshot.split("train"))
    assert "## Limits" in found.bytes_of(bundle.MODEL_CARD).decode()

    again = release.publish(settings, catalog, store, progress=quiet)
    assert (again.sha256, again.created) == (first.sha256, False)
    assert release.find(settings, catalog, store, "champion").sha256 == first.sha256
    assert not registry.promote(settings, catalog, road.result.run_id).changed
    checked = train.check(settings, catalog, store)
    assert checked.unchanged and "champion is v1" in checked.message
    repeated = train.run(settings, catalog, store, progress=quiet)
    assert (repeated.run_id, repeated.unchanged) == (road.result.run_id, True)
    assert len(registry.list_versions(settings, catalog)) == 1
    assert not train.check(settings, catalog, store, force=True, reason="labels reviewed").unchanged


def test_both_graphs_travel_and_the_served_one_is_not_worse(
    road: Road, champion: registry.Promotion, weights: str
) -> None:
    found = bundle.read(road.store, release.publish(road.settings, road.catalog, road.store, progress=quiet).sha256)
    variants = found.manifest.variants
    assert set(variants) == ({"float32", "int8"} if weights == "none" else {"float32", "int8", SMALL})
    assert variants[found.manifest.served].file == bundle.MODEL and variants[found.manifest.served].passed
    quicker = max((one for one in variants.values() if one.passed), key=lambda one: one.speedup)
    assert variants[found.manifest.served] == quicker
    graphs = {
        name: bundle.Graph(found.bytes_of(one.file), classes=len(found.manifest.classes))
        for name, one in variants.items()
    }
    sizes = {name: len(found.bytes_of(one.file)) for name, one in variants.items()}
    assert sizes["int8"] < 0.4 * sizes["float32"]
    if weights == "none":
        return
    assert variants[found.manifest.served].accuracy_change >= -VARIANT_LOSS
    rows = road.snapshot.split("test")[:20]
    said = {}
    for name, graph in graphs.items():
        answers = evaluate.ask(road.settings, road.store, graph, rows)
        said[name] = bundle.probabilities(answers.logits, found.manifest.temperature)
        assert graph(np.zeros((224, 224, 3), np.uint8)).cam is not None
    for name in said:
        assert float(np.abs(said[name] - said["float32"]).mean()) < 0.1, name


def test_what_is_no_class_is_told_by_the_published_bundle(
    road: Road, champion: registry.Promotion, weights: str
) -> None:
    """Noise, a drawing and a night sky are unknown; photographs of the classes are not."""
    if weights == "none" or road.snapshot.samples:
        pytest.skip("drawn pictures on random features: nothing to tell apart")
    found = bundle.read(road.store, release.publish(road.settings, road.catalog, road.store, progress=quiet).sha256)
    detector = bundle.UnknownDetector.of(found)
    assert detector is not None and detector.spec.method == unknown.METHOD
    graph = bundle.Graph(found.bytes_of(bundle.MODEL), classes=len(found.manifest.classes))
    rng = np.random.default_rng(99)
    strange = [unknown.KINDS[kind](rng, 224) for kind in ("noise", "noise", "shapes", "text", "stars", "chart")]
    told = [detector.score(graph(picture)) >= detector.spec.threshold for picture in strange]
    assert sum(told) >= len(told) - 1, told
    answers = evaluate.ask(road.settings, road.store, graph, road.snapshot.split("test"))
    scores = detector.scores(answers.logits, answers.embeddings)
    assert float((scores >= detector.spec.threshold).mean()) <= 0.15


def serving(found: bundle.Bundle, change: Callable[[np.ndarray], np.ndarray] = lambda p: p) -> Callable[[bytes], Any]:
    """How a server answers; `change` alters the decoded picture."""
    graph = bundle.Graph(found.bytes_of(bundle.MODEL), classes=len(found.manifest.classes))

    def predict(data: bytes) -> dict[str, float]:
        picture = np.ascontiguousarray(change(images.decode(data, size=224, max_pixels=10**8)))
        p = bundle.probabilities(graph(picture).logits, found.manifest.temperature)
        return dict(zip(found.manifest.classes, map(float, p), strict=True))

    return predict


def test_golden_answers_catch_another_resize_channel_order_and_class_order(
    road: Road, champion: registry.Promotion
) -> None:
    import cv2

    sha256 = release.publish(road.settings, road.catalog, road.store, progress=quiet).sha256
    found = bundle.read(road.store, sha256)
    good = bundle.check_golden(found, serving(found))
    assert good.ok and good.max_error < 1e-4

    def bgr(picture: np.ndarray) -> np.ndarray:
        return picture[..., ::-1]

    def nearest(picture: np.ndarray) -> np.ndarray:
        small = cv2.resize(picture, (112, 112), interpolation=cv2.INTER_NEAREST)
        return cv2.resize(small, (224, 224), interpolation=cv2.INTER_NEAREST)

    for wrong in (bgr, nearest):
        assert not bundle.check_golden(found, serving(found, wrong)).ok, wrong.__name__

    def swapped(data: bytes) -> dict[str, float]:
        answer = serving(found)(data)
        return dict(zip(answer, reversed(answer.values()), strict=True))

    assert not bundle.check_golden(found, swapped).ok


def test_39_a_worse_challenger_is_rejected_and_never_a_version(road: Road, champion: registry.Promotion) -> None:
    run_id = challenger(road, lambda kernel: kernel[::-1], reason="trying")
    verdict = evaluate.run(road.settings, road.catalog, road.store, run_id, progress=quiet)
    assert verdict.decision == "reject"
    with pytest.raises(DataError, match="reject"):
        registry.promote(road.settings, road.catalog, run_id)
    assert [one.version for one in registry.list_versions(road.settings, road.catalog)] == [1]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda kernel: kernel * np.nan, "not finite"),
        (lambda kernel: kernel * np.inf, "not finite"),
        (lambda kernel: kernel * 0, "whatever the picture shows"),
    ],
)
def test_38_a_broken_model_ends_in_a_verdict_not_in_a_version(
    road: Road, edit: Callable[[np.ndarray], np.ndarray], words: str
) -> None:
    run_id = challenger(road, edit)
    verdict = evaluate.run(road.settings, road.catalog, road.store, run_id, progress=quiet)
    assert verdict.decision == "reject" and words in verdict.reason
    with pytest.raises(DataError):
        registry.promote(road.settings, road.catalog, run_id)
    assert registry.list_versions(road.settings, road.catalog) == []


@pytest.mark.parametrize("classes", [("dandelion", "grass", "moss"), ("grass", "dandelion")])
def test_37_a_wrong_number_or_order_of_classes_is_rejected(road: Road, classes: tuple[str, ...]) -> None:
    run_id = challenger(road, lambda kernel: kernel, classes=classes)
    verdict = evaluate.run(road.settings, road.catalog, road.store, run_id, progress=quiet)
    assert verdict.decision == "reject", verdict.reason
    assert ("(1, 3)" in verdict.reason) == (len(classes) == 3)


def test_41_an_equal_challenger_needs_a_reason_and_can_be_rolled_back(road: Road, champion: registry.Promotion) -> None:
    settings, catalog, store = road.settings, road.catalog, road.store
    without = challenger(road, lambda kernel: kernel * 1.01)
    verdict = evaluate.run(settings, catalog, store, without, progress=quiet)
    assert verdict.decision == "inconclusive"

    enough = len(road.snapshot.split("test")) >= 59  # fewer cannot show non-inferiority within 5 %
    run_id = challenger(road, lambda kernel: kernel * 1.01, reason="labels reviewed")
    verdict = evaluate.run(settings, catalog, store, run_id, progress=quiet)
    if not enough:
        assert verdict.decision == "inconclusive" and "more labelled" in verdict.reason
        return
    assert verdict.decision == "promote" and "labels reviewed" in verdict.reason
    assert verdict.claim == "not worse"
    promoted = registry.promote(settings, catalog, run_id)
    assert (promoted.version, promoted.previous_version) == (2, 1)
    aliases = {one.version: one.aliases for one in registry.list_versions(settings, catalog)}
    assert aliases == {1: ["previous"], 2: ["champion"]}

    begun = time.monotonic()
    back = registry.rollback(settings, catalog)
    assert time.monotonic() - begun < 10
    assert (back.version, back.previous_version, back.run_id) == (1, 2, road.result.run_id)
    with registry.tracking(settings) as client:
        held = client.get_registered_model(settings.model_name).aliases
    assert {name: int(version) for name, version in held.items()} == {"champion": 1, "previous": 2}
    assert registry.rollback(settings, catalog).version == 2


def test_34_of_two_promotions_at_once_one_wins_and_the_other_is_judged_again(
    road: Road, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, catalog, store = road.settings, road.catalog, road.store
    runs = [road.result.run_id, challenger(road, lambda kernel: kernel * 1.01, reason="race")]
    for run_id in runs:
        assert evaluate.run(settings, catalog, store, run_id, progress=quiet).decision == "promote"
    outcomes: dict[str, object] = {}
    gate = threading.Barrier(2)

    def promote(run_id: str) -> None:
        gate.wait()
        try:
            outcomes[run_id] = registry.promote(settings, Catalog(settings), run_id)
        except Conflict as error:
            outcomes[run_id] = error

    threads = [threading.Thread(target=promote, args=(run_id,)) for run_id in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    lost = [run_id for run_id, outcome in outcomes.items() if isinstance(outcome, Conflict)]
    won = [run_id for run_id, outcome in outcomes.items() if isinstance(outcome, registry.Promotion)]
    assert (len(won), len(lost)) == (1, 1), outcomes
    now = registry.champion(settings, catalog)
    assert now is not None and now.run_id == won[0]
    assert [one.version for one in registry.list_versions(settings, catalog)] == [1]
    monkeypatch.setenv("LAWNWATCH_HOME", str(settings.home))
    monkeypatch.setenv("LAWNWATCH_MODEL_NAME", settings.model_name)
    config.get_settings.cache_clear()
    told = CliRunner().invoke(cli.app, ["model", "promote", "--run", lost[0]])
    assert "Judging the run again" in told.stderr
    verdict = registry.find_verdict(catalog, lost[0])
    assert verdict is not None and verdict.champion_version == 1
    now = registry.champion(settings, catalog)
    assert now is not None and (now.run_id == lost[0]) == (verdict.decision == "promote"), told.output


def test_a_champion_of_another_preprocessing_is_a_reason_by_itself(road: Road, champion: registry.Promotion) -> None:
    """Nobody gave a reason, and the data are the same; but the champion cannot be released any more."""
    if len(road.snapshot.split("test")) < 62:
        pytest.skip("so few test images cannot show non-inferiority")
    run_id = challenger(road, lambda kernel: kernel * 1.01)
    theirs = registry.artifacts(road.settings, road.result.run_id, "model")
    kept = (theirs / "model.json").read_text()
    facts = json.loads(kept)
    facts["preprocessing"]["version"] = 0
    try:
        (theirs / "model.json").write_text(json.dumps(facts))
        registry.seal(theirs)
        verdict = evaluate.run(road.settings, road.catalog, road.store, run_id, progress=quiet)
    finally:
        (theirs / "model.json").write_text(kept)
        registry.seal(theirs)
    assert verdict.decision == "promote" and "another preprocessing" in verdict.reason


def test_a_version_answers_where_it_comes_from_and_what_became_of_a_picture(
    road: Road, champion: registry.Promotion
) -> None:
    settings, catalog, store = road.settings, road.catalog, road.store
    told = versions.lineage(settings, catalog, store, "champion", limit=3)
    assert (told["run_id"], told["snapshot"]) == (road.result.run_id, road.snapshot.id)
    assert len(told["images"]) == 3 and told["image_total"] == len(road.snapshot.rows)
    for split, use in (("train", "trained on it"), ("test", "measured on it")):
        row = road.snapshot.split(split)[0]
        for name in (row.url, row.sha256[:12]):
            back = versions.lineage_of_image(settings, catalog, store, name)
            assert [(one["version"], one["use"]) for one in back["versions"]] == [(1, use)]
            assert back["snapshots"][0]["snapshot"] == road.snapshot.id
    with pytest.raises(NotFound, match="no snapshot holds"):
        versions.lineage_of_image(settings, catalog, store, "https://example.org/never.jpg")
    same = versions.compare(settings, catalog, store, 1, "champion")
    assert same["paired"]["images"] == len(road.snapshot.split("test"))
    assert (same["paired"]["wins"], same["paired"]["losses"]) == (0, 0)


def test_a_version_is_made_again_from_its_record(road: Road, tmp_path: Path) -> None:
    """A small snapshot of the same pictures, without fine-tuning: the answers are the same."""
    small = road.settings.model_copy(
        update={
            "home": tmp_path,
            "database_url": Settings(home=tmp_path).database_url,
            "train": road.settings.train.model_copy(update={"fine_tune_epochs": 0, "seed": 5}),
            "data": road.settings.data.model_copy(update={"min_per_class": 5}),
        }
    )
    catalog = Catalog(small)
    catalog.migrate()
    rows = [row for label in road.snapshot.classes for row in road.snapshot.rows if row.label == label][::4]
    for row in rows:
        catalog.add(row.url, row.label)
    ingest.run(small, catalog, road.store, progress=quiet)
    snapshot = dataset.create_snapshot(small, catalog, road.store)
    run_id = train.run(small, catalog, road.store, progress=quiet).run_id
    floors = dict.fromkeys(("min_accuracy", "min_class_recall", "min_robust_accuracy"), 0.0)
    lax = small.gate.model_copy(update={**floors, "min_test_images": 1, "max_ece": 1.0})
    small = small.model_copy(update={"gate": lax})
    verdict = evaluate.run(small, catalog, road.store, run_id, progress=quiet)
    assert verdict.decision == "promote", verdict.reason
    registry.promote(small, catalog, run_id)
    # Other settings at hand do not matter: the record counts.
    other = small.model_copy(update={"train": small.train.model_copy(update={"seed": 99})})
    told = versions.reproduce(other, catalog, road.store, 1, progress=quiet)
    # Bytes may differ in the last bits: TensorFlow adds in an order that depends on its threads.
    assert told["identical_bytes"] == ("the same bytes" in told["message"])
    assert told["largest_probability_difference"] < 1e-4 and told["run_id"] != run_id
    assert told["differences"] == [] and snapshot.id
    assert [one.version for one in registry.list_versions(small, catalog)] == [1]


def test_35_a_full_disk_ends_the_evaluation_with_a_sentence(road: Road) -> None:
    """Files may grow to 300 kB only; the bank of the unknown score is larger."""
    environment = os.environ | {"LAWNWATCH_HOME": str(road.settings.home), "LAWNWATCH_MODEL_NAME": "full"}
    done = subprocess.run(
        [sys.executable, "-m", "lawnwatch", "evaluate", "--run", road.result.run_id],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
    )
    assert done.returncode == Unavailable.exit_code, done.stderr
    assert "Traceback" not in done.stderr and "Free disk space" in done.stderr
    assert registry.list_versions(road.settings, road.catalog) == []


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


def test_the_same_road_on_a_real_mlflow_server(road: Road, mlflow_server: str) -> None:
    """Artifacts travel over HTTP and come back verified; version, aliases and bundle are the same."""
    settings = road.settings.model_copy(update={"mlflow_tracking_uri": mlflow_server})
    source = registry.artifacts(road.settings, road.result.run_id, "model")
    with registry.tracking(settings) as client:
        run = client.create_run(registry.experiment_id(settings, client), run_name="served")
        client.log_artifacts(run.info.run_id, str(source), "model")
    run_id = run.info.run_id
    assert evaluate.run(settings, road.catalog, road.store, run_id, progress=quiet).decision == "promote"
    assert registry.promote(settings, road.catalog, run_id).version == 1
    published = release.publish(settings, road.catalog, road.store, progress=quiet)
    assert registry.show(settings, road.catalog, "champion").bundle_sha256 == published.sha256
    with registry.tracking(settings) as client:
        assert client.get_run(run_id).data.tags["lawnwatch.decision"] == "promote"
        assert "challenger" not in client.get_registered_model(settings.model_name).aliases


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
