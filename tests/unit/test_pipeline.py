"""A step as an Airflow task: what its exit code, its output and a signal make of the task."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

import psutil
import pytest

pytestmark = pytest.mark.unit

# A stand-in for the interpreter: the task starts `sys.executable -m lawnwatch …`, and this ends as told.
PROGRAM = """#!/bin/sh
echo "fetching" >&2
{body}
"""


class Notes:
    """What a task instance is told; the one thing of a context that a step uses."""

    def __init__(self):
        self.xcom = {}

    def xcom_push(self, key, value):
        self.xcom[key] = value


@pytest.fixture
def run(tmp_path, monkeypatch):
    from lawnwatch.pipeline import Step

    def start(body, *argv, **kwargs):
        program = tmp_path / "python"
        program.write_text(PROGRAM.format(body=body))
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        step, notes = Step(task_id="step", argv=list(argv or ("ingest",)), **kwargs), Notes()
        return step, notes, lambda: step.execute({"run_id": "manual__1", "ti": notes})

    return start


def test_the_json_is_the_result_and_the_progress_is_the_log(run, capsys):
    _, _, execute = run("""echo '{"stored": 3, "message": "Stored 3."}'""")
    assert execute() == {"stored": 3, "message": "Stored 3."}
    assert "fetching" in capsys.readouterr().out


def test_empty_words_are_left_out_and_the_run_id_is_passed_on(run):
    _, _, execute = run("""printf '{"argv": "%s", "run": "%s"}' "$*" "$LAWNWATCH_RUN_ID" """, "train", "", "--x=")
    assert execute() == {"argv": "-m lawnwatch train --x=", "run": "manual__1"}


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (99, "AirflowSkipException"),
        (2, "AirflowFailException"),
        (3, "AirflowFailException"),
        (4, "AirflowFailException"),
        (6, "AirflowFailException"),
        (7, "AirflowFailException"),
        (1, "AirflowException"),
        (5, "AirflowException"),
        (130, "AirflowException"),
    ],
)
def test_the_exit_code_decides(run, code, outcome):
    _, notes, execute = run(f"""echo '{{"message": "So it is.", "hint": "Do that."}}'; exit {code}""")
    with pytest.raises(Exception, match=r"^So it is\. Do that\.$") as caught:
        execute()
    assert type(caught.value).__name__ == outcome
    assert notes.xcom == {"message": "So it is. Do that."}


@pytest.mark.parametrize("when", ["", "False", "None"])
def test_a_step_that_nobody_asked_for_is_skipped(run, tmp_path, when):
    _, _, execute = run(f"touch {tmp_path}/ran; echo '{{}}'", when=when)
    with pytest.raises(Exception, match="Not asked for") as caught:
        execute()
    assert type(caught.value).__name__ == "AirflowSkipException"
    assert not (tmp_path / "ran").exists()


def test_one_key_of_the_json_can_be_the_result(run):
    """What can be mapped over is a task's whole result, never a key of it."""
    _, notes, execute = run("""echo '{"batches": [["ingest"]], "message": "One batch."}'""", returns="batches")
    assert execute() == [["ingest"]]
    assert notes.xcom == {"message": "One batch."}


@pytest.mark.parametrize("code", [0, 3])
def test_the_report_is_linked_whether_the_checks_passed_or_not(run, code):
    step, _, execute = run(
        f"""echo '{{"report_url": "http://api/reports/1", "message": "m"}}'; exit {code}""", report=True
    )
    if code:
        with pytest.raises(Exception, match="m"):
            execute()
    else:
        execute()
    (link,) = step.operator_extra_links
    assert link.get_link(step, ti_key=None) == "http://api/reports/1"


def test_a_step_that_is_killed_says_so(run):
    _, _, execute = run("kill -KILL $$")
    with pytest.raises(Exception, match="killed, as happens when memory runs out"):
        execute()


def test_success_without_json_is_a_failure(run):
    _, _, execute = run("echo done")
    with pytest.raises(Exception, match="printed no JSON object"):
        execute()


def test_ending_the_task_ends_the_step(run):
    """The step gets SIGTERM, may clean up, and its last words still reach the log."""
    step, notes, execute = run(
        """trap 'echo "{\\"message\\": \\"cleaned up\\"}"; exit 130' TERM; while :; do sleep 0.05; done"""
    )
    threading.Timer(0.5, step.on_kill).start()
    with pytest.raises(Exception, match="cleaned up"):
        execute()
    assert notes.xcom == {"message": "cleaned up"}


def test_a_task_that_runs_out_of_time_leaves_no_step_behind(run):
    _, _, execute = run("exec sleep 60")

    def expire(*_):
        raise TimeoutError("execution_timeout")

    before = {child.pid for child in psutil.Process().children()}
    old = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    begun = time.monotonic()
    try:
        with pytest.raises(TimeoutError):
            execute()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert time.monotonic() - begun < 10
    assert {child.pid for child in psutil.Process().children()} <= before


def test_resources_are_asked_for_only_where_tasks_are_pods(monkeypatch):
    from lawnwatch import pipeline

    assert os.environ.get("AIRFLOW__CORE__EXECUTOR") is None
    assert pipeline._pod("train") == {}


def test_a_step_asks_for_what_the_settings_say_and_runs_on_the_nodes_they_name(monkeypatch):
    from kubernetes.client import ApiClient

    from lawnwatch import pipeline
    from lawnwatch.config import get_settings

    gpu = {"key": "gpu", "operator": "Exists", "effect": "NoSchedule", "tolerationSeconds": 60}
    train = {"cpu": "4", "memory": "8Gi", "nodeSelector": {"pool": "gpu"}, "tolerations": [gpu, {"key": "spot"}]}
    asked = {"train": train, "ingest": {"cpu": "1", "memory": "1Gi"}}
    monkeypatch.setenv("AIRFLOW__CORE__EXECUTOR", "KubernetesExecutor")
    monkeypatch.setenv("LAWNWATCH_STEP_RESOURCES", json.dumps(asked))
    get_settings.cache_clear()

    def spec(word):
        pod = pipeline._pod(word)["executor_config"]["pod_override"]
        return ApiClient().sanitize_for_serialization(pod)["spec"]

    assert spec("train")["containers"][0]["resources"] == {
        "requests": {"cpu": "4", "memory": "8Gi"},
        "limits": {"memory": "8Gi"},
    }
    assert spec("train")["nodeSelector"] == {"pool": "gpu"}
    assert spec("train")["tolerations"] == [gpu, {"key": "spot", "operator": "Equal"}]
    for word in ("ingest", "snapshot"):
        assert not {"nodeSelector", "tolerations"} & spec(word).keys()


def test_what_is_not_mapped_over_is_there_for_other_steps(run):
    _, notes, execute = run(
        """echo '{"commands": [["train"]], "snapshot": "3f2a", "message": "m"}'""", returns="commands"
    )
    execute()
    assert notes.xcom == {"snapshot": "3f2a", "message": "m"}


def test_a_retrain_decision_names_its_reason_once_and_another_event_gives_none():
    """A lost or doubled event changes nothing: two of them are one reason to train."""
    from types import SimpleNamespace

    from lawnwatch import pipeline

    event = SimpleNamespace(extra={"reason": "drift of the embeddings"})
    assert pipeline.retrain_reason({pipeline.RETRAIN: [event, event]}) == "drift of the embeddings"
    assert pipeline.retrain_reason({pipeline.RETRAIN: [SimpleNamespace(extra={})]}) == "retrain decision"
    assert pipeline.retrain_reason({pipeline.SNAPSHOT: [event]}) == ""
    assert pipeline.retrain_reason({}) == ""
