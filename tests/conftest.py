"""Fixtures that the whole suite shares: settings in a folder of their own, photographs, and real servers.

A server whose program is missing fails the tests that need it: `infra/test-servers` installs them all.
Servers start once a session; a test that must break one asks for its own (`start_mariadb`, `start_minio`).
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

import samples
from lawnwatch import config
from lawnwatch.catalog import Catalog
from lawnwatch.store import LocalStore, open_store
from processes import Server, answers, free_port, program, served
from road import Road, build, quiet


class Together(LoadScopeScheduling):
    """With several workers, a file goes where there is room; files that share a trained model stay together."""

    TRAINED = ("test_approval", "test_gate", "test_model", "test_serving_real", "test_training_faults")

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.partition("::")[0]).stem
        return "trained" if file in self.TRAINED else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return Together(config, log)


DRAWN = 160  # pictures of a label: a test split of 64 is the smallest that can show that a model is not worse

# ── settings and data ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session", autouse=True)
def airflow_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Importing Airflow writes its configuration to AIRFLOW_HOME; never to the developer's own."""
    os.environ["AIRFLOW_HOME"] = str(tmp_path_factory.mktemp("airflow"))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No setting of the developer's shell reaches a test, except what is meant for tests."""
    for name in list(os.environ):
        if name == "MLFLOW_TRACKING_URI" or (
            name.startswith("LAWNWATCH_") and not name.startswith("LAWNWATCH_TEST_") and name != "LAWNWATCH_WEIGHTS"
        ):
            monkeypatch.delenv(name)
    config.get_settings.cache_clear()
    yield
    config.get_settings.cache_clear()


@pytest.fixture
def settings(tmp_path: Path, weights: str) -> config.Settings:
    """The embedded mode in a folder of its own."""
    return config.Settings(home=tmp_path / "home", weights=weights)


@pytest.fixture
def catalog(settings: config.Settings) -> Catalog:
    """The migrated catalog of those settings."""
    catalog = Catalog(settings)
    catalog.migrate()
    return catalog


@pytest.fixture
def store(settings: config.Settings) -> LocalStore:
    """The folder store of those settings."""
    opened = open_store(settings)
    assert isinstance(opened, LocalStore)
    return opened


@pytest.fixture(scope="session")
def weights() -> str:
    """LAWNWATCH_WEIGHTS, or `none`: a test never downloads."""
    return os.environ.get("LAWNWATCH_WEIGHTS") or "none"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `<label>/*.jpg`: real photographs from LAWNWATCH_TEST_PHOTOS, else drawn samples."""
    folder = os.environ.get("LAWNWATCH_TEST_PHOTOS")
    if folder:
        path = Path(folder).resolve()
        assert any(path.glob("*/*.jpg")), f"LAWNWATCH_TEST_PHOTOS={folder} holds no <label>/*.jpg"
        return path
    return samples.draw(tmp_path_factory.mktemp("photos"), DRAWN)


@pytest.fixture(scope="session")
def photo_web(photos: Path) -> Iterator[str]:
    """The photos on loopback, at `<photo_web>/<label>/<file>`; fetching needs allow_cidrs=["127.0.0.0/8"]."""

    with served(photos) as url:
        yield url


# ── a trained run ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, photos: Path, photo_web: str, weights: str) -> Road:
    """Photographs, a snapshot and a trained run; read it only."""
    return build(tmp_path_factory.mktemp("trained") / "home", photos, photo_web, weights)


@pytest.fixture
def road(trained: Road, tmp_path: Path) -> Road:
    """The same in a home of the test's own: no champion, no versions yet."""
    return trained.copy(tmp_path / "road")


@pytest.fixture(scope="session")
def _released(trained: Road, tmp_path_factory: pytest.TempPathFactory) -> Road:
    from lawnwatch import evaluate, registry, release

    road = trained.copy(tmp_path_factory.mktemp("released") / "home")
    verdict = evaluate.run(road.settings, road.catalog, road.store, road.result.run_id, progress=quiet)
    assert verdict.decision == "promote", verdict.reason
    registry.promote(road.settings, road.catalog, road.result.run_id)
    release.publish(road.settings, road.catalog, road.store, progress=quiet)
    return road


@pytest.fixture
def champion(_released: Road, tmp_path: Path) -> Road:
    """As `road`, and the run is champion, version 1, and released."""
    return _released.copy(tmp_path / "champion")


# ── MariaDB ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class MariaDb:
    """A real server on loopback; `fresh()` gives the URL of a new, empty database."""

    server: Server
    port: int
    password: str

    def fresh(self, prefix: str = "lawnwatch") -> str:
        import pymysql

        name = f"{prefix}_{secrets.token_hex(4)}"
        with (
            pymysql.connect(host="127.0.0.1", port=self.port, user="lawnwatch", password=self.password) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(f"CREATE DATABASE {name} CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci")
        return f"mysql+pymysql://lawnwatch:{self.password}@127.0.0.1:{self.port}/{name}"


def _start_mariadb(folder: Path, *options: str) -> MariaDb:
    import pymysql

    daemon, install = program("mariadbd"), program("mariadb-install-db")
    user = ["--user=root"] if os.geteuid() == 0 else []
    data, port, password = folder / "data", free_port(), secrets.token_urlsafe(18)
    subprocess.run(
        [install, "--no-defaults", f"--datadir={data}", "--auth-root-authentication-method=normal", *user,
         "--skip-test-db"],
        check=True,
        capture_output=True,
    )  # fmt: skip
    accounts = folder / "accounts.sql"  # one statement a line: all that --init-file reads
    accounts.write_text(
        f"CREATE USER lawnwatch@'127.0.0.1' IDENTIFIED BY '{password}';\n"
        "GRANT ALL ON *.* TO lawnwatch@'127.0.0.1';\n"
        "ALTER USER root@localhost IDENTIFIED BY '" + secrets.token_urlsafe(18) + "';\n"
    )
    # The socket is in /tmp: its path may hold about 100 characters, and pytest's folders can be longer.
    argv = [
        daemon, "--no-defaults", f"--datadir={data}", f"--port={port}", "--bind-address=127.0.0.1", *user,
        f"--socket=/tmp/lawnwatch-{port}.sock", "--skip-name-resolve", "--innodb-buffer-pool-size=64M",
        "--innodb-flush-log-at-trx-commit=2", f"--pid-file={folder / 'mariadbd.pid'}", *options,
    ]  # fmt: skip

    def ready() -> bool:
        try:
            pymysql.connect(host="127.0.0.1", port=port, user="lawnwatch", password=password, connect_timeout=2).close()
        except pymysql.Error:
            return False
        return True

    server = Server([*argv, f"--init-file={accounts}"], ready, folder / "log").start()
    server.argv = argv  # the accounts exist now
    return MariaDb(server, port, password)


@pytest.fixture(scope="session")
def mariadb_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDb]:
    """The session's MariaDB; leave it running."""
    mariadb = _start_mariadb(tmp_path_factory.mktemp("mariadb"))
    yield mariadb
    mariadb.server.stop()


@pytest.fixture
def mariadb(mariadb_server: MariaDb) -> str:
    """`mysql+pymysql://…` of a new, empty database."""
    return mariadb_server.fresh()


@pytest.fixture
def start_mariadb(tmp_path: Path) -> Iterator[Callable[..., MariaDb]]:
    """Start a private MariaDB, with these options, that the test may stop, freeze or kill."""
    started: list[MariaDb] = []

    def start(*options: str) -> MariaDb:
        folder = tmp_path / f"mariadb{len(started)}"
        folder.mkdir()
        started.append(_start_mariadb(folder, *options))
        return started[-1]

    yield start
    for mariadb in started:
        mariadb.server.stop(signal.SIGKILL)


# ── MinIO ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Minio:
    """A real S3 server on loopback; choose a bucket name of your own."""

    server: Server
    endpoint: str
    access_key: str
    secret_key: str

    def settings(self, bucket: str = "") -> dict[str, str]:
        """Keyword arguments of `Settings` for a bucket (a new one unless named)."""
        return {
            "store_url": f"s3://{bucket or 'bucket-' + secrets.token_hex(4)}",
            "store_endpoint": self.endpoint,
            "store_access_key": self.access_key,
            "store_secret_key": self.secret_key,
        }


def _start_minio(folder: Path) -> Minio:
    binary = program(
        "minio", os.environ.get("LAWNWATCH_TEST_MINIO", ""), str(Path.home() / ".cache/lawnwatch/bin/minio")
    )
    port, access, secret = free_port(), "lawnwatch-tests", secrets.token_urlsafe(18)
    server = Server(
        [binary, "server", str(folder / "data"), "--address", f"127.0.0.1:{port}", "--quiet"],
        partial(answers, f"http://127.0.0.1:{port}/minio/health/live"),
        folder / "log",
        {"MINIO_ROOT_USER": access, "MINIO_ROOT_PASSWORD": secret, "MINIO_BROWSER": "off"},
    ).start()
    return Minio(server, f"http://127.0.0.1:{port}", access, secret)


@pytest.fixture(scope="session")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Minio]:
    """The session's MinIO; leave it running."""
    minio = _start_minio(tmp_path_factory.mktemp("minio"))
    yield minio
    minio.server.stop()


@pytest.fixture
def start_minio(tmp_path: Path) -> Iterator[Callable[[], Minio]]:
    """Start a private MinIO that the test may stop, freeze or kill."""
    started: list[Minio] = []

    def start() -> Minio:
        folder = tmp_path / f"minio{len(started)}"
        folder.mkdir()
        started.append(_start_minio(folder))
        return started[-1]

    yield start
    for minio in started:
        minio.server.stop(signal.SIGKILL)


# ── MLflow and the browser ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real MLflow server that stores on SQLite and serves artifacts."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    server = Server(
        [sys.executable, "-m", "mlflow", "server", "--workers", "1",
         "--host", "127.0.0.1", "--port", str(port),
         "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
         "--artifacts-destination", f"file://{folder / 'artifacts'}"],
        partial(answers, f"http://127.0.0.1:{port}/health"),
        folder / "log",
        {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    ).start()  # fmt: skip
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a real Chromium."""
    return program("chromium", "chromium-browser", "google-chrome")
