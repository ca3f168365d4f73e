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

from airflow.sdk import Asset, BaseOperator, task
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

from lawnwatch import errors

SNAPSHOT = Asset(name="lawnwatch_snapshot", uri="lawnwatch://snapshot")
RELEASE = Asset(name="lawnwatch_release", uri="lawnwatch://release")

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
RESOURCES = {"train": ("2", "4Gi"), "evaluate": ("2", "3Gi"), "release": ("1", "3Gi"), "ingest": ("1", "1Gi")}
SMALL = ("250m", "768Mi")

GRACE_SECONDS = 30


class Step(BaseOperator):  # type: ignore[misc]  # Airflow is not checked
    """Run `lawnwatch ARGV…` and return its JSON; every key of it is an XCom of its own.

    Args:
        argv: the step and its arguments. Strings are templates, XComArgs become edges, and an empty string
            is left out, so that `"{{ '--force' if params.force else '' }}"` is a flag.
    """

    template_fields = ("argv",)

    def __init__(self, *, argv: list[Any], **kwargs: Any) -> None:
        super().__init__(multiple_outputs=True, **kwargs)
        self.argv = argv
        self._process: subprocess.Popen[str] | None = None

    def execute(self, context: Any) -> dict[str, Any]:
        """Run the step to its end.

        Raises:
            AirflowSkipException: there was nothing to do.
            AirflowFailException: the step failed, and would fail again.
            AirflowException: the step failed; Airflow retries it.
        """
        argv = [str(word) for word in self.argv if str(word)]
        self.log.info("lawnwatch %s", " ".join(argv))
        code, output = self._run(argv, run_id=context["run_id"])
        result = _parse(output)
        # A step that a signal ended may have said that all was well before.
        message = " ".join(str(result[key]) for key in ("message", "hint") if result.get(key)) if code > 0 else ""
        if code == 0:
            if not result:
                raise AirflowException(f"lawnwatch {argv[0]} ended well but printed no JSON object")
            return result
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


@task
def say(message: str) -> str:
    """Nothing is left to do but to say why, in a green task."""
    print(message)  # noqa: T201 - a task's stdout is its log
    return message


def _pod(first_word: str) -> dict[str, Any]:
    """The resources of a step as a pod override, where tasks are pods."""
    if "KubernetesExecutor" not in conf.get("core", "executor"):
        return {}
    from kubernetes.client import models  # type: ignore[import-not-found]  # only in the cluster's image

    cpu, memory = RESOURCES.get(first_word, SMALL)
    container = models.V1Container(
        name="base",
        resources=models.V1ResourceRequirements(requests={"cpu": cpu, "memory": memory}, limits={"memory": memory}),
    )
    pod = models.V1Pod(spec=models.V1PodSpec(containers=[container]))
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
