"""The compose file as it is written; tests/e2e/test_compose.py brings it up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]


def test_every_port_is_on_loopback_and_can_be_moved_by_a_name_that_the_docs_know() -> None:
    """Another Grafana or Prometheus on the machine must not keep the platform from coming up."""
    documented = set(re.findall(r"`([A-Z_]+_PORT)`", (ROOT / "docs/compose.md").read_text()))
    names = []
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            found = re.fullmatch(r"127\.0\.0\.1:\$\{([A-Z_]+_PORT):-\d+\}:\d+", port)
            assert found, (name, port)
            names.append(found[1])
    assert len(names) == len(set(names))
    assert set(names) == documented


def test_whatever_asks_the_api_has_its_key() -> None:
    asking = {name for name, each in SERVICES.items() if "LAWNWATCH_API_URL" in each.get("environment", {})}
    assert {"webapp", "webapp-dev"} <= asking
    assert not [name for name in asking if "LAWNWATCH_API_KEY" not in SERVICES[name]["environment"]]


def test_every_python_module_that_a_service_runs_is_in_its_image() -> None:
    """An image holds what its requirements pin, the standard library and lawnwatch; a package may leave the pins."""
    ran = []
    for name, service in SERVICES.items():
        parts = [service.get("entrypoint"), service.get("command"), service.get("healthcheck", {}).get("test")]
        words = " ".join(word for part in parts for word in part or ()).split()
        modules = [words[at + 2] for at in range(len(words) - 2) if words[at : at + 2] == ["python", "-m"]]
        for module in modules:
            image = re.fullmatch(r"\$\{REGISTRY:-lawnwatch\}/(\w+):.+", service["image"])
            assert image, f"{name}: which Python would an image of others have?"
            assert module in _modules(image[1]), (name, module)
            ran.append((name, module))
    assert ("bootstrap", "mlflow") in ran
    assert ("api-dev", "lawnwatch") in ran


def _modules(image: str) -> set[str]:
    recipe = (ROOT / f"docker/{image}.Dockerfile").read_text()
    (pins,) = re.findall(r"--python /opt/venv/bin/python --require-hashes -r (requirements/\w+\.txt)", recipe)
    packages = re.findall(r"^([\w.-]+)==", (ROOT / pins).read_text(), re.MULTILINE)
    return {package.replace("-", "_") for package in packages} | sys.stdlib_module_names | {"lawnwatch"}


def test_every_file_of_this_checkout_that_a_service_mounts_is_there() -> None:
    """Docker makes a folder in the place of a file that is missing."""
    mounted = [volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])]
    here = [path for path in mounted if path.startswith("./")]
    assert "./infra/reload.py" in here
    assert not [path for path in here if not (ROOT / path).exists()]


@pytest.mark.parametrize("password", ["Zx9!kQ", 'a"b\\c', "ünder%s $HOME"])
def test_airflow_knows_whatever_password_its_admin_chose(password: str, tmp_path: Path) -> None:
    """In the compose file and in the chart's manifests alike: the file is JSON."""
    pods = yaml.safe_load_all((ROOT / "k8s/base/airflow.yaml").read_text())
    (deployed,) = [each["spec"]["template"]["spec"]["containers"][0] for each in pods
                   if each["kind"] == "Deployment" and each["metadata"]["name"] == "lawnwatch-airflow-api"]  # fmt: skip
    composed = SERVICES["airflow-api"]["command"][2].replace("$$", "$")
    for script in (deployed["command"][2], composed):
        file = tmp_path / "passwords.json"
        script = script.replace("/opt/airflow/passwords.json", str(file)).replace("exec airflow api-server", "env")
        ran = subprocess.run(
            ["sh", "-c", script], env={"PATH": os.environ["PATH"], "ADMIN_PASSWORD": password},
            capture_output=True, text=True,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        assert json.loads(file.read_text()) == {"admin": password}
        assert file.stat().st_mode & 0o077 == 0
        assert "ADMIN_PASSWORD" not in ran.stdout
        file.unlink()
