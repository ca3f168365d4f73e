"""Fixtures of the tests that ask a running API, and a migrated database for those that run Airflow."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import serving_bundle as sb
from api_process import Api
from road import floor_variables

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs of `serving_bundle`, made once."""
    return sb.build_graphs(tmp_path_factory.mktemp("graphs"))


@pytest.fixture
def start(tmp_path: Path, graphs: Path) -> Iterator[Callable[..., Api]]:
    """Start an API with a bundle (unless bundle=False) and the given LAWNWATCH_* settings."""
    started: list[Api] = []

    def begin(
        *, bundle: bool = True, graph: str = "good", home: Path | None = None, ready: bool = True, **env: str
    ) -> Api:
        api = Api(home or tmp_path / "home", tmp_path / f"log{len(started)}", env)
        if bundle:
            api.point_at(sb.publish(api.store, graphs, graph=graph))
        started.append(api)
        return api.start(ready=ready and (bundle or home is not None))

    yield begin
    for api in started:
        if api.process is not None and api.process.poll() is None:
            api.process.kill()
            api.process.wait()


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, graphs: Path) -> Iterator[Api]:
    """One API that the tests share which do not break it."""
    folder = tmp_path_factory.mktemp("api")
    api = Api(folder / "home", folder / "log")
    api.point_at(sb.publish(api.store, graphs))
    api.start()
    yield api
    assert api.stop() == 0, api.log_text()[-3000:]
    assert "Traceback" not in api.log_text(), api.log_text()[-3000:]


@pytest.fixture(scope="session")
def airflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Airflow home whose database is migrated; copied, for migrating takes 12 s."""
    home = tmp_path_factory.mktemp("airflow-home")
    subprocess.run(
        [sys.executable, "-m", "airflow", "db", "migrate"],
        env=os.environ | {"AIRFLOW_HOME": str(home), "AIRFLOW__CORE__LOAD_EXAMPLES": "false"},
        check=True,
        capture_output=True,
        timeout=180,
    )
    return home / "airflow.db"


@pytest.fixture
def airflow_env(airflow_database: Path, weights: str, tmp_path: Path) -> dict[str, str]:
    """The environment of an Airflow home of the test's own that runs this project's DAGs."""
    home = tmp_path / "airflow"
    home.mkdir()
    shutil.copy(airflow_database, home)
    return os.environ | {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "LAWNWATCH_WEIGHTS": weights,
        "NO_COLOR": "1",
        **floor_variables(weights),
    }
