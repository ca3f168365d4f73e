"""The servers that the integration tests lean on are real, and separate tests get separate databases."""

from __future__ import annotations

import urllib.request

import pytest
from sqlalchemy import create_engine, text

pytestmark = pytest.mark.integration


def test_mariadb_is_real_and_every_database_is_new(mariadb_server):
    first, second = mariadb_server.fresh(), mariadb_server.fresh()
    assert first != second
    with create_engine(first).begin() as connection:
        assert "MariaDB" in connection.execute(text("SELECT VERSION()")).scalar_one()
        connection.execute(text("CREATE TABLE t (a INT)"))
    with create_engine(second).begin() as connection:
        assert connection.execute(text("SHOW TABLES")).all() == []


def test_minio_is_real(minio):
    from minio import Minio

    client = Minio(
        minio.endpoint.removeprefix("http://"),
        access_key=minio.access_key,
        secret_key=minio.secret_key,
        secure=False,
    )
    client.make_bucket("probe")
    assert "probe" in {bucket.name for bucket in client.list_buckets()}


def test_mlflow_answers(mlflow_server):
    with urllib.request.urlopen(f"{mlflow_server}/version", timeout=5) as response:
        assert response.read().decode().startswith("3.")
