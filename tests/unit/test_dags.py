"""The DAGs as Airflow reads them: no import error, exactly these edges, retries, limits, nothing heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

DAGS = Path(__file__).resolve().parents[2] / "dags"

EDGES = {
    "data_pipeline": {
        "plan": ["fetch"],
        "fetch": ["quality"],
        "recheck": ["quality"],
        "quality": ["snapshot"],
        "snapshot": [],
        "prune": [],
    },
    "training_pipeline": {
        "check": ["anything_new", "candidate", "snapshot", "unchanged"],
        "anything_new": ["snapshot", "unchanged"],
        "unchanged": ["release"],
        "snapshot": ["candidate", "train"],
        "candidate": ["train"],
        "train": ["evaluate", "promote", "register"],
        "evaluate": ["gate", "keep_champion"],
        "gate": ["keep_champion", "promote", "register"],
        "register": ["approve"],
        "approve": ["promote"],
        "promote": ["release"],
        "keep_champion": [],
        "release": [],
    },
    "inference_pipeline": {"rollout": ["verify"], "verify": []},
}

# Runs where Airflow would parse: a process of its own, which has imported nothing else.
PARSE = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag(sys.argv[1])
print(json.dumps({
    "errors": bag.import_errors,
    "heavy": sorted({"tensorflow", "keras", "mlflow", "sklearn", "cv2"} & set(sys.modules)),
    "dags": {
        dag.dag_id: {
            "edges": {t.task_id: sorted(t.downstream_task_ids) for t in dag.tasks},
            "retries": {t.task_id: t.retries for t in dag.tasks},
            "timeouts": {t.task_id: bool(t.execution_timeout) for t in dag.tasks},
            "pools": sorted({t.pool for t in dag.tasks} - {"default_pool"}),
            "mapped": [t.task_id for t in dag.tasks if t.is_mapped],
            "links": [t.task_id for t in dag.tasks if t.operator_extra_links],
            "cron": getattr(dag.timetable, "_expression", None) or getattr(dag.timetable, "expression", None),
            "pods": [t.task_id for t in dag.tasks if "pod_override" in (t.executor_config or {})],
            "tags": sorted(dag.tags),
            "doc": dag.doc_md or "",
            "max_active_runs": dag.max_active_runs,
            "params": {name: dag.params.get_param(name).description for name in dag.params},
            "outlets": sorted(a.name for t in dag.tasks for a in t.outlets),
            "weekly": "Timetable" in type(getattr(dag.timetable, "timetable", None)).__name__,
            "starts_on": type(dag.timetable.asset_condition).__name__,
            "schedule": sorted(a.name for a in dag.timetable.asset_condition.objects)
                if dag.timetable.asset_condition else [],
        }
        for dag in bag.dags.values()
    },
}))
"""


@pytest.fixture(scope="module")
def parsed(tmp_path_factory):
    environment = os.environ | {
        "AIRFLOW_HOME": str(tmp_path_factory.mktemp("airflow")),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
    }
    done = subprocess.run(
        [sys.executable, "-c", PARSE, str(DAGS)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_dag_parses_without_heavy_imports(parsed):
    assert parsed["errors"] == {}
    assert parsed["heavy"] == []


def test_the_edges_are_exactly_these(parsed):
    """An id passed in an f-string draws no edge, and the step would run with `None`: hence the literal."""
    assert {dag_id: dag["edges"] for dag_id, dag in parsed["dags"].items()} == EDGES


def test_every_task_is_retried_and_ends_in_time(parsed):
    for dag in parsed["dags"].values():
        assert all(retries >= 2 for retries in dag["retries"].values()), dag["retries"]
        # A person may take days; the operator has a limit of its own for that.
        assert all(ends for task, ends in dag["timeouts"].items() if task != "approve"), dag["timeouts"]
        assert dag["max_active_runs"] == 1


def test_every_dag_explains_itself(parsed):
    for dag_id, dag in parsed["dags"].items():
        assert "lawnwatch" in dag["tags"]
        assert len(dag["doc"]) > 200, dag_id
        assert all(dag["params"].values()), (dag_id, dag["params"])


def test_the_assets_join_the_dags(parsed):
    dags = parsed["dags"]
    assert dags["data_pipeline"]["outlets"] == ["lawnwatch_snapshot"]
    assert dags["training_pipeline"]["schedule"] == ["lawnwatch_retrain", "lawnwatch_snapshot"]
    assert dags["training_pipeline"]["starts_on"] == "AssetAny", "one of them is enough"
    assert dags["training_pipeline"]["outlets"] == dags["inference_pipeline"]["schedule"] == ["lawnwatch_release"]


def test_the_data_comes_daily_in_batches_and_with_a_report(parsed):
    data = parsed["dags"]["data_pipeline"]
    assert data["cron"] == "0 3 * * *"
    assert data["mapped"] == ["fetch"]
    assert data["links"] == ["quality"]


def test_every_pool_that_a_task_needs_is_one_that_the_installation_makes(parsed):
    """Airflow never starts a task whose pool does not exist."""
    made = json.loads((DAGS.parent / "infra" / "pools.json").read_text())
    used = {pool for dag in parsed["dags"].values() for pool in dag["pools"]}
    assert used == set(made)
    assert all(pool["slots"] >= 1 and pool["description"] for pool in made.values())


def test_the_candidates_are_trained_side_by_side_and_the_evaluation_shows_its_report(parsed):
    training = parsed["dags"]["training_pipeline"]
    assert training["mapped"] == ["candidate"]
    assert training["links"] == ["evaluate"]


def test_training_also_runs_every_week_and_asks_nobody_unless_told(parsed):
    assert parsed["dags"]["training_pipeline"]["weekly"]
    assert set(parsed["dags"]["training_pipeline"]["params"]) == {
        "snapshot", "candidates", "budget", "force", "reason", "approval",
    }  # fmt: skip


def test_no_pod_is_described_where_tasks_are_processes(parsed):
    assert all(dag["pods"] == [] for dag in parsed["dags"].values())
