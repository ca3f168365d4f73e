"""Facts of the pipelines as Prometheus metrics, read from where they are recorded at each scrape.

What the API and the servers say of themselves is not repeated here; this tells what lies in the catalog, what Airflow
last did, and whether the servers that have no metrics of their own answer.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, TypeVar
from urllib.parse import urlencode

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.orm import Session

from lawnwatch import log
from lawnwatch.catalog import Catalog, ImageRecord, QualityReport, SnapshotRecord
from lawnwatch.config import Settings
from lawnwatch.errors import LawnwatchError
from lawnwatch.registry import ChampionRow, VerdictRow
from lawnwatch.rollout import RolloutRow

logger = log.get(__name__)

DAGS = ("data_pipeline", "training_pipeline", "inference_pipeline")
DAG_STATES = ("queued", "running", "success", "failed")
DECISIONS = ("promote", "reject", "inconclusive")
ROLLOUT_STATES = ("progressing", "complete", "failed", "undone")
AIRFLOW_PARTS = ("metadatabase", "scheduler", "triggerer", "dag_processor")
MYSQL_STATUS = {
    "Threads_connected": ("mysql_global_status_threads_connected", "Open connections."),
    "Threads_running": ("mysql_global_status_threads_running", "Connections that work."),
    "Uptime": ("mysql_global_status_uptime", "Seconds since the server started."),
}
MYSQL_COUNTERS = {
    "Questions": ("mysql_global_status_questions", "Statements of clients."),
    "Slow_queries": ("mysql_global_status_slow_queries", "Statements that took long."),
    "Innodb_row_lock_waits": ("mysql_global_status_innodb_row_lock_waits", "Waits for a row's lock."),
}
SECONDS = 5.0

Key = TypeVar("Key", bound=tuple[str, ...])


class Exporter(Collector):
    """Everything this process exports; a source that does not answer is a 0 and not an error."""

    def __init__(self, settings: Settings, catalog: Catalog) -> None:
        self._settings = settings
        self._catalog = catalog
        self._token = ""

    def describe(self) -> Iterable[Metric]:
        """Nothing is known before the first scrape."""
        return []

    def collect(self) -> Iterable[Metric]:
        """All series, asked for now."""
        yield from self._source("catalog", self._recorded)
        yield from self._source("mlflow", self._mlflow)
        if self._settings.exporter.airflow_url:
            yield from self._source("airflow", self._airflow)

    def _source(self, name: str, ask: Callable[[], Iterator[Metric]]) -> Iterator[Metric]:
        found: list[Metric] = []
        try:
            found = list(ask())
            up = 1.0
        except (LawnwatchError, sa.exc.SQLAlchemyError, OSError, ValueError, KeyError) as error:
            logger.warning("a source does not answer", source=name, error=str(error))
            up = 0.0
        yield _gauge("lawnwatch_source_up", "1 when the source answered this scrape.", {(name,): up}, ["source"])
        yield from found

    def _recorded(self) -> Iterator[Metric]:
        with self._catalog.session() as session:
            counts = session.execute(sa.select(ImageRecord.state, sa.func.count()).group_by(ImageRecord.state))
            yield _gauge(
                "lawnwatch_catalog_images", "Image records.", {(str(state),): n for state, n in counts}, ["state"]
            )
            yield from _snapshot(session)
            yield from _verdict(session)
            champion = session.scalar(
                sa.select(ChampionRow.version).where(ChampionRow.model_name == self._settings.model_name)
            )
            yield _gauge("lawnwatch_champion_version", "Version of the champion; 0: none.", {(): champion or 0})
            rollout = session.scalar(sa.select(RolloutRow.state).order_by(RolloutRow.id.desc()).limit(1))
            yield _one_of("lawnwatch_rollout_state", "State of the last rollout.", ROLLOUT_STATES, rollout)
            if session.get_bind().dialect.name == "mysql":
                yield from _mysql(session)

    def _mlflow(self) -> Iterator[Metric]:
        uri = self._settings.mlflow_tracking_uri
        if uri.startswith("http"):
            _get(f"{uri.rstrip('/')}/health")
        return iter(())

    def _airflow(self) -> Iterator[Metric]:
        url = self._settings.exporter.airflow_url.rstrip("/")
        health = json.loads(_get(f"{url}/api/v2/monitor/health"))
        parts = {(part,): float(health.get(part, {}).get("status") == "healthy") for part in AIRFLOW_PARTS}
        yield _gauge("lawnwatch_airflow_healthy", "1 when Airflow says this part is healthy.", parts, ["part"])
        states: dict[tuple[str, ...], float] = {}
        starts: dict[tuple[str, ...], float] = {}
        ends: dict[tuple[str, ...], float] = {}
        for dag in DAGS:
            newest = self._first_run(url, dag, "-run_after")
            states |= {(dag, state): float(newest.get("state") == state) for state in DAG_STATES}
            # Not the newest, which waits while an older one is stuck.
            if start := self._first_run(url, dag, "start_date", "running").get("start_date"):
                starts[(dag,)] = _timestamp(start)
            if end := self._first_run(url, dag, "-run_after", "success", "failed").get("end_date"):
                ends[(dag,)] = _timestamp(end)
        yield _gauge("lawnwatch_dag_run_state", "State of a DAG's newest run.", states, ["dag", "state"])
        yield _gauge(
            "lawnwatch_dag_run_start_timestamp_seconds", "When the oldest that goes on began.", starts, ["dag"]
        )
        yield _gauge("lawnwatch_dag_run_end_timestamp_seconds", "When the newest that is over ended.", ends, ["dag"])

    def _first_run(self, url: str, dag: str, order: str, *states: str) -> dict[str, Any]:
        """The first in this order, of those in these states; none: of all."""
        asked = [("order_by", order), ("limit", "1"), *(("state", state) for state in states)]
        found = self._ask_airflow(url, f"/api/v2/dags/{dag}/dagRuns?{urlencode(asked)}")
        runs: list[dict[str, Any]] = found["dag_runs"]
        return runs[0] if runs else {}

    def _ask_airflow(self, url: str, path: str) -> Any:
        for fresh in (False, True):
            if fresh or not self._token:
                account = {"username": "admin", "password": self._settings.exporter.airflow_password.get_secret_value()}
                self._token = json.loads(_get(f"{url}/auth/token", body=account))["access_token"]
            try:
                return json.loads(_get(f"{url}{path}", token=self._token))
            except urllib.error.HTTPError as error:
                if error.code != 401 or fresh:
                    raise
        return None


def serve(settings: Settings, catalog: Catalog) -> None:
    """Answer scrapes on the settings' port until a signal ends the process."""
    registry = CollectorRegistry()
    registry.register(Exporter(settings, catalog))
    _, thread = start_http_server(settings.exporter.port, settings.exporter.host, registry)
    logger.info("exporting", address=f"http://{settings.exporter.host}:{settings.exporter.port}/metrics")
    thread.join()


def _snapshot(session: Session) -> Iterator[Metric]:
    newest = session.scalar(sa.select(SnapshotRecord).order_by(SnapshotRecord.created_at.desc()).limit(1))
    made = {(): newest.created_at.timestamp()} if newest is not None else {}
    yield _gauge("lawnwatch_snapshot_created_timestamp_seconds", "When the newest snapshot was made.", made)
    passed = session.scalar(sa.select(QualityReport.passed).order_by(QualityReport.created_at.desc()).limit(1))
    values = {(): float(passed)} if passed is not None else {}
    yield _gauge("lawnwatch_quality_passed", "1 when the newest quality report passed.", values)


def _verdict(session: Session) -> Iterator[Metric]:
    newest = session.scalar(sa.select(VerdictRow).order_by(VerdictRow.id.desc()).limit(1))
    decision = newest.decision if newest is not None else None
    yield _one_of("lawnwatch_verdict", "What the gate decided last.", DECISIONS, decision)
    at = {(): newest.created_at.timestamp()} if newest is not None else {}
    yield _gauge("lawnwatch_verdict_timestamp_seconds", "When it decided.", at)
    if newest is not None:
        figures = newest.evaluation.get("metrics", {})
        values = {(name,): float(one["value"]) for name, one in figures.items() if one.get("value") is not None}
        yield _gauge("lawnwatch_evaluation", "Figures of the run it judged, on the test split.", values, ["metric"])


def _mysql(session: Session) -> Iterator[Metric]:
    status = {str(name): str(value) for name, value in session.execute(sa.text("SHOW GLOBAL STATUS"))}
    for key, (name, text) in MYSQL_STATUS.items():
        yield _gauge(name, text, {(): float(status[key])})
    for key, (name, text) in MYSQL_COUNTERS.items():
        family = CounterMetricFamily(name, text)
        family.add_metric([], float(status[key]))
        yield family


def _one_of(name: str, text: str, values: tuple[str, ...], current: str | None) -> Metric:
    """A series for each value, 1 for the current one."""
    return _gauge(name, text, {(value,): float(value == current) for value in values}, ["state"])


def _gauge(name: str, text: str, values: Mapping[Key, float], labels: list[str] | None = None) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels or [])
    for key, value in values.items():
        family.add_metric(list(key), value)
    return family


def _timestamp(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _get(url: str, *, body: dict[str, str] | None = None, token: str = "") -> bytes:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url} is not an address")
    request = urllib.request.Request(  # noqa: S310 - the scheme was checked
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {}),
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as response:  # noqa: S310
        return bytes(response.read())
