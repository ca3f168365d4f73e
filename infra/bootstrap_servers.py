"""Make what the platform needs on an empty MySQL and an empty object store; running it again changes nothing.

    python bootstrap_servers.py secrets      # the Secrets that a Kubernetes namespace is missing
    python bootstrap_servers.py databases    # three databases, each with a user of its own
    python bootstrap_servers.py buckets      # three buckets, each with a key of its own (MinIO)
    python bootstrap_servers.py wait         # until Airflow's database has been made and migrated once

They read their addresses and passwords from the environment, and set the passwords anew when they have changed.
"""

from __future__ import annotations

import base64
import json
import os
import secrets as randomness
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")
WAIT_SECONDS = 600
DATABASES = {"lawnwatch": "LAWNWATCH", "airflow": "AIRFLOW", "mlflow": "MLFLOW"}
BUCKETS = {"lawnwatch": "LAWNWATCH", "airflow-logs": "AIRFLOW", "mlflow": "MLFLOW"}


def main() -> None:
    jobs: dict[str, Callable[[], None]] = {
        "secrets": secrets,
        "databases": databases,
        "buckets": buckets,
        "wait": wait,
    }
    if len(sys.argv) < 2 or not set(sys.argv[1:]) <= jobs.keys():
        sys.exit(__doc__)
    for name in sys.argv[1:]:
        jobs[name]()


def secrets() -> None:
    """NAMESPACE, and SECRETS: a JSON object of names with their keys. A password that is there stays."""
    import kubernetes.config
    from kubernetes import client

    kubernetes.config.load_config()
    api, namespace = client.CoreV1Api(), os.environ["NAMESPACE"]
    for name, keys in json.loads(os.environ["SECRETS"]).items():
        metadata = {"name": name, "labels": {"app.kubernetes.io/part-of": "lawnwatch"}}
        try:
            api.create_namespaced_secret(namespace, {"metadata": metadata, "stringData": _new(keys)})
            print(f"Secret {name} was made")
        except client.ApiException as error:
            if error.status != 409:
                raise
            there = api.read_namespaced_secret(name, namespace).data or {}
            missing = [key for key in keys if key not in there]
            if missing:
                api.patch_namespaced_secret(name, namespace, {"stringData": _new(missing)})
            print(f"Secret {name} is there" + (f", with {len(missing)} new keys" if missing else ""))


def _new(keys: list[str]) -> dict[str, str]:
    return {
        key: base64.urlsafe_b64encode(randomness.token_bytes(32)).decode()
        if key == "fernet-key"
        else randomness.token_hex(20)
        for key in keys
    }


def databases() -> None:
    """MYSQL_HOST, MYSQL_PORT, MYSQL_ROOT_PASSWORD, and <NAME>_DATABASE_PASSWORD of each user."""
    import pymysql

    host, port = os.environ["MYSQL_HOST"], int(os.environ.get("MYSQL_PORT", "3306"))

    def connect() -> pymysql.Connection:
        try:
            return pymysql.connect(
                host=host, port=port, user="root", password=_secret("MYSQL_ROOT_PASSWORD"), connect_timeout=5
            )
        except pymysql.err.OperationalError as error:
            if error.args[0] != pymysql.constants.ER.ACCESS_DENIED_ERROR:
                raise
            sys.exit(
                f"MySQL at {host}:{port} refuses root's password: its volume was made with another. "
                "Put that one back into .env or the Secret, or begin with an empty volume."
            )

    connection = _wait(f"MySQL at {host}:{port}", connect, pymysql.err.OperationalError)
    with connection, connection.cursor() as cursor:
        for name, prefix in DATABASES.items():
            password = _secret(f"{prefix}_DATABASE_PASSWORD")
            cursor.execute(f"CREATE DATABASE IF NOT EXISTS `{name}` CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci")
            cursor.execute("CREATE USER IF NOT EXISTS %s@'%%' IDENTIFIED BY %s", (name, password))
            cursor.execute("ALTER USER %s@'%%' IDENTIFIED BY %s", (name, password))
            cursor.execute(f"GRANT ALL PRIVILEGES ON `{name}`.* TO %s@'%%'", (name,))
            print(f"database {name} is there, with its user")


def buckets() -> None:
    """S3_ENDPOINT, S3_REGION when it is not us-east-1, MINIO_ROOT_USER, MINIO_ROOT_PASSWORD, and
    <NAME>_STORE_SECRET_KEY of each bucket's key."""
    import urllib3
    from minio import Minio
    from minio.credentials import StaticProvider
    from minio.error import S3Error
    from minio.minioadmin import MinioAdmin

    endpoint = urlsplit(os.environ["S3_ENDPOINT"])
    user, password = _secret("MINIO_ROOT_USER"), _secret("MINIO_ROOT_PASSWORD")
    secure = endpoint.scheme == "https"
    http = urllib3.PoolManager(timeout=10, retries=2)
    region = os.environ.get("S3_REGION", "us-east-1")
    client = Minio(endpoint.netloc, user, password, secure=secure, region=region, http_client=http)
    admin = MinioAdmin(
        endpoint=endpoint.netloc, credentials=StaticProvider(user, password), secure=secure, http_client=http
    )

    def ask() -> None:
        try:
            client.list_buckets()
        except S3Error as error:
            if error.code not in ("SignatureDoesNotMatch", "InvalidAccessKeyId"):
                raise
            sys.exit(
                f"MinIO at {endpoint.netloc} refuses root's password ({error.code}): it was started with another. "
                "Restart it, so that it takes the one of .env or the Secret, or put that other one back."
            )

    _wait(f"S3 at {endpoint.netloc}", ask, (urllib3.exceptions.HTTPError, S3Error))
    for bucket, prefix in BUCKETS.items():
        if not client.bucket_exists(bucket):
            client.make_bucket(bucket)
        whole = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
        allowed = {"Effect": "Allow", "Action": ["s3:*"], "Resource": whole}
        admin.policy_add(bucket, policy={"Version": "2012-10-17", "Statement": [allowed]})
        admin.user_add(bucket, _secret(f"{prefix}_STORE_SECRET_KEY"))
        admin.policy_set(bucket, user=bucket)
        print(f"bucket {bucket} is there, with its key")


def wait() -> None:
    """AIRFLOW__DATABASE__SQL_ALCHEMY_CONN. Starting Airflow only to be told "not yet" costs ten seconds of CPU."""
    import sqlalchemy as sa

    engine = sa.create_engine(os.environ["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"], poolclass=sa.pool.NullPool)
    migrated = sa.text("SELECT version_num FROM alembic_version")

    def ask() -> object:
        with engine.connect() as connection:
            return connection.execute(migrated).one()

    _wait("Airflow's database", ask, sa.exc.SQLAlchemyError)


def _wait(what: str, ask: Callable[[], T], refusals: type[Exception] | tuple[type[Exception], ...]) -> T:
    """What `ask` returns once the server answers; ends the program when it does not in time."""
    end = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return ask()
        except refusals as error:
            if time.monotonic() > end:
                sys.exit(f"{what} does not answer: {error}")
            print(f"waiting for {what}: {error}", file=sys.stderr)
            time.sleep(2)


def _secret(name: str) -> str:
    """A password from the environment, or from the file that <NAME>_FILE names. Blank or known to all ends it."""
    from lawnwatch.config import PLACEHOLDERS

    file = os.environ.get(f"{name}_FILE")
    value = Path(file).read_text().strip() if file else os.environ.get(name, "")
    if not value:
        sys.exit(f"{name} is not set; `make secrets` or the chart makes it.")
    if name != "MINIO_ROOT_USER" and value.lower() in PLACEHOLDERS:
        sys.exit(f"{name} is well-known; choose one of your own.")
    return value


if __name__ == "__main__":
    main()
