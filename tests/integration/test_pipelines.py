"""The three DAGs, run by a real Airflow, take an empty database to an API that answers; again, they change nothing.

Once on the embedded defaults and once on real MariaDB, MinIO and MLflow servers: the same DAGs, only settings differ.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import pytest

import reference_catalog
import samples
from processes import Server, answers, free_port, served
from road import floor_variables

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
PER_LABEL = 100
DAGS = ["data_pipeline", "training_pipeline", "inference_pipeline"]

# `dag.test()` runs every task of a DAG in this process, in order, through Airflow's own task runner.
RUN = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
results = {}
for dag_id in sys.argv[2:]:
    bag = DagBag(sys.argv[1])
    assert not bag.import_errors, bag.import_errors
    run = bag.dags[dag_id].test()
    results[dag_id] = {
        "state": str(run.state), "tasks": {ti.task_id: str(ti.state) for ti in run.get_task_instances()},
    }
print("RESULTS " + json.dumps(results))
"""


@dataclass
class World:
    """One installation: its settings as environment, its API, its Airflow."""

    home: Path
    env: dict[str, str]
    api_url: str
    log: str = ""

    def lawnwatch(self, *argv: str) -> dict:
        done = subprocess.run(
            [sys.executable, "-m", "lawnwatch", *argv], env=self.env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    def run(self, *dags: str) -> dict:
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(ROOT / "dags"), *dags],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=800,
        )
        results = [line for line in done.stdout.splitlines() if line.startswith("RESULTS ")]
        assert done.returncode == 0 and results, done.stdout[-6000:] + done.stderr[-3000:]
        self.log = done.stdout + done.stderr
        return json.loads(results[-1].removeprefix("RESULTS "))

    def facts(self) -> dict:
        """Everything that a repeated run must leave as it is."""
        from lawnwatch.config import Settings
        from lawnwatch.store import open_store

        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.env.items():
                if name.startswith(("LAWNWATCH_", "MLFLOW_TRACKING_URI")):
                    patch.setenv(name, value)
            store = open_store(Settings())
        return {
            "catalog": self.lawnwatch("catalog", "status"),
            "snapshots": self.lawnwatch("snapshot", "list"),
            "versions": self.lawnwatch("model", "list"),
            "rollouts": self.lawnwatch("rollout", "history"),
            # The second run's quality report is another one: a champion can doubt labels now.
            "objects": {
                (o.key, o.size) for o in store.list("") if not o.key.startswith(("predictions/", "reports/quality/"))
            },
        }


@pytest.fixture(params=["embedded", "servers"])
def world(request, tmp_path, weights, photos, airflow_env):
    home, port = tmp_path / "home", free_port()
    env = airflow_env | {
        "LAWNWATCH_HOME": str(home),
        "LAWNWATCH_API_URL": f"http://127.0.0.1:{port}",
        "LAWNWATCH_SERVING__PORT": str(port),
        "LAWNWATCH_FETCH__ALLOW_CIDRS": '["127.0.0.0/8"]',
        "LAWNWATCH_DATA__BATCH_IMAGES": "80",  # three mapped fetches
        "LAWNWATCH_TRAIN__BUDGET_SECONDS": "20",
        "LAWNWATCH_TRAIN__FINE_TUNE_EPOCHS": "0",  # fine-tuning has tests of its own
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    if request.param == "servers":
        weights = "none"  # so that what a machine without weights does is asked wherever these tests run
        minio = request.getfixturevalue("minio")
        env |= {f"LAWNWATCH_{name.upper()}": value for name, value in minio.settings().items()}
        env |= {
            "LAWNWATCH_DATABASE_URL": request.getfixturevalue("mariadb"),
            "MLFLOW_TRACKING_URI": request.getfixturevalue("mlflow_server"),
            "LAWNWATCH_TRAIN__CANDIDATES": '["linear_probe"]',  # all of them are trained by the embedded run
        }
    if weights == "none":  # a network that knows nothing needs pictures that colour alone tells apart
        photos = samples.draw(tmp_path / "photos", PER_LABEL)
        env |= {"LAWNWATCH_WEIGHTS": weights} | floor_variables(weights)
    world = World(home, env, f"http://127.0.0.1:{port}")
    catalog = reference_catalog.write(tmp_path / "urls.csv", reference_catalog.records(per_label=PER_LABEL))
    with served(photos) as web:
        world.env["LAWNWATCH_FETCH__ORIGIN_MAP"] = json.dumps({reference_catalog.ORIGIN: web + "/"})
        assert world.lawnwatch("catalog", "import", str(catalog))["added"] == 2 * PER_LABEL
        alive = partial(answers, f"{world.api_url}/health")
        api = Server([sys.executable, "-m", "lawnwatch", "serve"], alive, tmp_path / "api.log", world.env).start()
        yield world
        api.stop()


def test_the_whole_road_and_a_second_time(world, photos):
    assert httpx.get(f"{world.api_url}/ready").status_code == 503, "no model may be claimed before there is one"

    first = world.run(*DAGS)
    assert {dag: result["state"] for dag, result in first.items()} == dict.fromkeys(DAGS, "success"), world.log[-6000:]
    assert "printed no JSON object" not in world.log, "a step that only its second try brought to an end"
    assert first["data_pipeline"]["tasks"] == {
        "plan": "success",
        "fetch": "success",
        "recheck": "skipped",
        "quality": "success",
        "snapshot": "success",
        "prune": "success",
    }
    assert first["training_pipeline"]["tasks"] == {
        "check": "success",
        "anything_new": "success",
        "unchanged": "skipped",
        "snapshot": "success",
        "candidate": "success",
        "train": "success",
        "evaluate": "success",
        "gate": "success",
        "register": "skipped",
        "approve": "skipped",
        "promote": "success",
        "keep_champion": "skipped",
        "release": "success",
    }
    assert first["inference_pipeline"]["tasks"] == {"rollout": "success", "verify": "success"}

    info = httpx.get(f"{world.api_url}/model/info").json()
    assert info["state"] == "ready" and info["golden"]["ok"] is True
    assert sorted(info["classes"]) == ["dandelion", "grass"]
    picture = next(photos.glob("dandelion/*.jpg"))
    answer = httpx.post(f"{world.api_url}/predict", files={"file": picture.read_bytes()}, timeout=30)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"]["sha256"] == info["model"]["sha256"]

    before = world.facts()
    assert len(before["versions"]["versions"]) == len(before["snapshots"]["snapshots"]) == 1
    second = world.run(*DAGS)
    assert second["data_pipeline"]["tasks"] == {
        "plan": "success",
        "fetch": "skipped",
        "recheck": "skipped",
        "quality": "success",
        "snapshot": "skipped",
        "prune": "success",
    }
    assert second["training_pipeline"]["tasks"] == {
        "check": "success",
        "anything_new": "success",
        "unchanged": "success",
        "snapshot": "skipped",
        "candidate": "skipped",
        "train": "skipped",
        "evaluate": "skipped",
        "gate": "skipped",
        "register": "skipped",
        "approve": "skipped",
        "promote": "skipped",
        "keep_champion": "skipped",
        "release": "success",
    }
    assert second["inference_pipeline"]["state"] == "success"
    assert world.facts() == before
    assert httpx.get(f"{world.api_url}/model/info").json()["model"] == info["model"]
