"""The exporter of pipeline facts: what is recorded becomes a series; what does not answer is a 0 and no error."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from urllib.parse import parse_qs, urlsplit

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from lawnwatch.catalog import Catalog, SnapshotRecord
from lawnwatch.config import ExporterSettings, Settings
from lawnwatch.exporter import Exporter
from lawnwatch.registry import ChampionRow

pytestmark = pytest.mark.unit


def run(state: str, begun: str | None, ended: str | None = None, *, due: str | None = None) -> dict[str, str | None]:
    return {"state": state, "run_after": due or begun, "start_date": begun, "end_date": ended}


class Airflow:
    """Airflow's API as far as the exporter asks it: a token, its health, and the runs of each DAG."""

    def __init__(self) -> None:
        self.tokens = 0
        self.valid = ""
        self.health = {part: {"status": "healthy"} for part in ("metadatabase", "scheduler", "triggerer")}
        self.health["dag_processor"] = {"status": "unhealthy"}
        self.runs = {
            "training_pipeline": [
                run("success", "2026-11-21T09:00:00Z", "2026-11-21T10:00:00Z"),
                run("running", "2026-11-21T12:00:00Z"),
            ],
            "data_pipeline": [run("failed", "2026-11-21T08:00:00Z", "2026-11-21T08:30:00Z")],
        }
        airflow = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                assert body == {"username": "admin", "password": "swordfish"}
                airflow.tokens += 1
                airflow.valid = f"token-{airflow.tokens}"
                self.reply(201, {"access_token": airflow.valid})

            def do_GET(self) -> None:
                if self.path == "/api/v2/monitor/health":
                    self.reply(200, airflow.health)
                elif self.headers.get("authorization") != f"Bearer {airflow.valid}":
                    self.reply(401, {})
                else:
                    asked = urlsplit(self.path)
                    given = parse_qs(asked.query)
                    (order,), (limit,) = given["order_by"], given["limit"]
                    runs = airflow.runs.get(asked.path.split("/")[4], [])
                    runs = [run for run in runs if run["state"] in given.get("state", [run["state"]])]
                    runs.sort(key=lambda run: run[order.lstrip("-")] or "", reverse=order.startswith("-"))
                    self.reply(200, {"dag_runs": runs[: int(limit)]})

            def reply(self, status: int, body: object) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def airflow() -> Iterator[Airflow]:
    airflow = Airflow()
    yield airflow
    airflow.server.shutdown()


def registry(settings: Settings, catalog: Catalog, url: str = "") -> CollectorRegistry:
    exporting = ExporterSettings(airflow_url=url, airflow_password="swordfish")
    made = CollectorRegistry()
    made.register(Exporter(settings.model_copy(update={"exporter": exporting}), catalog))
    return made


def test_what_is_recorded_becomes_a_series(settings: Settings, catalog: Catalog) -> None:
    for name in ("1", "2"):
        catalog.add(f"https://example.org/{name}.jpg", "grass")
    made = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)
    with catalog.session() as session:
        session.add(SnapshotRecord(id="a" * 64, created_at=made, counts={}, samples=False))
        session.add(
            ChampionRow(
                model_name=settings.model_name, version=3, run_id="r", fingerprint="f", snapshot="a" * 64,
                previous_version=2, updated_at=made,
            )
        )  # fmt: skip
    found = registry(settings, catalog)
    assert found.get_sample_value("lawnwatch_source_up", {"source": "catalog"}) == 1
    assert found.get_sample_value("lawnwatch_catalog_images", {"state": "pending"}) == 2
    assert found.get_sample_value("lawnwatch_snapshot_created_timestamp_seconds") == made.timestamp()
    assert found.get_sample_value("lawnwatch_champion_version") == 3
    assert found.get_sample_value("lawnwatch_rollout_state", {"state": "complete"}) == 0


def test_a_catalog_that_was_never_migrated_is_down_and_no_error(settings: Settings) -> None:
    found = registry(settings, Catalog(settings))
    assert found.get_sample_value("lawnwatch_source_up", {"source": "catalog"}) == 0
    assert found.get_sample_value("lawnwatch_champion_version") is None


def test_airflows_parts_and_newest_runs(settings: Settings, catalog: Catalog, airflow: Airflow) -> None:
    found = registry(settings, catalog, airflow.url)
    assert found.get_sample_value("lawnwatch_airflow_healthy", {"part": "scheduler"}) == 1
    assert found.get_sample_value("lawnwatch_airflow_healthy", {"part": "dag_processor"}) == 0
    assert found.get_sample_value("lawnwatch_dag_run_state", {"dag": "training_pipeline", "state": "running"}) == 1
    assert found.get_sample_value("lawnwatch_dag_run_state", {"dag": "data_pipeline", "state": "failed"}) == 1
    assert found.get_sample_value("lawnwatch_dag_run_state", {"dag": "inference_pipeline", "state": "failed"}) == 0
    # The newest run goes on; the one before says when training ended last.
    training = {"dag": "training_pipeline"}
    assert found.get_sample_value("lawnwatch_dag_run_start_timestamp_seconds", training) == 1795262400.0
    assert found.get_sample_value("lawnwatch_dag_run_end_timestamp_seconds", training) == 1795255200.0
    assert airflow.tokens == 1, "one login for all scrapes"


def test_a_run_that_is_stuck_is_told_though_the_next_one_waits(
    settings: Settings, catalog: Catalog, airflow: Airflow
) -> None:
    """One run of a DAG at a time: what is due meanwhile is queued, and the newest."""
    airflow.runs["training_pipeline"].append(run("queued", None, due="2026-11-21T20:00:00Z"))
    found = registry(settings, catalog, airflow.url)
    training = {"dag": "training_pipeline"}
    assert found.get_sample_value("lawnwatch_dag_run_state", training | {"state": "queued"}) == 1
    assert found.get_sample_value("lawnwatch_dag_run_start_timestamp_seconds", training) == 1795262400.0

    airflow.runs["training_pipeline"][1] |= {"state": "success", "end_date": "2026-11-21T21:00:00Z"}
    assert found.get_sample_value("lawnwatch_dag_run_start_timestamp_seconds", training) is None, "none goes on"


def test_a_token_that_ran_out_is_asked_for_anew(settings: Settings, catalog: Catalog, airflow: Airflow) -> None:
    found = registry(settings, catalog, airflow.url)
    generate_latest(found)
    airflow.valid = "another"
    assert found.get_sample_value("lawnwatch_source_up", {"source": "airflow"}) == 1
    assert airflow.tokens == 2


def test_fault_48_an_airflow_that_is_down_is_a_zero_and_its_password_is_nowhere(
    settings: Settings, catalog: Catalog, airflow: Airflow, capfd: pytest.CaptureFixture[str]
) -> None:
    airflow.server.shutdown()
    airflow.server.server_close()
    text = generate_latest(registry(settings, catalog, airflow.url)).decode()
    assert 'lawnwatch_source_up{source="airflow"} 0.0' in text
    assert 'lawnwatch_source_up{source="catalog"} 1.0' in text
    assert "swordfish" not in text + "".join(capfd.readouterr())
