"""One step of the road as one Airflow task; the only module beside `dags/` that imports Airflow.

A task starts `python -m lawnwatch STEP …` as a subprocess, so that TensorFlow and MLflow never load where
Airflow parses DAGs, and so that a step behaves under Airflow exactly as in a terminal. The step's progress
becomes the task's log, its one JSON object becomes the task's XCom, and its exit code decides what happens
next:

0 success · 99 nothing to do, skipped · 5 a server is down and everything unforeseen: retried · all else:
failed at once, for the same input would fail again.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from datetime import timedelta
from typing import Any

from airflow.sdk import Asset, BaseOperator, BaseOperatorLink, task
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

from lawnwatch import errors
from lawnwatch.config import get_settings

SNAPSHOT = Asset(name="lawnwatch_snapshot", uri="lawnwatch://snapshot")
RELEASE = Asset(name="lawnwatch_release", uri="lawnwatch://release")
# An event of it says that somebody or something decided to train again; its extra may hold a `reason`.
RETRAIN = Asset(name="lawnwatch_retrain", uri="lawnwatch://retrain")

# How many tasks may fetch at once, over all runs; infra/pools.json makes it.
FETCH_POOL = "lawnwatch_fetch"

# What every task of every DAG does unless it says otherwise.
DEFAULTS = {
    "owner": "lawnwatch",
    "retries": 2,
    "retry_delay": timedelta(seconds=30),
    "retry_exponential_backoff": True,
    "max_retry_delay": timedelta(minutes=10),
    "execution_timeout": timedelta(minutes=30),
}

# The same input would fail in the same way: a retry only delays the answer.
HOPELESS = frozenset(
    kind.exit_code
    for kind in (
        errors.InputError,
        errors.DataError,
        errors.IntegrityError,
        errors.Conflict,
        errors.RolloutFailed,
    )
)

# CPU and memory of a step's pod, by the step's first word; asked for only under KubernetesExecutor.
RESOURCES = {
    "train": ("2", "4Gi"),
    "evaluate": ("2", "3Gi"),
    "release": ("1", "3Gi"),
    "ingest": ("1", "1Gi"),
    "data": ("1", "2Gi"),
}
SMALL = ("250m", "768Mi")

GRACE_SECONDS = 30


class ReportLink(BaseOperatorLink):  # type: ignore[misc]  # Airflow is not checked
    """The button beside a task that opens the report its step wrote."""

    name = "Report"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """The `report_url` of the step's JSON; asked for when the task has ended, well or not."""
        return str(operator.report_url)


class Step(BaseOperator):  # type: ignore[misc]  # Airflow is not checked
    """Run `lawnwatch ARGV…` and return its JSON; every key of it is an XCom of its own.

    Args:
        argv: the step and its arguments. Strings are templates, XComArgs become edges, and an empty string
            is left out, so that `"{{ '--force' if params.force else '' }}"` is a flag.
        when: a template; the task is skipped where it renders to nothing or to `False`.
        returns: the key of the JSON that is the task's result instead of the whole; only such a result can be
            mapped over. The other keys are XComs all the same.
        report: the step writes a report, and the task shows a button that opens it.
    """

    template_fields = ("argv", "when")

    def __init__(
        self, *, argv: list[Any], when: str = "True", returns: str = "", report: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(multiple_outputs=not returns, **kwargs)
        self.argv = argv
        self.when = when
        self.returns = returns
        self.report_url = ""
        if report:
            self.operator_extra_links = (ReportLink(),)
        self._process: subprocess.Popen[str] | None = None

    def execute(self, context: Any) -> Any:
        """Run the step to its end.

        Raises:
            AirflowSkipException: there was nothing to do, or nobody asked for it.
            AirflowFailException: the step failed, and would fail again.
            AirflowException: the step failed; Airflow retries it.
        """
        if self.when in ("", "False", "None"):
            raise AirflowSkipException("Not asked for in this run.")
        argv = [str(word) for word in self.argv if str(word)]
        self.log.info("lawnwatch %s", " ".join(argv))
        code, output = self._run(argv, run_id=context["run_id"])
        result = _parse(output)
        self.report_url = str(result.get("report_url", ""))
        # A step that a signal ended may have said that all was well before.
        message = " ".join(str(result[key]) for key in ("message", "hint") if result.get(key)) if code > 0 else ""
        if code == 0:
            if not result:
                raise AirflowException(f"lawnwatch {argv[0]} ended well but printed no JSON object")
            if not self.returns:
                return result
            for key in result.keys() - {self.returns}:
                context["ti"].xcom_push(key, result[key])
            return result[self.returns]
        # An XCom outlives the failure: whoever asks why finds the sentence without reading the log.
        message = message or f"lawnwatch {argv[0]} {_ending(code)}; its log says more"
        context["ti"].xcom_push("message", message)
        if code == errors.NOTHING_TO_DO:
            raise AirflowSkipException(message)
        raise (AirflowFailException if code in HOPELESS else AirflowException)(message)

    def on_kill(self) -> None:
        """Airflow ends the task: the step gets the signal, cleans up and ends."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def _run(self, argv: list[str], *, run_id: str) -> tuple[int, str]:
        """Start the step and log its stderr line by line. Returns the exit code and stdout."""
        with tempfile.TemporaryFile("w+", encoding="utf-8") as stdout:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lawnwatch", *argv],
                stdout=stdout,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=os.environ | {"LAWNWATCH_RUN_ID": run_id},
                preexec_fn=_end_with_parent,
            )
            try:
                assert self._process.stderr is not None  # noqa: S101 - it is a pipe, see above
                for line in self._process.stderr:
                    self.log.info("%s", line.rstrip())
                code = self._process.wait()
            finally:  # a timeout or an interruption: the step must not go on without its task
                self._end()
            stdout.seek(0)
            return code, stdout.read()

    def _end(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def step(task_id: str, *argv: Any, outlets: tuple[Asset, ...] = (), **kwargs: Any) -> Any:
    """A task that runs `lawnwatch ARGV…`; of its XComArg, `step(…)["run_id"]` is data and edge in one."""
    operator = Step(task_id=task_id, argv=list(argv), outlets=list(outlets), **_pod(argv[0]), **kwargs)
    return operator.output


def mapped_step(task_id: str, word: str, argvs: Any, **kwargs: Any) -> Any:
    """One task for each argv of a list that another step `returns`; on a cluster each has a pod of its own.

    Args:
        word: the step's first word, by which its resources are chosen.
    """
    named = "{{ task.argv[1:] | join(' ') }}"
    return Step.partial(task_id=task_id, map_index_template=named, **_pod(word), **kwargs).expand(argv=argvs)


def retrain_reason(triggering_asset_events: Any) -> str:
    """Why the retrain decision that woke a DAG run was taken; empty when something else woke it."""
    reasons = [
        str(event.extra.get("reason") or "retrain decision")
        for asset, events in triggering_asset_events.items()
        if asset.name == RETRAIN.name
        for event in events
    ]
    return "; ".join(dict.fromkeys(reasons))


@task
def say(message: str) -> str:
    """Nothing is left to do but to say why, in a green task."""
    print(message)  # noqa: T201 - a task's stdout is its log
    return message


def _pod(first_word: str) -> dict[str, Any]:
    """The resources and the nodes of a step as a pod override, where tasks are pods."""
    if "KubernetesExecutor" not in conf.get("core", "executor"):
        return {}
    from kubernetes.client import models  # only in the cluster's image

    settings = get_settings()
    asked = settings.step_resources.get(first_word)
    cpu, memory = (asked.cpu, asked.memory) if asked else RESOURCES.get(first_word, SMALL)
    container = models.V1Container(
        name="base",
        resources=models.V1ResourceRequirements(requests={"cpu": cpu, "memory": memory}, limits={"memory": memory}),
    )
    spec = models.V1PodSpec(containers=[container])
    if asked:  # what is empty leaves that of all pods
        spec.node_selector = asked.node_selector or None
        spec.tolerations = [models.V1Toleration(**each.model_dump()) for each in asked.tolerations] or None
    if first_word == "rollout":  # the only step that Kubernetes answers
        spec.service_account_name = settings.rollout.service_account or None
        spec.automount_service_account_token = True
    pod = models.V1Pod(spec=spec)
    return {"executor_config": {"pod_override": pod}}


def _parse(output: str) -> dict[str, Any]:
    """The one JSON object of a step's stdout; empty when there is none."""
    try:
        result = json.loads(output)
    except ValueError:
        return {}
    return result if isinstance(result, dict) else {}


def _ending(code: int) -> str:
    """How a process ended, for people."""
    if code == -signal.SIGKILL:
        return "was killed, as happens when memory runs out"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _end_with_parent() -> None:
    """A task that is killed outright takes its step along (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG
