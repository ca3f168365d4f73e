"""What judging, promoting and releasing do when a server goes, the disk fills or the process is killed: a clear end in
bounded time, and the same command again continues from what was done.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lawnwatch import bundle, evaluate, registry, release
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings
from lawnwatch.errors import IntegrityError, LawnwatchError, Unavailable
from lawnwatch.store import open_store
from road import Road, challenger, quiet

pytestmark = pytest.mark.integration

NOBODY_LISTENS = "http://127.0.0.1:9"


def lawnwatch(settings: Settings, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A step as a user starts it, on the same catalog, store and MLflow."""
    given = {
        "LAWNWATCH_HOME": str(settings.home),
        "LAWNWATCH_DATABASE_URL": settings.database_url.get_secret_value(),
        "MLFLOW_TRACKING_URI": settings.mlflow_tracking_uri,
    }
    return subprocess.run(
        [sys.executable, "-m", "lawnwatch", *argv],
        env=os.environ | given,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


def steps(road: Road) -> dict[str, Callable[[], object]]:
    """From a run to a bundle."""
    given = road.settings, road.catalog
    return {
        "evaluate": lambda: evaluate.run(*given, road.store, road.result.run_id, progress=quiet),
        "promote": lambda: registry.promote(*given, road.result.run_id),
        "release": lambda: release.publish(*given, road.store, progress=quiet),
    }


def recorded(road: Road) -> dict[str, Any]:
    """All that a run of these steps leaves behind; what a repetition must not change."""
    return {
        "verdict": registry.find_verdict(road.catalog, road.result.run_id),
        "champion": registry.champion(road.settings, road.catalog),
        "versions": registry.list_versions(road.settings, road.catalog),
        "bundles": sorted(info.key for info in road.store.list("bundles/")),
    }


# --- servers ------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's own patience is a matter of its settings; ours, of how often it is asked."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


def test_30_without_mlflow_every_step_ends_soon_and_says_so_and_goes_on_later(road: Road, impatient: None) -> None:
    down = replace(road, settings=road.settings.model_copy(update={"mlflow_tracking_uri": NOBODY_LISTENS}))
    for name in steps(road):
        begun = time.monotonic()
        with pytest.raises(Unavailable, match=f"MLflow at {re.escape(NOBODY_LISTENS)} does not answer") as told:
            steps(down)[name]()
        assert time.monotonic() - begun < 60
        assert "run the step again" in told.value.hint
        steps(road)[name]()
    assert recorded(road)["versions"][0].bundle_sha256


def test_30_mlflow_lost_after_the_measuring_records_no_verdict(road: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    """The artifacts cannot be written any more; nobody may find a verdict whose report and figures are nowhere."""
    folder = road.settings.home / "mlartifacts"
    gone = road.settings.home / "gone"
    ask = evaluate.ask

    def lose(*given: Any, **options: Any) -> evaluate.Answers:
        if folder.is_dir():
            folder.rename(gone)
            folder.write_text("a file where MLflow wants a folder")
        return ask(*given, **options)

    monkeypatch.setattr(evaluate, "ask", lose)
    with pytest.raises(Unavailable, match="MLflow"):
        steps(road)["evaluate"]()
    assert registry.find_verdict(road.catalog, road.result.run_id) is None
    folder.unlink()
    gone.rename(folder)
    monkeypatch.undo()
    for step in steps(road).values():
        step()
    assert recorded(road)["champion"].version == 1


def test_29_without_the_store_no_step_gets_through_and_each_goes_on_when_it_is_back(
    road: Road, start_minio: Callable[[], Any]
) -> None:
    minio = start_minio()
    given = road.settings.model_dump(include={"home", "weights", "fetch", "gate"})
    settings = Settings(**given | minio.settings("lawn"))
    served = replace(road, settings=settings, store=open_store(settings))
    for info in road.store.list(""):
        served.store.put(info.key, road.store.get(info.key))
    for name in ("evaluate", "release"):
        minio.server.stop(signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(Unavailable):
            steps(served)[name]()
        assert time.monotonic() - begun < 120
        minio.server.start()
        steps(served)[name]()
        if name == "evaluate":
            steps(served)["promote"]()
    done = recorded(served)
    assert done["champion"].version == 1 and len(done["bundles"]) > 1


def test_28_without_the_database_a_promotion_changes_nothing(road: Road, start_mariadb: Callable[[], Any]) -> None:
    verdict = steps(road)["evaluate"]()
    mariadb = start_mariadb()
    settings = Settings(home=road.settings.home, weights=road.settings.weights, database_url=mariadb.fresh())
    catalog = Catalog(settings)
    catalog.migrate()
    registry.record_verdict(catalog, verdict)  # type: ignore[arg-type]
    mariadb.server.stop(signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(Unavailable):
        registry.promote(settings, catalog, road.result.run_id)
    assert time.monotonic() - begun < 60
    with registry.tracking(settings) as client:
        assert client.search_registered_models() == []
    mariadb.server.start()
    assert registry.promote(settings, catalog, road.result.run_id).version == 1


# --- the disk -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fetched", [False, True], ids=["the model is not here yet", "it is"])
def test_35_a_full_disk_ends_the_evaluation_with_a_sentence_and_a_rerun_judges(road: Road, fetched: bool) -> None:
    """Files may grow to 300 kB only; the graph and the statistics of the unknown score are larger."""
    if fetched:
        registry.artifacts(road.settings, road.result.run_id, "model")
    full = lawnwatch(
        road.settings,
        "evaluate",
        "--run",
        road.result.run_id,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
    )
    assert full.returncode == Unavailable.exit_code, full.stderr
    assert "Traceback" not in full.stderr and "Free disk space" in full.stderr
    assert registry.find_verdict(road.catalog, road.result.run_id) is None
    for step in steps(road).values():
        step()
    assert recorded(road)["champion"].version == 1


def test_35_a_full_disk_publishes_no_half_bundle(champion: Road) -> None:
    sha256 = str(registry.show(champion.settings, champion.catalog).bundle_sha256)
    for info in list(champion.store.list("bundles/")):
        champion.store.delete(info.key)
    full = lawnwatch(
        champion.settings,
        "release",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)),
    )
    assert full.returncode == Unavailable.exit_code, full.stderr
    assert "Traceback" not in full.stderr
    assert not [info.key for info in champion.store.list("bundles/") if info.key.endswith(bundle.MANIFEST)]
    again = release.publish(champion.settings, champion.catalog, champion.store, progress=quiet)
    assert bundle.read(champion.store, again.sha256).sha256 == sha256


# --- killed midway ------------------------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys
from lawnwatch import registry
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings

settings = Settings.model_validate_json(sys.argv[1])
catalog = Catalog(settings)

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def after(function):
    def called(*args, **kwargs):
        function(*args, **kwargs)
        kill()
    return called

"""
PROMOTE = "\nregistry.promote(settings, catalog, sys.argv[2])\n"
MOMENTS = {
    "before the version is made": "registry._register = kill",
    "after the version is made": "registry._crown = kill",
    "after the champion's row is written": "registry._set_aliases = kill",
    "after the aliases are set": "registry._set_aliases = after(registry._set_aliases)",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_32_a_promotion_killed_at_any_moment_leaves_the_old_champion_and_is_repeated(
    champion: Road, moment: str
) -> None:
    """The database decides who is champion, and says so at once; MLflow's aliases follow with the repetition."""
    settings, catalog = champion.settings, champion.catalog
    run_id = challenger(champion, reason="killed midway")
    assert evaluate.run(settings, catalog, champion.store, run_id, progress=quiet).decision == "promote"
    program = PROGRAM + MOMENTS[moment] + PROMOTE
    given = settings.model_dump_json(include={"home", "gate"})
    killed = subprocess.run([sys.executable, "-c", program, given, run_id], timeout=120, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    now = registry.champion(settings, catalog)
    assert now is not None and now.version == 1
    assert registry.show(settings, catalog, "champion").version == 1, "a rollout would take the other one"
    assert registry.promote(settings, catalog, run_id).version == 2
    aliases = {one.version: one.aliases for one in registry.list_versions(settings, catalog)}
    assert aliases == {2: ["champion"], 1: ["previous"]}
    with registry.tracking(settings) as client:
        held = client.get_registered_model(settings.model_name).aliases
    assert {name: int(version) for name, version in held.items()} == {"champion": 2, "previous": 1}


# --- bytes that are not what they say ------------------------------------------------------------------------


def test_36_a_flipped_byte_or_a_missing_file_of_a_run_is_refused_and_never_judged(road: Road) -> None:
    (folder,) = (road.settings.home / "mlartifacts").glob(f"**/{road.result.run_id}/artifacts/model")
    for name in ("model.tflite", "calibration.json"):
        kept = (folder / name).read_bytes()
        for broken in (kept[:-1] + bytes([kept[-1] ^ 1]), kept[: len(kept) // 2], None):
            if broken is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(broken)
            with pytest.raises(IntegrityError, match=name.replace(".", r"\.")):
                steps(road)["evaluate"]()
        (folder / name).write_bytes(kept)
    assert registry.find_verdict(road.catalog, road.result.run_id) is None
    assert steps(road)["evaluate"]().decision == "promote"  # type: ignore[attr-defined]


def test_36_a_published_bundle_that_rots_is_refused_by_name_and_published_again(champion: Road) -> None:
    settings, catalog, store = champion.settings, champion.catalog, champion.store
    sha256 = str(registry.show(settings, catalog).bundle_sha256)
    (model,) = [info.key for info in store.list("bundles/") if info.key.endswith(f"/{bundle.MODEL}")]
    data = store.get(model)
    store.put(model, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(IntegrityError, match=r"model\.tflite"):
        release.find(settings, catalog, store)
    said: list[str] = []
    assert release.publish(settings, catalog, store, progress=said.append).sha256 == sha256
    assert any("not intact" in line and "publishing it again" in line for line in said), said
    assert store.get(model) == data


class Sentinel:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "a stranger's code ran"))


@pytest.mark.parametrize("name", ["unknown.npz", "model.tflite"])
def test_40_a_pickle_among_a_runs_files_is_never_opened(road: Road, tmp_path: Path, name: str) -> None:
    """Sealed with good hashes, as somebody who may write to MLflow could; it must not run where models are judged."""
    import pickle

    sentinel = tmp_path / "sentinel"

    def plant(folder: Path, _facts: dict[str, Any]) -> None:
        if name == "unknown.npz":
            np.savez(folder / name, means=np.array([Sentinel(sentinel)], dtype=object))
        else:
            (folder / name).write_bytes(pickle.dumps(Sentinel(sentinel)))

    run_id = challenger(road, change=plant)
    try:
        verdict = evaluate.run(road.settings, road.catalog, road.store, run_id, progress=quiet)
        decision = verdict.decision
    except LawnwatchError as error:
        decision = error.code
    assert decision in ("reject", IntegrityError.code), decision
    assert not sentinel.exists()
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert registry.list_versions(road.settings, road.catalog) == []
