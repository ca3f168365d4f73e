"""A MySQL that takes encrypted connections only, asked with the URLs that the chart renders for it.

mysqlclient and aiomysql, Airflow's drivers, are in the pipeline image and in no development environment: the test that
connects with them runs them there (`make test-images`).
"""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings
from lawnwatch.errors import SettingsError, Unavailable
from processes import program

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
ALIAS = "127.1"  # reaches 127.0.0.1, and is not what the certificate says
CIPHER = sa.text("SHOW STATUS LIKE 'Ssl_cipher'")


@dataclass
class Server:
    """A MariaDB with require_secure_transport, its CA's file and that of a CA it has nothing to do with."""

    url: str
    ca: Path
    other: Path

    def ask(self, name: str, ca: Path) -> sa.URL:
        """The URL that the chart gives to those who read `name`, for this server and this CA."""
        rendered = sa.make_url(_environment()[name])
        there = sa.make_url(self.url)
        if "ssl_ca" in rendered.query:
            rendered = rendered.update_query_dict({"ssl_ca": str(ca)})
        return rendered.set(
            username=there.username, password=there.password, host=there.host, port=there.port, database=there.database
        )


def _environment() -> dict[str, str]:
    """Everything that the chart sets in any pod, for a MySQL with a CA of its own."""
    rendered = subprocess.run(
        [program("helm", str(Path.home() / ".cache/lawnwatch/bin/helm")), "template", "lawnwatch",
         str(ROOT / "helm/lawnwatch"), "--kube-version=1.34.0",
         "--set", "mysql.enabled=false,mysql.host=db.example,mysql.caSecret=ca,secrets.mysql=mine"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return {
        one["name"]: one["value"]
        for each in yaml.safe_load_all(rendered) if each and each["kind"] in ("Deployment", "Job")
        for container in each["spec"]["template"]["spec"]["containers"]
        for one in container.get("env", []) if "value" in one
    }  # fmt: skip


@pytest.fixture
def server(tmp_path: Path, start_mariadb: Callable[..., Any]) -> Server:
    key, ca = _authority(tmp_path / "ours.crt")
    _authority(tmp_path / "other.crt")
    _certificate(tmp_path / "server", key, ca)
    started = start_mariadb(
        f"--ssl-cert={tmp_path / 'server.crt'}", f"--ssl-key={tmp_path / 'server.key'}", "--require-secure-transport=ON"
    )
    return Server(started.fresh(), tmp_path / "ours.crt", tmp_path / "other.crt")


def _authority(file: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key, name = ec.generate_private_key(ec.SECP256R1()), _name(file.stem)
    certificate = (
        _valid(x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file.write_bytes(certificate.public_bytes(Encoding.PEM))
    return key, certificate


def _certificate(file: Path, signer: ec.EllipticCurvePrivateKey, ca: x509.Certificate) -> None:
    """For the address 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateBuilder().subject_name(_name("server")).issuer_name(ca.subject)
    loopback = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = _valid(builder.public_key(key.public_key())).add_extension(loopback, critical=False)
    file.with_suffix(".crt").write_bytes(made.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM))
    file.with_suffix(".key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _valid(builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
    now, day = datetime.now(UTC), timedelta(days=1)
    return builder.serial_number(x509.random_serial_number()).not_valid_before(now - day).not_valid_after(now + day)


def _catalog(home: Path, url: sa.URL) -> Catalog:
    return Catalog(Settings(home=home, database_url=url.render_as_string(hide_password=False)))


def test_catalog_and_mlflow_connect_with_the_servers_ca_and_all_else_is_told_what_to_do(
    server: Server, tmp_path: Path
) -> None:
    from mlflow.store.db.utils import create_sqlalchemy_engine

    def mlflow(ca: Path) -> sa.Engine:
        url = server.ask("MLFLOW_BACKEND_STORE_URI", ca)
        engine: sa.Engine = create_sqlalchemy_engine(url.render_as_string(hide_password=False))
        return engine

    url = server.ask("LAWNWATCH_DATABASE_URL", server.ca)
    catalog = _catalog(tmp_path, url)
    catalog.migrate()
    with catalog.session() as session:
        assert session.execute(CIPHER).one()[1]
    with mlflow(server.ca).connect() as connection:
        assert connection.execute(CIPHER).one()[1]

    with pytest.raises(Unavailable, match="CA of LAWNWATCH_DATABASE_URL did not sign"):
        _catalog(tmp_path, server.ask("LAWNWATCH_DATABASE_URL", server.other)).migrate()
    with pytest.raises(sa.exc.OperationalError, match="certificate verify failed"):
        mlflow(server.other).connect()
    with pytest.raises(Unavailable, match="for another host"):
        _catalog(tmp_path, url.set(host=ALIAS)).migrate()
    with pytest.raises(SettingsError, match=r"ssl_ca.* not there"):
        _catalog(tmp_path, server.ask("LAWNWATCH_DATABASE_URL", tmp_path / "gone.crt"))
    with pytest.raises(Unavailable) as refused:
        _catalog(tmp_path, url.set(query={"ssl_disabled": "true"})).migrate()
    assert "add ?ssl_ca=FILE" in refused.value.hint


def test_airflows_asynchronous_driver_is_given_the_ca_of_the_other_url(tmp_path: Path) -> None:
    """In a process of its own: Airflow's configuration is one for a whole process, its logging too."""
    ca = tmp_path / "ours.crt"
    _authority(ca)
    module, _, attribute = _environment()["AIRFLOW__DATABASE__SQL_ALCHEMY_CONNECT_ARGS_ASYNC"].rpartition(".")
    code = (
        "import json, os, airflow.configuration;"  # before it reads of a MySQL, for which it wants mysqlclient
        f"os.environ['AIRFLOW__DATABASE__SQL_ALCHEMY_CONN'] = 'mysql://a:x@db.example/a?ssl_ca={ca}';"
        f"from {module} import {attribute} as found; context = found['ssl'];"
        "print(json.dumps([[one['subject'] for one in context.get_ca_certs()], context.verify_mode.name,"
        " context.check_hostname]))"
    )
    environment = os.environ | {"AIRFLOW_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    authorities, mode, named = json.loads(done.stdout.splitlines()[-1])
    assert authorities == [[[["commonName", "ours"]]]]
    assert (mode, named) == ("CERT_REQUIRED", True)


@pytest.mark.images
def test_airflow_connects_with_the_servers_ca_and_with_no_other(server: Server) -> None:
    def asked(ca: Path, host: str = "127.0.0.1") -> Any:
        urls = {
            name: server.ask(name, Path("/ca.crt")).set(host=host).render_as_string(hide_password=False)
            for name in ("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_ASYNC")
        }
        environment = [f"--env={name}={url}" for name, url in urls.items()]
        image = os.environ.get("LAWNWATCH_TEST_REGISTRY", "lawnwatch") + "/pipeline:0.1.0"
        argv = ["docker", "run", "--rm", "--network=host", "--tmpfs=/tmp", "--tmpfs=/opt/airflow:uid=10001",
                f"--volume={ca}:/ca.crt:ro", *environment, "--entrypoint=python", image, "-c", ASKS]  # fmt: skip
        return json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()[-1])

    ciphers = asked(server.ca)
    assert all("TLS" in cipher for cipher in ciphers), ciphers
    for refused, refused_too in (asked(server.other), asked(server.ca, host=ALIAS)):
        assert "certificate" in refused.lower()
        assert "Can't connect" in refused_too  # all that aiomysql says of it


# What both drivers, Airflow's and its asynchronous one, say of their connection, or why they have none.
ASKS = """
import asyncio, json, os
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from lawnwatch.airflow_tls import connect_args

name, cipher = "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", sa.text("SHOW STATUS LIKE 'Ssl_cipher'")

def one():
    with sa.create_engine(os.environ[name]).connect() as connection:
        return connection.execute(cipher).one()[1]

async def other():
    async with create_async_engine(os.environ[name + "_ASYNC"], connect_args=connect_args).connect() as connection:
        return (await connection.execute(cipher)).one()[1]

said = []
for ask in (one, lambda: asyncio.run(other())):
    try:
        said.append(ask())
    except Exception as error:
        said.append(f"{error} {error.__cause__}")
print(json.dumps(said))
"""
