"""Judging, promoting, rolling back and asking where a version comes from: on a model trained from real pictures, with
real MLflow in the embedded mode, and on real servers where they matter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from lawnwatch import bundle, cli, config, dataset, evaluate, images, ingest, registry, release, train, versions
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings
from lawnwatch.errors import Conflict, DataError, NotFound
from lawnwatch.sketch import Sketch
from lawnwatch.train.export import SMALL
from processes import Server, answers, free_port
from road import Road, challenger, floor_variables, quiet

pytestmark = pytest.mark.integration


def judged(road: Road, run_id: str = "") -> registry.Verdict:
    return evaluate.run(road.settings, road.catalog, road.store, run_id or road.result.run_id, progress=quiet)


# --- a first champion ---------------------------------------------------------------------------------------


def test_the_test_split_is_measured_on_the_served_graph(road: Road, weights: str) -> None:
    road.settings = road.settings.model_copy(update={"public_url": "https://lawn.example.org/"})
    verdict = judged(road)
    found = verdict.evaluation
    assert verdict.decision == "promote", verdict.reason
    assert verdict.report_url == f"https://lawn.example.org/reports/evaluation/{road.result.run_id}"
    assert found["images"] == len(road.snapshot.split("test"))
    assert np.array(found["confusion"]["matrix"]).sum() == found["images"]
    if weights != "none" and not road.snapshot.samples and len(road.snapshot.rows) >= 390:
        assert found["metrics"]["accuracy"]["value"] >= 0.93
    again = judged(road)
    assert (again.created_at, again.decision) == (verdict.created_at, "promote")
    assert {one["status"] for one in again.checks} == {"passed"} and again.claim == "floors"
    assert again.thresholds == road.settings.gate.model_dump()
    assert set(found["robustness"]["altered"]) == set(evaluate.ALTERATIONS)
    assert {one["division"] for one in found["slices"]} == {
        "shorter side", "brightness", "sharpness", "source host", "label source",
    }  # fmt: skip


def test_the_verdict_and_the_report_are_on_the_run_and_in_the_store(champion: Road) -> None:
    run_id = champion.result.run_id
    verdict = judged(champion)
    page = champion.store.get(evaluate.report_key(run_id))
    kept = registry.artifacts(champion.settings, run_id, "evaluation") / "report.html"
    assert kept.read_bytes() == page
    assert verdict.report_url.endswith(f"/reports/evaluation/{run_id}")
    assert len(page) < 3_000_000
    text = page.decode()
    assert verdict.reason in text and "what speaks for" in text  # the class activation maps are there
    assert not re.findall(r"""<(?:script|link rel="stylesheet)|src="(?!data:)|url\(""", text), "it loads something"
    with registry.tracking(champion.settings) as client:
        run = client.get_run(run_id)
    assert (run.data.tags["lawnwatch.decision"], run.data.tags["lawnwatch.claim"]) == ("promote", "floors")
    described = run.data.tags["mlflow.note.content"]
    assert "validation accuracy" in described, "what training said of the run is gone"
    assert described.count("**Verdict: promote.**") == 1 and f"]({verdict.report_url})" in described
    assert run.data.metrics["test_accuracy"] == verdict.evaluation["metrics"]["accuracy"]["value"]


def test_a_graph_without_a_map_only_leaves_the_overlays_out(road: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = bundle.Graph.__call__
    monkeypatch.setattr(bundle.Graph, "__call__", lambda self, image: ask(self, image)._replace(cam=None))
    judged(road)
    assert "what speaks for" not in road.store.get(evaluate.report_key(road.result.run_id)).decode()


def test_a_promoted_model_is_published_and_every_step_repeats_without_change(champion: Road) -> None:
    settings, catalog, store = champion.settings, champion.catalog, champion.store
    sha256 = registry.show(settings, catalog).bundle_sha256
    found = bundle.read(store, str(sha256))
    assert found.manifest.lineage.snapshot == champion.snapshot.id
    assert found.manifest.lineage.run_id == champion.result.run_id
    assert found.manifest.evaluation["verdict"]["decision"] == "promote"  # type: ignore[index,call-overload]
    assert Sketch.from_bytes(found.bytes_of(bundle.SKETCH)).count == len(champion.snapshot.split("train"))
    assert "## Limits" in found.bytes_of(bundle.MODEL_CARD).decode()

    again = release.publish(settings, catalog, store, progress=quiet)
    assert (again.sha256, again.created) == (sha256, False)
    assert release.find(settings, catalog, store, "champion").sha256 == sha256
    assert not registry.promote(settings, catalog, champion.result.run_id).changed
    checked = train.check(settings, catalog, store)
    assert checked.unchanged and "champion is v1" in checked.message
    repeated = train.run(settings, catalog, store, progress=quiet)
    assert (repeated.run_id, repeated.unchanged) == (champion.result.run_id, True)
    assert len(registry.list_versions(settings, catalog)) == 1
    assert not train.check(settings, catalog, store, force=True, reason="labels reviewed").unchanged


def test_a_bundle_tells_nobody_where_its_pictures_came_from(champion: Road) -> None:
    """Its evaluation is what /model/info answers to everybody; the report and MLflow keep the slices by host."""
    found = bundle.read(champion.store, str(registry.show(champion.settings, champion.catalog).bundle_sha256))
    divisions = {one["division"] for one in found.manifest.evaluation["slices"]}  # type: ignore[index,union-attr,call-overload]
    assert divisions == {"shorter side", "brightness", "sharpness", "label source"}
    hosts = {row.url.split("/")[2].split(":")[0] for row in champion.snapshot.rows}
    said = found.manifest.model_dump_json() + found.bytes_of(bundle.MODEL_CARD).decode()
    told = {host for host in hosts if host in said.replace(champion.settings.api_url, "")}
    assert told == set()


def test_both_graphs_travel_and_the_served_one_is_not_worse(champion: Road, weights: str) -> None:
    found = bundle.read(champion.store, str(registry.show(champion.settings, champion.catalog).bundle_sha256))
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
    policy = champion.settings.gate
    assert variants[found.manifest.served].accuracy_change >= -policy.variant_loss
    rows = champion.snapshot.split("test")[:20]
    said = {}
    for name, graph in graphs.items():
        answers = evaluate.ask(champion.settings, champion.store, graph, rows)
        said[name] = bundle.probabilities(answers.logits, found.manifest.temperature)
        assert graph(np.zeros((224, 224, 3), np.uint8)).cam is not None
    for name in said:
        assert float(np.abs(said[name] - said["float32"]).mean()) < 0.1, name


def test_a_reduced_graph_that_costs_accuracy_or_gains_no_time_is_rejected(road: Road) -> None:
    """Training chooses the graph by the same rule; the gate does not take its word for the choice."""

    def worse(_folder: Path, facts: dict[str, Any]) -> None:
        facts["variants"][facts["served"]] |= {"arithmetic": "int8", "images": 320, "accuracy_change": -0.02}
        facts["variants"][facts["served"]] |= {"speedup": 1.6, "passed": True}

    verdict = judged(road, challenger(road, change=worse))
    assert verdict.decision == "reject"
    assert "-2.0% against float32 Keras on 320 held-out images (-0.5% is allowed)" in verdict.reason


def serving(found: bundle.Bundle, change: Callable[[np.ndarray], np.ndarray] = lambda p: p) -> Callable[[bytes], Any]:
    """How a server answers; `change` alters the decoded picture."""
    graph = bundle.Graph(found.bytes_of(bundle.MODEL), classes=len(found.manifest.classes))

    def predict(data: bytes) -> dict[str, float]:
        picture = np.ascontiguousarray(change(images.decode(data, size=graph.size, max_pixels=10**8)))
        p = bundle.probabilities(graph(picture).logits, found.manifest.temperature)
        return dict(zip(found.manifest.classes, map(float, p), strict=True))

    return predict


def test_golden_answers_catch_another_resize_channel_order_and_class_order(
    champion: Road, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cv2

    found = bundle.read(champion.store, str(registry.show(champion.settings, champion.catalog).bundle_sha256))
    good = bundle.check_golden(found, serving(found))
    assert good.ok and good.max_error < 1e-4

    def bgr(picture: np.ndarray) -> np.ndarray:
        return picture[..., ::-1]

    def nearest(picture: np.ndarray) -> np.ndarray:
        size = len(picture)
        small = cv2.resize(picture, (size // 2, size // 2), interpolation=cv2.INTER_NEAREST)
        return cv2.resize(small, (size, size), interpolation=cv2.INTER_NEAREST)

    for wrong in (bgr, nearest):
        assert not bundle.check_golden(found, serving(found, wrong)).ok, wrong.__name__

    def swapped(data: bytes) -> dict[str, float]:
        answer = serving(found)(data)
        return dict(zip(answer, reversed(answer.values()), strict=True))

    assert not bundle.check_golden(found, swapped).ok

    if weights == "none":  # a network that has learned nothing may not mind
        return
    # The branch that pictures from phones take, which pictures from the web are too small for.
    for filter_of_shrinking in (cv2.INTER_NEAREST, cv2.INTER_LINEAR):
        monkeypatch.setattr(cv2, "INTER_AREA", filter_of_shrinking)
        report = bundle.check_golden(found, serving(found))
        assert not report.ok and report.worst == "golden/phone.jpg"
    monkeypatch.undo()
    monkeypatch.setattr(images, "TURNS", {})
    assert bundle.check_golden(found, serving(found)).worst == "golden/phone.jpg"


# --- challengers --------------------------------------------------------------------------------------------


def test_39_a_worse_challenger_is_rejected_and_never_a_version(champion: Road) -> None:
    run_id = challenger(champion, lambda kernel: kernel[::-1], reason="trying")
    assert judged(champion, run_id).decision == "reject"
    for step in (registry.promote, registry.register):
        with pytest.raises(DataError, match="reject"):
            step(champion.settings, champion.catalog, run_id)
    assert [one.version for one in registry.list_versions(champion.settings, champion.catalog)] == [1]


def test_a_challenger_that_calls_everything_unknown_is_rejected(champion: Road) -> None:
    """Its classes are as right as ever; nobody would be told them."""

    def nothing_passes(folder: Path, _facts: dict[str, Any]) -> None:
        calibration = json.loads((folder / "calibration.json").read_text())
        calibration["unknown"]["threshold"] = -1e6
        (folder / "calibration.json").write_text(json.dumps(calibration))

    run_id = challenger(champion, reason="new data", change=nothing_passes)
    verdict = judged(champion, run_id)
    assert verdict.evaluation["called_unknown"]["value"] == 1.0
    assert [one["name"] for one in verdict.checks if one["status"] != "passed"] == ["unknown"]
    assert verdict.decision == "reject" and "calls 100.0% of the test images unknown" in verdict.reason
    with pytest.raises(DataError, match="reject"):
        registry.promote(champion.settings, champion.catalog, run_id)


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
    verdict = judged(road, run_id)
    assert verdict.decision == "reject" and words in verdict.reason
    with pytest.raises(DataError):
        registry.promote(road.settings, road.catalog, run_id)
    assert registry.list_versions(road.settings, road.catalog) == []


@pytest.mark.parametrize("classes", [["dandelion", "grass", "moss"], ["grass", "dandelion"]])
def test_37_a_wrong_number_or_order_of_classes_is_rejected(road: Road, classes: list[str]) -> None:
    run_id = challenger(road, change=lambda _, facts: facts.update(classes=classes))
    verdict = judged(road, run_id)
    assert verdict.decision == "reject", verdict.reason
    assert ("(1, 3)" in verdict.reason) == (len(classes) == 3)


def test_41_an_equal_challenger_needs_a_reason_and_can_be_rolled_back(champion: Road) -> None:
    settings, catalog = champion.settings, champion.catalog
    verdict = judged(champion, challenger(champion))
    assert verdict.decision == "inconclusive"

    enough = len(champion.snapshot.split("test")) >= 62  # fewer cannot show non-inferiority within 5 %
    run_id = challenger(champion, reason="labels reviewed")
    verdict = judged(champion, run_id)
    if not enough:
        assert verdict.decision == "inconclusive" and "more labelled" in verdict.reason
        return
    assert verdict.decision == "promote" and "labels reviewed" in verdict.reason
    assert verdict.claim == "not worse"
    registered = registry.register(settings, catalog, run_id)
    assert (registered.version, registered.aliases) == (2, ["challenger"])
    promoted = registry.promote(settings, catalog, run_id)
    assert (promoted.version, promoted.previous_version) == (2, 1)
    aliases = {one.version: one.aliases for one in registry.list_versions(settings, catalog)}
    assert aliases == {1: ["previous"], 2: ["champion"]}

    begun = time.monotonic()
    back = registry.rollback(settings, catalog)
    assert time.monotonic() - begun < 10
    assert (back.version, back.previous_version, back.run_id) == (1, 2, champion.result.run_id)
    with registry.tracking(settings) as client:
        held = client.get_registered_model(settings.model_name).aliases
    assert {name: int(version) for name, version in held.items()} == {"champion": 1, "previous": 2}
    assert registry.rollback(settings, catalog).version == 2


def test_a_verdict_holds_only_against_the_champion_it_compared_with(champion: Road) -> None:
    """Promoted, rolled back, promoted: each time the verdict against the champion of that moment decides."""
    settings, catalog = champion.settings, champion.catalog
    first, second = (challenger(champion, reason=why) for why in ("one", "two"))
    assert {judged(champion, run_id).decision for run_id in (first, second)} == {"promote"}
    registry.promote(settings, catalog, first)
    for step in (registry.promote, registry.register):
        with pytest.raises(Conflict, match="another champion than version 2"):
            step(settings, catalog, second)
    judged(champion, second)  # the newest verdict on it is now the one against version 2
    registry.rollback(settings, catalog)
    assert registry.promote(settings, catalog, second).previous_version == 1


def test_41_a_rollback_is_not_undone_by_the_next_scheduled_run(champion: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data are still those of the model that was rolled back, and the verdict on it still says promote."""
    settings, catalog, store = champion.settings, champion.catalog, champion.store
    seeded = settings.model_copy(update={"train": settings.train.model_copy(update={"seed": 18})})
    training = train.check(seeded, catalog, store).fingerprint
    same, again = (
        challenger(champion, reason=why, change=lambda _, facts: facts.update(fingerprint=training))
        for why in ("new season", "trained once more")
    )
    verdicts = [judged(champion, run_id) for run_id in (same, again)]
    assert verdicts[0].decision == "promote", verdicts[0].reason
    assert registry.promote(settings, catalog, same).version == 2
    registry.rollback(settings, catalog)

    checked = train.check(seeded, catalog, store)
    assert (checked.unchanged, checked.candidates) == (True, [])
    assert "version 2 was rolled back" in checked.message and f"--run {same} --again" in checked.message
    repeated = train.run(seeded, catalog, store, progress=quiet)
    assert (repeated.run_id, repeated.unchanged) == (champion.result.run_id, True)
    assert train.check(seeded, catalog, store, force=True, reason="asked for").candidates
    for run_id in (same, again):
        for step in (registry.promote, registry.register):
            with pytest.raises(DataError, match="version 2 was rolled back"):
                step(settings, catalog, run_id)
    assert registry.champion(settings, catalog).run_id == champion.result.run_id  # type: ignore[union-attr]

    for name, value in {"LAWNWATCH_HOME": str(settings.home), **floor_variables(settings.weights)}.items():
        monkeypatch.setenv(name, value)
    config.get_settings.cache_clear()
    promote = ["model", "promote", "--run", same]
    refused = CliRunner().invoke(cli.app, promote).exception
    assert isinstance(refused, DataError) and f"--run {same} --again REASON" in refused.hint
    wished = CliRunner().invoke(cli.app, [*promote, "--again", "the camera was at fault"])
    assert wished.exit_code == 0, wished.output
    assert json.loads(wished.stdout)["version"] == 2 and "the camera was at fault" in wished.stdout
    assert registry.rolled_back(settings, catalog, training) is None
    registry.rollback(settings, catalog)
    registry.rollback(settings, catalog)  # a person took the rollback back
    assert registry.rolled_back(settings, catalog, training) is None


def test_a_verdict_holds_only_under_the_policy_it_was_reached_by(road: Road) -> None:
    loose, run_id = road.settings, road.result.run_id
    strict = loose.model_copy(update={"gate": loose.gate.model_copy(update={"max_model_bytes": 1000})})
    assert judged(road).decision == "promote"
    for step in (registry.promote, registry.register):
        with pytest.raises(Conflict, match="another policy"):
            step(strict, road.catalog, run_id)
    assert evaluate.run(strict, road.catalog, road.store, run_id, progress=quiet).decision == "reject"
    for step in (registry.promote, registry.register):
        with pytest.raises(DataError, match="its verdict is reject"):
            step(strict, road.catalog, run_id)
    assert registry.list_versions(strict, road.catalog) == []
    assert registry.promote(loose, road.catalog, run_id).version == 1


@pytest.mark.parametrize("database", ["embedded", "mariadb"])
def test_34_of_two_promotions_at_once_one_wins_and_the_other_is_judged_again(
    road: Road, database: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, catalog = road.settings, road.catalog
    runs = [road.result.run_id, challenger(road, reason="race")]
    verdicts = [judged(road, run_id) for run_id in runs]
    assert [verdict.decision for verdict in verdicts] == ["promote", "promote"]
    if database == "mariadb":
        url = request.getfixturevalue("mariadb")
        settings = Settings(home=settings.home, weights=settings.weights, gate=settings.gate, database_url=url)
        catalog = Catalog(settings)
        catalog.migrate()
        for verdict in verdicts:
            assert registry.record_verdict(catalog, verdict).evaluation == verdict.evaluation
    outcomes: dict[str, object] = {}
    together = threading.Barrier(2)

    def promote(run_id: str) -> None:
        mine = Catalog(settings)
        together.wait()
        try:
            outcomes[run_id] = registry.promote(settings, mine, run_id)
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
    assert [one.version for one in registry.list_versions(settings, catalog) if "champion" in one.aliases] == [
        now.version
    ]
    if database == "mariadb":
        return  # its catalog holds no snapshot to judge on
    monkeypatch.setenv("LAWNWATCH_HOME", str(settings.home))
    config.get_settings.cache_clear()
    told = CliRunner().invoke(cli.app, ["model", "promote", "--run", lost[0]])
    assert "Judging the run again" in told.stderr
    verdict = registry.find_verdict(catalog, lost[0])
    assert verdict is not None and verdict.champion_version == now.version, told.output
    after = registry.champion(settings, catalog)
    assert after is not None and (after.run_id == lost[0]) == (verdict.decision == "promote"), told.output


def test_a_champion_of_another_preprocessing_is_a_reason_by_itself(champion: Road) -> None:
    """Nobody gave a reason, and the data are the same; but the champion cannot be released any more."""
    run_id = challenger(champion)
    theirs = registry.artifacts(champion.settings, champion.result.run_id, "model")
    facts = json.loads((theirs / "model.json").read_text())
    facts["preprocessing"]["version"] = 0
    (theirs / "model.json").write_text(json.dumps(facts))
    registry.seal(theirs)
    verdict = judged(champion, run_id)
    assert verdict.decision == "promote" and "another preprocessing" in verdict.reason


# --- questions about versions -------------------------------------------------------------------------------


def test_a_version_answers_where_it_comes_from_and_what_became_of_a_picture(champion: Road) -> None:
    settings, catalog, store = champion.settings, champion.catalog, champion.store
    told = versions.lineage(settings, catalog, store, "champion", limit=3)
    assert (told["run_id"], told["snapshot"]) == (champion.result.run_id, champion.snapshot.id)
    assert len(told["images"]) == 3 and told["image_total"] == len(champion.snapshot.rows)
    for split, use in (("train", "trained on it"), ("test", "measured on it")):
        row = champion.snapshot.split(split)[0]
        for name in (row.url, row.sha256[:12]):
            back = versions.lineage_of_image(settings, catalog, store, name)
            assert [(one["version"], one["use"]) for one in back["versions"]] == [(1, use)]
            assert back["snapshots"][0]["snapshot"] == champion.snapshot.id
    with pytest.raises(NotFound, match="no snapshot holds"):
        versions.lineage_of_image(settings, catalog, store, "https://example.org/never.jpg")
    same = versions.compare(settings, catalog, store, 1, "champion")
    assert same["paired"]["images"] == len(champion.snapshot.split("test"))
    assert (same["paired"]["wins"], same["paired"]["losses"]) == (0, 0)


def test_a_version_is_made_again_from_its_record(trained: Road, tmp_path: Path) -> None:
    """A small snapshot of the same pictures, without fine-tuning: the answers are the same."""
    small = Settings(
        home=tmp_path / "small",
        weights=trained.settings.weights,
        fetch=trained.settings.fetch,
        train={"fine_tune_epochs": 0, "seed": 5},  # type: ignore[arg-type]
        data={"min_per_class": 5},  # type: ignore[arg-type]
    )
    catalog, store = Catalog(small), trained.store
    catalog.migrate()
    rows = [row for label in trained.snapshot.classes for row in trained.snapshot.rows if row.label == label][::4]
    for row in rows:
        catalog.add(row.url, row.label)
    ingest.run(small, catalog, store, progress=quiet)
    dataset.create_snapshot(small, catalog, store)
    run_id = train.run(small, catalog, store, progress=quiet).run_id
    floors = dict.fromkeys(("min_accuracy", "min_class_recall", "min_robust_accuracy"), 0.0)
    loose = {"min_test_images": 1, "max_ece": 1.0, "variant_loss": 0.9}
    small = small.model_copy(update={"gate": small.gate.model_copy(update=floors | loose)})
    verdict = evaluate.run(small, catalog, store, run_id, progress=quiet)
    assert verdict.decision == "promote", verdict.reason
    registry.promote(small, catalog, run_id)
    # Other settings at hand do not matter: the record counts.
    other = small.model_copy(update={"train": small.train.model_copy(update={"seed": 99})})
    told = versions.reproduce(other, catalog, store, 1, progress=quiet)
    # Bytes may differ in the last bits: TensorFlow adds in an order that depends on its threads.
    first, second = (
        (registry.artifacts(small, one, "model") / bundle.MODEL).read_bytes() for one in (run_id, told["run_id"])
    )
    assert told["identical_bytes"] == (first == second)
    assert told["largest_probability_difference"] < 1e-4 and told["run_id"] != run_id
    assert told["differences"] == []
    assert [one.version for one in registry.list_versions(small, catalog)] == [1]


def test_the_same_road_on_a_real_mlflow_server(road: Road, mlflow_server: str) -> None:
    """Artifacts travel over HTTP and come back verified; version, aliases and bundle are the same."""
    settings = road.settings.model_copy(update={"mlflow_tracking_uri": mlflow_server, "model_name": "on-a-server"})
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


# --- what is neither, over HTTP -----------------------------------------------------------------------------

# Of scikit-image's pictures all photographs, scans and drawings that show no plant; `grass` is one.
NO_PLANT = (
    "astronaut", "brick", "camera", "cell", "chelsea", "chessboard_GRAY", "chessboard_RGB", "clock_motion", "coffee",
    "coins", "color", "gravel", "horse", "hubble_deep_field", "ihc", "logo", "microaneurysms", "moon",
    "motorcycle_left", "page", "phantom", "retina", "rocket", "text",
)  # fmt: skip


def strange_pictures() -> dict[str, bytes]:
    """Photographs of no plant, and made pictures of kinds that training does not make."""
    import io

    import skimage
    from PIL import Image
    from sklearn.datasets import load_sample_image

    folder = Path(skimage.__file__).parent / "data"
    files = {path.stem: path for path in folder.iterdir() if path.suffix in (".png", ".jpg")}
    y, x = np.mgrid[:240, :320]
    rings = np.stack([127 + 127 * np.sin(np.hypot(x - 160, y - 120) / period) for period in (5, 7, 9)], axis=-1)
    code = np.repeat(np.repeat(np.random.default_rng(5).integers(0, 2, (30, 40, 1)) * 255, 8, 0), 8, 1)
    drawn = {
        "china": np.asarray(load_sample_image("china.jpg")),
        "rings": rings.astype(np.uint8),
        "a printed code": np.broadcast_to(code, (240, 320, 3)).astype(np.uint8),
    }
    pictures = {name: files[name].read_bytes() for name in NO_PLANT}
    for name, pixels in drawn.items():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        pictures[name] = buffer.getvalue()
    return pictures


def test_what_is_no_plant_is_unknown_over_http_and_its_probabilities_are_still_there(
    champion: Road, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = os.environ | {
        "LAWNWATCH_HOME": str(champion.settings.home),
        "LAWNWATCH_API_URL": url,
        "LAWNWATCH_SERVING__PORT": str(port),
    }
    lawnwatch = [sys.executable, "-m", "lawnwatch"]
    api = Server([*lawnwatch, "serve"], partial(answers, f"{url}/health"), tmp_path / "api.log", env).start()
    try:
        done = subprocess.run([*lawnwatch, "rollout", "start"], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

        def ask(data: bytes) -> dict[str, Any]:
            answer = httpx.post(f"{url}/predict", files={"file": data}, timeout=60)
            assert answer.status_code == 200, answer.text
            return dict(answer.json())

        strange = {name: ask(data) for name, data in strange_pictures().items()}
        rows = champion.snapshot.split("test")
        known = [ask(champion.store.get(row.object_key)) for row in rows]
    finally:
        api.stop()
    for answer in (*strange.values(), *known):
        assert set(answer["probabilities"]) == set(champion.snapshot.classes)
        assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    assert sum(answer["label"] == "unknown" for answer in known) <= 0.15 * len(known)
    missed = [name for name, answer in strange.items() if answer["label"] != "unknown"]
    assert len(missed) <= 0.15 * len(strange), missed
    inside, outside = ([one["unknown_score"] for one in some] for some in (known, strange.values()))
    auroc = np.mean([[float(s > k) + 0.5 * (s == k) for k in inside] for s in outside])
    record_property("auroc", float(auroc))
    record_property("missed", missed)
    assert auroc >= 0.95, missed
