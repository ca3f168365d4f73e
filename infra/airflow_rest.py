"""As much of Airflow's REST API as it takes to start a DAG and to follow it."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

DONE = frozenset({"success", "failed"})


class AirflowError(Exception):
    """Airflow answered with an error, or not at all."""


@dataclass(frozen=True)
class Task:
    """One task of a run; a mapped one is several, each with an index, and -1 stands for all others."""

    name: str
    index: int
    state: str
    seconds: float | None
    tries: int


class Airflow:
    """A client of one Airflow.

    Args:
        url: where its api-server listens.
        user, password: an account of its SimpleAuthManager.
    """

    def __init__(self, url: str, user: str, password: str) -> None:
        self.url = url.rstrip("/")
        self._account = {"username": user, "password": password}
        self._token = ""

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One request below /api/v2, with a fresh token when the old one is refused."""
        for attempt in (1, 2):
            if not self._token or attempt == 2:
                self._token = self._send("POST", "/auth/token", self._account, "")["access_token"]
            try:
                return self._send(method, f"/api/v2{path}", body, self._token)
            except AirflowError as error:
                if attempt == 2 or not str(error).startswith("401"):
                    raise
        return None

    def healthy(self) -> bool:
        """The api-server answers, and the scheduler and the DAG processor are alive."""
        try:
            health = self._send("GET", "/api/v2/monitor/health", None, "")
        except AirflowError:
            return False
        return all(health.get(part, {}).get("status") == "healthy" for part in ("scheduler", "dag_processor"))

    def has(self, dag: str) -> bool:
        """The DAG is parsed and may run."""
        try:
            found = self.call("GET", f"/dags/{dag}")
        except AirflowError:
            return False
        return not found["is_paused"]

    def make_pools(self, wanted: dict[str, dict[str, Any]]) -> None:
        """Make the pools that are missing; those that are there keep the slots that somebody gave them."""
        there = {pool["name"] for pool in self.call("GET", "/pools")["pools"]}
        for name in wanted.keys() - there:
            self.call("POST", "/pools", {"name": name, **wanted[name]})

    def import_errors(self) -> list[str]:
        """What keeps DAG files from being read."""
        return [f"{e['filename']}: {e['stack_trace']}" for e in self.call("GET", "/importErrors")["import_errors"]]

    def trigger(self, dag: str, **conf: Any) -> str:
        """Start a run; returns its id."""
        run = self.call("POST", f"/dags/{dag}/dagRuns", {"logical_date": None, "conf": conf})
        return str(run["dag_run_id"])

    def runs(self, dag: str) -> dict[str, str]:
        """The newest runs' ids and states, newest first."""
        found = self.call("GET", f"/dags/{dag}/dagRuns?order_by=-run_after&limit=20")["dag_runs"]
        return {run["dag_run_id"]: run["state"] for run in found}

    def give_up(self, dag: str, run: str) -> None:
        """Mark a run as failed, so that it no longer holds the DAG's one place."""
        self.call("PATCH", f"/dags/{dag}/dagRuns/{quote(run, safe='')}", {"state": "failed"})

    def state(self, dag: str, run: str) -> str:
        """queued, running, success or failed."""
        return str(self.call("GET", f"/dags/{dag}/dagRuns/{quote(run, safe='')}")["state"])

    def tasks(self, dag: str, run: str) -> list[Task]:
        """The run's tasks."""
        found = self.call("GET", f"/dags/{dag}/dagRuns/{quote(run, safe='')}/taskInstances")
        return [
            Task(t["task_id"], t["map_index"], t["state"] or "waiting", t["duration"], t["try_number"])
            for t in found["task_instances"]
        ]

    def message(self, dag: str, run: str, task: str, index: int = -1) -> str:
        """What the task said in one sentence: its XCom `message`, or its result when that is a sentence."""
        for key in ("message", "return_value"):
            path = f"/dags/{dag}/dagRuns/{quote(run, safe='')}/taskInstances/{task}/xcomEntries/{key}?map_index={index}"
            try:
                value = self.call("GET", path)["value"]
            except AirflowError:
                continue
            if isinstance(value, str):
                return value
        return ""

    def _send(self, method: str, path: str, body: dict[str, Any] | None, token: str) -> Any:
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {}),
        )
        problem = ""
        for _ in range(3):  # SQLite under load answers 500 now and then
            try:
                with urllib.request.urlopen(request, timeout=15) as response:
                    return json.loads(response.read() or b"null")
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.read()[:500].decode(errors='replace')}"
                if error.code < 500:
                    break
            except (OSError, ValueError) as error:
                problem = str(error)
                if method != "GET":
                    break
            time.sleep(0.5)
        raise AirflowError(problem)
