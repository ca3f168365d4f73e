"""The platform as `docker compose up` brings it: the three pipelines, a person at the page, down and up again.

`make images`, then `make test-compose`. The tests are one story and run in order. Services whose images are not on this
machine are left out. LAWNWATCH_TEST_WEIGHTS_FILE is a file of MobileNetV2 weights; without one the network starts at
random.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import reference_catalog
from airflow_rest import Airflow
from cluster import ROOT, until
from processes import free_port

pytestmark = [pytest.mark.compose, pytest.mark.timeout(1800)]

# A web of our own beside the platform: the photographs under the URLs of the reference catalog.
WORLD = """
services:
  world:
    image: {registry}/webapp:{version}
    entrypoint: [python, -m, http.server, "8080", --directory, /photos]
    healthcheck: {{disable: true}}
    profiles: [core]
    volumes: ["{photos}:/photos:ro"]
  airflow-scheduler:
    volumes: ["{weights}:/weights:ro"]
    # Where a MariaDB stands in for MySQL: it refuses Airflow's DELETE with a WITH, which runs at this interval.
    environment: {{AIRFLOW__SCHEDULER__PARSING_CLEANUP_INTERVAL: "86400"}}
"""


@dataclass
class Stack:
    """One compose project in a folder of its own."""

    folder: Path
    ports: dict[str, int]

    def compose(self, *argv: str, stdin: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["docker", "compose", "-p", "lawnwatch-test", "-f", "compose.yaml", "-f", "world.yaml", *argv],
            cwd=self.folder, input=stdin, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done

    def services(self) -> list[str]:
        """Those whose image is on this machine."""
        found = json.loads(self.compose("config", "--format=json").stdout)["services"]
        return [
            name
            for name, service in found.items()
            if subprocess.run(["docker", "image", "inspect", service["image"]], capture_output=True).returncode == 0
        ]

    def up(self) -> None:
        """Start everything, and wait until API, page and Airflow answer."""
        self.compose("up", "--detach", *self.services())
        until("Airflow is well", 300, lambda: self.airflow().healthy() or None)
        until("the page answers", 120, lambda: httpx.get(self.url("WEB_PORT") + "/_stcore/health").is_success or None)
        until("the API answers", 120, lambda: self.get("/health"))

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    def get(self, path: str) -> Any:
        return httpx.get(self.url("API_PORT") + path, timeout=20).raise_for_status().json()

    def lawnwatch(self, *argv: str) -> Any:
        return json.loads(self.compose("exec", "-T", "airflow-scheduler", "lawnwatch", *argv).stdout)

    def password(self, name: str) -> str:
        lines = (self.folder / ".env").read_text().splitlines()
        return next(line.partition("=")[2] for line in lines if line.startswith(name + "="))

    def airflow(self) -> Airflow:
        return Airflow(self.url("AIRFLOW_PORT"), "admin", self.password("AIRFLOW_ADMIN_PASSWORD"))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Iterator[Stack]:
    """The compose file in a folder of its own, with fresh passwords; nothing is started."""
    folder = tmp_path_factory.mktemp("compose")
    for name in ("compose.yaml", ".env.example"):
        shutil.copy(ROOT / name, folder)
    for name in ("monitoring", "infra"):
        shutil.copytree(ROOT / name, folder / name)
    weights = os.environ.get("LAWNWATCH_TEST_WEIGHTS_FILE")
    parts = ("API", "WEB", "AIRFLOW", "MLFLOW", "MINIO", "PROMETHEUS", "ALERTMANAGER", "GRAFANA")
    stack = Stack(folder, {f"{part}_PORT": free_port() for part in parts})
    registry, version = os.environ.get("LAWNWATCH_TEST_REGISTRY", "lawnwatch"), "0.1.0"
    (folder / "world.yaml").write_text(
        WORLD.format(
            registry=registry, version=version, photos=photos, weights=Path(weights).parent if weights else folder
        )
    )
    yield stack
    stack.compose("down", "--volumes", "--timeout=5", check=False)


def test_49_without_passwords_it_says_what_makes_them(stack: Stack) -> None:
    refused = stack.compose("config", check=False)
    assert refused.returncode != 0
    assert "run make secrets" in refused.stderr


def test_it_comes_up_and_the_api_says_that_there_is_no_model_yet(stack: Stack) -> None:
    subprocess.run([sys.executable, str(stack.folder / "infra/make_secrets.py")], check=True, capture_output=True)
    weights = os.environ.get("LAWNWATCH_TEST_WEIGHTS_FILE")
    settings = {
        **{name: str(port) for name, port in stack.ports.items()},
        "REGISTRY": os.environ.get("LAWNWATCH_TEST_REGISTRY", "lawnwatch"),
        "ENVIRONMENT": "development",
        "WEIGHTS": f"/weights/{Path(weights).name}" if weights else "none",
        "FETCH_ALLOW_CIDRS": '["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"]',
        "FETCH_ORIGIN_MAP": json.dumps({reference_catalog.ORIGIN: "http://world:8080/"}),
    }
    lines = [
        line for line in (stack.folder / ".env").read_text().splitlines() if line.partition("=")[0] not in settings
    ]
    lines += [f"{name}='{value}'" for name, value in settings.items()]
    (stack.folder / ".env").write_text("\n".join(lines) + "\n")
    begun = time.monotonic()
    stack.up()
    sys.stdout.write(f"\n  seconds until everything answers: {time.monotonic() - begun:.0f}\n")
    assert stack.get("/model/info")["state"] == "no_model"


def test_the_three_pipelines_make_a_model_that_serves(stack: Stack, tmp_path: Path) -> None:
    urls = tmp_path / "urls.csv"
    reference_catalog.write(urls, reference_catalog.records(per_label=200))
    stack.compose("exec", "-T", "airflow-scheduler", "sh", "-c",
                  "cat > /tmp/urls.csv && lawnwatch catalog import /tmp/urls.csv", stdin=urls.read_text())  # fmt: skip
    airflow = stack.airflow()
    until("the pipelines are parsed", 180, lambda: airflow.has("data_pipeline") or None)
    airflow.trigger("data_pipeline")
    for dag, seconds in (("data_pipeline", 600), ("training_pipeline", 1200), ("inference_pipeline", 300)):
        run = until(f"a run of {dag}", 180, lambda dag=dag: next(iter(airflow.runs(dag)), None))
        ended = until(
            f"{dag} ends", seconds,
            lambda dag=dag, run=run: next((s for s in [airflow.state(dag, run)] if s in ("success", "failed")), None),
        )  # fmt: skip
        assert ended == "success", [(task.name, task.state) for task in airflow.tasks(dag, run)]
    info = stack.get("/model/info")
    assert (info["state"], info["model"]["version"]) == ("ready", 1)


def test_a_person_at_the_page(stack: Stack) -> None:
    """The tests of test_browser.py, against this API and this page."""
    env = os.environ | {
        "LAWNWATCH_TEST_API_URL": stack.url("API_PORT"),
        "LAWNWATCH_TEST_PAGE_URL": stack.url("WEB_PORT"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "e2e", "tests/e2e/test_browser.py", "-k", "not before and not 47"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


def test_prometheus_reaches_every_part_that_runs(stack: Stack) -> None:
    def down() -> list[str] | str:
        answer = httpx.get(stack.url("PROMETHEUS_PORT") + "/api/v1/query", params={"query": "up == 0"}).json()
        running = set(stack.compose("ps", "--services", "--status=running").stdout.split())
        names = {each["metric"]["instance"].partition(":")[0] for each in answer["data"]["result"]}
        return sorted(names & running) or "none"

    found = until("every target is scraped", 90, lambda: down() == "none" and "none")
    assert found == "none"


def test_down_and_up_again_loses_nothing(stack: Stack) -> None:
    def state() -> dict[str, Any]:
        return {
            "catalog": stack.lawnwatch("catalog", "status"),
            "rollouts": [each["id"] for each in stack.lawnwatch("rollout", "history")["rollouts"]],
            "predictions": stack.get("/predictions?limit=100")["items"],
            "model": stack.get("/model/info")["model"],
            "runs": stack.airflow().runs("training_pipeline"),
        }

    before = state()
    assert before["predictions"]
    stack.compose("down", "--timeout=60")
    stack.up()
    until("the model serves again", 60, lambda: stack.get("/model/info")["state"] == "ready" or None)
    assert state() == before
