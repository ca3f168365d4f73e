"""A person is asked before the champion is replaced: `training_pipeline` with *approval*, in a real Airflow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lawnwatch import registry

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]

# `dag.test()` runs every task of the DAG in this process. A second thread is the person who answers what is asked,
# as Airflow's page does it, and where nobody does it is the scheduler, whose sweep ends the waiting.
APPROVAL = """
import json, sys, threading
from datetime import timedelta
from airflow.dag_processing.dagbag import DagBag
from airflow.jobs.job import Job
from airflow.jobs.scheduler_job_runner import SchedulerJobRunner
from airflow.models.hitl import HITLDetail
from airflow.models.taskinstance import TaskInstance
from airflow.models.trigger import handle_event_submit
from airflow.triggers.base import TriggerEvent
from airflow.utils.session import create_session
from airflow._shared.timezones.timezone import utcnow

answer, stop, asked = sys.argv[2], threading.Event(), []

def person():
    scheduler = SchedulerJobRunner(job=Job())
    while not stop.wait(1):
        with create_session() as session:
            waiting = session.query(TaskInstance).where(TaskInstance.state == "awaiting_input").one_or_none()
            if waiting is None:
                continue
            detail = session.get(HITLDetail, waiting.id)
            asked.append([detail.subject, detail.body])
            if answer:
                detail.chosen_options, detail.responded_at = [answer], utcnow()
                detail.responded_by = {"id": "1", "name": "a person"}
                event = TriggerEvent(detail.as_resume_event_payload())
                handle_event_submit(event, task_instance=waiting, session=session)
        if not answer:
            scheduler.check_awaiting_input_timeouts()

bag = DagBag(sys.argv[1])
assert not bag.import_errors, bag.import_errors
dag = bag.dags["training_pipeline"]
if not answer:
    dag.get_task("approve").response_timeout = timedelta(seconds=3)
threading.Thread(target=person, daemon=True).start()
run = dag.test(run_conf={"approval": True})
stop.set()
print("RESULTS " + json.dumps({
    "state": str(run.state), "asked": asked[:1],
    "tasks": {ti.task_id: str(ti.state) for ti in run.get_task_instances()},
}))
"""


@pytest.mark.parametrize("answer", ["", "Reject", "Approve"])
def test_a_person_decides_when_asked_and_silence_is_a_no(road, airflow_database, tmp_path, answer):
    airflow = tmp_path / "airflow"
    airflow.mkdir()
    shutil.copy(airflow_database, airflow)
    env = os.environ | {
        "AIRFLOW_HOME": str(airflow),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "LAWNWATCH_HOME": str(road.settings.home),
        "LAWNWATCH_WEIGHTS": road.settings.weights,
        "NO_COLOR": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", APPROVAL, str(ROOT / "dags"), answer],
        env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULTS ")]
    assert done.returncode == 0 and results, done.stdout[-6000:] + done.stderr[-3000:]
    found = json.loads(results[-1].removeprefix("RESULTS "))
    tasks, log = found["tasks"], done.stdout[-6000:]
    assert found["state"] == "success", log
    (subject, body) = found["asked"][0]
    assert subject == "Make the challenger champion?"
    assert "Test accuracy is" in body and "/reports/evaluation/" in body, body
    assert (tasks["register"], tasks["approve"]) == ("success", "success")
    later = "success" if answer == "Approve" else "skipped"
    assert (tasks["promote"], tasks["release"]) == (later, later), log
    champion = registry.champion(road.settings, road.catalog)
    assert (champion is not None) == (answer == "Approve")
    (version,) = registry.list_versions(road.settings, road.catalog)
    assert version.aliases == (["champion"] if answer == "Approve" else ["challenger"])
