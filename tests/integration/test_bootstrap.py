"""Buckets, keys and Secrets on empty servers: made again nothing changes, and no key opens another's door."""

from __future__ import annotations

import base64
import http.server
import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from minio import Minio as Client
from minio.error import S3Error

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
OWNERS = {"lawnwatch": "LAWNWATCH", "airflow-logs": "AIRFLOW", "mlflow": "MLFLOW"}


def bootstrap(*what: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "infra/bootstrap_servers.py"), *what],
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("region", ["us-east-1", "eu-central-1"])
def test_each_bucket_has_a_key_that_opens_no_other(
    region: str, start_minio: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIO_REGION", region)  # as the chart's `minio.region`
    minio = start_minio()
    keys = {bucket: secrets.token_hex(20) for bucket in OWNERS}
    env = {
        "S3_ENDPOINT": minio.endpoint,
        "S3_REGION": region,
        "MINIO_ROOT_USER": minio.access_key,
        "MINIO_ROOT_PASSWORD": minio.secret_key,
    } | {f"{owner}_STORE_SECRET_KEY": keys[bucket] for bucket, owner in OWNERS.items()}
    for _ in range(2):
        done = bootstrap("buckets", **env)
        assert done.returncode == 0, done.stderr
    assert not [key for key in keys.values() if key in done.stdout + done.stderr]

    def client(bucket: str, key: str) -> Client:
        return Client(minio.endpoint.removeprefix("http://"), bucket, key, secure=False, region=region)

    for mine in OWNERS:
        for other in OWNERS:
            if mine == other:
                assert list(client(mine, keys[mine]).list_objects(other)) == []
            else:
                with pytest.raises(S3Error, match="Access Denied"):
                    list(client(mine, keys[mine]).list_objects(other))
    # A new password in the Secret is the key's from the next run on.
    assert bootstrap("buckets", **env | {"MLFLOW_STORE_SECRET_KEY": "a-new-one-of-forty-letters"}).returncode == 0
    with pytest.raises(S3Error):
        list(client("mlflow", keys["mlflow"]).list_objects("mlflow"))
    assert list(client("mlflow", "a-new-one-of-forty-letters").list_objects("mlflow")) == []


def test_49_a_blank_password_ends_it_before_anything_is_asked() -> None:
    done = bootstrap("buckets", S3_ENDPOINT="http://127.0.0.1:9", MINIO_ROOT_USER="")
    assert done.returncode == 1
    assert done.stderr.startswith("MINIO_ROOT_USER is not set")


def test_49_a_well_known_password_ends_it_before_anything_is_asked() -> None:
    done = bootstrap(
        "buckets", S3_ENDPOINT="http://127.0.0.1:9", MINIO_ROOT_USER="admin", MINIO_ROOT_PASSWORD="ChangeMe"
    )
    assert done.returncode == 1
    assert done.stderr == "MINIO_ROOT_PASSWORD is well-known; choose one of your own.\n"


def test_a_root_password_that_is_not_the_volumes_ends_it_with_what_to_do(mariadb_server: Any) -> None:
    """So it is when `.env` or a Secret was made anew beside a volume that was kept: waiting would change nothing."""
    done = bootstrap("databases", MYSQL_HOST="127.0.0.1", MYSQL_PORT=str(mariadb_server.port),
                     MYSQL_ROOT_PASSWORD="not-the-first-one")  # fmt: skip
    assert done.returncode == 1
    assert "refuses root's password" in done.stderr
    assert "not-the-first-one" not in done.stderr


@pytest.mark.parametrize("change", [{"MINIO_ROOT_PASSWORD": "not-what-it-began-with"}, {"MINIO_ROOT_USER": "nobody"}])
def test_a_root_password_that_minio_was_not_started_with_ends_it_with_what_to_do(
    change: dict[str, str], minio: Any
) -> None:
    root = {"MINIO_ROOT_USER": minio.access_key, "MINIO_ROOT_PASSWORD": minio.secret_key}
    done = bootstrap("buckets", S3_ENDPOINT=minio.endpoint, **root | change)
    assert done.returncode == 1
    assert "refuses root's password" in done.stderr and "Restart it" in done.stderr
    assert "not-what-it-began-with" not in done.stderr


class Namespace:
    """As much of Kubernetes' API as Secrets need; refuses what the Job's role would not allow."""

    def __init__(self) -> None:
        self.secrets: dict[str, dict[str, str]] = {}
        namespace = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def reply(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, body = namespace.answer(self.command, self.path, json.loads(raw) if raw else {})
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PATCH = reply  # noqa: N815 - the names that http.server looks for

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        base, _, name = path.partition("/api/v1/namespaces/farm/secrets")[2].partition("/")
        assert not base, path
        given = {key: base64.b64encode(value.encode()).decode() for key, value in body.get("stringData", {}).items()}
        if method == "POST":
            name = body["metadata"]["name"]
            if name in self.secrets:
                return 409, {"kind": "Status", "code": 409}
            self.secrets[name] = given
        elif method == "PATCH":
            self.secrets[name] |= given
        return 200, {"kind": "Secret", "metadata": {"name": name}, "data": self.secrets[name]}


@pytest.fixture
def namespace(tmp_path: Path) -> Iterator[Namespace]:
    namespace = Namespace()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "farm",
        "contexts": [{"name": "farm", "context": {"cluster": "farm", "user": "farm"}}],
        "clusters": [{"name": "farm", "cluster": {"server": f"http://127.0.0.1:{namespace.server.server_address[1]}"}}],
        "users": [{"name": "farm", "user": {}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    yield namespace
    namespace.server.shutdown()


def test_missing_secrets_are_made_once_and_missing_keys_added(namespace: Namespace, tmp_path: Path) -> None:
    def run(wanted: dict[str, list[str]]) -> str:
        done = bootstrap(
            "secrets", NAMESPACE="farm", SECRETS=json.dumps(wanted), KUBECONFIG=str(tmp_path / "kubeconfig")
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    said = run({"lawnwatch-airflow": ["fernet-key", "admin-password"]})
    made = dict(namespace.secrets["lawnwatch-airflow"])
    assert len(base64.urlsafe_b64decode(base64.b64decode(made["fernet-key"]))) == 32
    assert len(base64.b64decode(made["admin-password"])) >= 32
    run({"lawnwatch-airflow": ["fernet-key", "admin-password"]})
    assert namespace.secrets["lawnwatch-airflow"] == made
    said += run({"lawnwatch-airflow": ["fernet-key", "admin-password", "jwt-secret"]})
    assert namespace.secrets["lawnwatch-airflow"].items() > made.items()
    assert "jwt-secret" in namespace.secrets["lawnwatch-airflow"]
    # 48: what it says holds names and no password.
    assert not [each for each in made.values() if each in said or base64.b64decode(each).decode() in said]
