"""A real Prometheus and Alertmanager over a running platform: every panel has data, and a killed API is an alert.

The API serves on MariaDB and MinIO, the page and the exporter run beside it. Airflow is asked in
tests/e2e/test_cluster.py, as are the panels that show it.
"""

from __future__ import annotations

import http.server
import json
import re
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

import serving_bundle as sb
from api_process import form
from lawnwatch.catalog import Catalog, QualityReport, SnapshotRecord
from lawnwatch.config import Settings
from lawnwatch.registry import ChampionRow, VerdictRow
from lawnwatch.rollout import TARGET_KEY, ReleaseTarget, RolloutRow
from lawnwatch.store import open_store
from processes import Server, answers, free_port, program

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
OF_AIRFLOW = {"Airflow", "Last run of each pipeline"}
NOTHING_BAD_HAPPENED = {"Refused"}


class Receiver:
    """Where Alertmanager's webhook goes."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                receiver.seen += [
                    (alert["labels"]["alertname"] + " " + alert["labels"].get("job", ""), alert["status"])
                    for alert in body["alerts"]
                ]
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Platform:
    """The servers that Prometheus scrapes, each at the place that monitoring/prometheus.yml gives it."""

    def __init__(self, folder: Path, env: dict[str, str], minio: str) -> None:
        self.ports = {name: free_port() for name in
                      ("api", "exporter", "web", "web metrics", "node", "prometheus", "alerts")}  # fmt: skip
        url = {name: f"http://127.0.0.1:{port}" for name, port in self.ports.items()}
        self.url, self.receiver = url, Receiver()
        python = [sys.executable, "-m", "lawnwatch"]
        env = env | {"LAWNWATCH_HOME": str(folder / "home"), "LAWNWATCH_API_URL": url["api"]}
        self.api = Server([*python, "serve", "--port", str(self.ports["api"])],
                          partial(answers, url["api"] + "/ready"), folder / "api", env)  # fmt: skip
        self.exporter = Server(
            [*python, "exporter"], partial(answers, url["exporter"] + "/metrics"), folder / "exporter",
            env | {"LAWNWATCH_EXPORTER__PORT": str(self.ports["exporter"])},
        )  # fmt: skip
        self.web = Server(
            [sys.executable, str(ROOT / "webapp/serve.py"), f"--server.port={self.ports['web']}",
             "--server.address=127.0.0.1", "--server.headless=true", "--browser.gatherUsageStats=false"],
            partial(answers, url["web"] + "/_stcore/health"), folder / "web",
            env | {"LAWNWATCH_WEBAPP_METRICS_PORT": str(self.ports["web metrics"])},
        )  # fmt: skip
        self.node = Server(
            [program("node_exporter", "prometheus-node-exporter"),
             f"--web.listen-address=127.0.0.1:{self.ports['node']}"],
            partial(answers, url["node"] + "/metrics"), folder / "node",
        )  # fmt: skip
        self.alertmanager = Server(
            [program("alertmanager", "prometheus-alertmanager"), f"--config.file={self._alerting(folder)}",
             f"--storage.path={folder / 'alerts'}", "--cluster.listen-address=",
             f"--web.listen-address=127.0.0.1:{self.ports['alerts']}"],
            partial(answers, url["alerts"] + "/-/ready"), folder / "alertmanager",
        )  # fmt: skip
        self.prometheus = Server(
            [program("prometheus"), f"--config.file={self._scraping(folder, minio)}",
             f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address=127.0.0.1:{self.ports['prometheus']}"],
            partial(answers, url["prometheus"] + "/-/ready"), folder / "prometheus",
        )  # fmt: skip
        self.servers = [self.api, self.exporter, self.web, self.node, self.alertmanager, self.prometheus]

    def _alerting(self, folder: Path) -> Path:
        """The configuration that is shipped, with a receiver and without its patience."""
        config = yaml.safe_load((ROOT / "monitoring/alertmanager.yml").read_text())
        config["route"] |= {"group_wait": "1s", "group_interval": "1s"}
        config["receivers"][0]["webhook_configs"] = [{"url": self.receiver.url, "send_resolved": True}]
        (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))
        return folder / "alertmanager.yml"

    def _scraping(self, folder: Path, minio: str) -> Path:
        """The configuration that is shipped, with these addresses and a second for each of its minutes."""
        places = {
            "api": self.ports["api"], "exporter": self.ports["exporter"], "webapp": self.ports["web metrics"],
            "web-sessions": self.ports["web"], "node": self.ports["node"], "prometheus": self.ports["prometheus"],
        }  # fmt: skip
        at = {job: f"127.0.0.1:{port}" for job, port in places.items()} | {"minio": minio.removeprefix("http://")}
        config = yaml.safe_load((ROOT / "monitoring/prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(folder / "rules.yml")]
        config["alerting"]["alertmanagers"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{self.ports['alerts']}"]}]
        for each in config["scrape_configs"]:
            each["static_configs"] = [{"targets": [at[each["job_name"]]]}]
        rules = (ROOT / "monitoring/rules.yml").read_text()
        (folder / "rules.yml").write_text(re.sub(r"for: (\d+)m", r"for: \1s", rules))
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        return folder / "prometheus.yml"

    def query(self, expression: str) -> list[Any]:
        with urllib.request.urlopen(f"{self.url['prometheus']}/api/v1/query?query={quote(expression)}") as response:
            found: list[Any] = json.loads(response.read())["data"]["result"]
        return found

    def predict(self, picture: bytes) -> None:
        kind, body = form([("file", "p.jpg", picture)])
        request = urllib.request.Request(f"{self.url['api']}/predict", body, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=30) as response:
            assert response.status == 200


def eventually(what: str, seconds: float, ask: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not ask():
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.5)


def history(catalog: Catalog, model_name: str) -> None:
    """What the pipelines leave behind: an image, a snapshot, a report, a verdict, a champion and a rollout."""
    now = datetime.now(UTC)
    catalog.add("https://example.org/1.jpg", "grass")
    with catalog.session() as session:
        session.add(SnapshotRecord(id="a" * 64, created_at=now, counts={}, samples=False))
        session.add(QualityReport(id="b" * 32, created_at=now, passed=True, checks=[], object_key="reports/x.html"))
        session.add(
            ChampionRow(
                model_name=model_name, version=1, run_id="r", fingerprint="f", snapshot="a" * 64,
                previous_version=0, updated_at=now,
            )
        )  # fmt: skip
        session.add(
            RolloutRow(
                kind="start", model_version=1, sha256="c" * 64, target="{}", state="complete", reason="",
                controller="d" * 32, lease_until=now, started_at=now, finished_at=now,
            )
        )  # fmt: skip
        session.add(
            VerdictRow(
                run_id="r", champion_version=0, policy="p", fingerprint="f", snapshot="a" * 64, decision="promote",
                reason="the first", evaluation={"metrics": {"accuracy": {"value": 0.95}}}, created_at=now,
            )
        )  # fmt: skip


@pytest.fixture
def platform(
    tmp_path: Path,
    graphs: Path,
    mariadb: str,
    start_minio: Callable[[], Any],
    mlflow_server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Platform]:
    monkeypatch.setenv("MINIO_PROMETHEUS_AUTH_TYPE", "public")
    minio = start_minio()
    given = minio.settings("lawnwatch")
    settings = Settings(home=tmp_path / "home", database_url=mariadb, **given)
    catalog, store = Catalog(settings), open_store(settings)
    catalog.migrate()
    history(catalog, settings.model_name)
    released = sb.publish(store, graphs)
    target = ReleaseTarget.single(released.manifest.model_version, released.sha256)
    store.put(TARGET_KEY, target.to_bytes(), content_type="application/json")
    env = {f"LAWNWATCH_{name.upper()}": value for name, value in given.items()}
    env |= {"LAWNWATCH_DATABASE_URL": mariadb, "MLFLOW_TRACKING_URI": mlflow_server}
    running = Platform(tmp_path, env, minio.endpoint)
    try:
        for server in running.servers:
            server.start()
        yield running
    finally:
        for server in reversed(running.servers):
            server.stop()
        running.receiver.server.shutdown()


def test_52_every_panel_has_data_and_a_killed_api_is_an_alert_that_arrives_and_resolves(platform: Platform) -> None:
    for _ in range(10):
        platform.predict(sb.picture(sb.YELLOW))
    eventually("all targets answer", 60, lambda: len(platform.query("up == 1")) == 7)
    # MinIO computes what it says of its disks now and then.
    eventually("MinIO knows its size", 90, lambda: bool(platform.query("minio_cluster_capacity_usable_total_bytes")))
    for _ in range(10):
        platform.predict(sb.picture(sb.GREEN))
    time.sleep(3)
    assert _empty(platform) == []
    assert {each["metric"]["source"] for each in platform.query("lawnwatch_source_up == 1")} == {"catalog", "mlflow"}
    assert ("ServiceDown api", "firing") not in platform.receiver.seen

    platform.api.stop(signal.SIGKILL)
    eventually("the alert arrives", 60, lambda: ("ServiceDown api", "firing") in platform.receiver.seen)
    platform.api.start()
    eventually("it resolves", 60, lambda: ("ServiceDown api", "resolved") in platform.receiver.seen)


def _empty(platform: Platform) -> list[tuple[str, str]]:
    """Panels that ought to have data and have none."""
    return [
        (panel["title"], target["expr"])
        for file in sorted((ROOT / "monitoring/dashboards").glob("*.json"))
        for panel in json.loads(file.read_text())["panels"]
        for target in panel["targets"]
        if panel["title"] not in OF_AIRFLOW | NOTHING_BAD_HAPPENED
        and not platform.query(target["expr"].replace("$namespace", ".*"))  # as Grafana asks for all
    ]
