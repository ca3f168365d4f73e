"""The import rules of pyproject.toml hold, cover every module, and would notice a breach."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
RULES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]


def lint(config: Path, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--config", config, "--no-cache"],
        capture_output=True,
        text=True,
        cwd=path,
        env=os.environ | {"PYTHONPATH": str(path)},
    )


def test_imports_point_up_the_road_and_heavy_packages_have_few_doors() -> None:
    result = lint(ROOT / "pyproject.toml", ROOT / "src")
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_module_has_its_place_on_the_road() -> None:
    placed = {layer.removeprefix("lawnwatch.") for layer in RULES["contracts"][0]["layers"]}
    entry = {"__init__", "__main__", "migrations", "__pycache__", "py"}
    modules = {file.name.split(".")[0] for file in (ROOT / "src/lawnwatch").iterdir()} - entry
    assert modules == placed


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("store", "from lawnwatch import train", "Imports point up the road"),
        ("images", "import tensorflow", "TensorFlow only in"),
        ("ingest", "def later():\n    from minio import Minio", "The minio client only in store"),
        ("release", "import mlflow", "MLflow only in train and registry"),
        ("cli", "import airflow.sdk", "Airflow only in pipeline"),
        ("predictions", "import streamlit", "The web page is a client"),
    ],
)
def test_a_breach_is_noticed(tmp_path: Path, module: str, line: str, contract: str) -> None:
    """The same rules on a package of the same module names, empty but for one forbidden line."""
    package = tmp_path / "lawnwatch"
    package.mkdir()
    for layer in RULES["contracts"][0]["layers"]:
        (package / f"{layer.removeprefix('lawnwatch.')}.py").touch()
    (package / "__init__.py").touch()
    (package / f"{module}.py").write_text(line + "\n")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    result = lint(tmp_path / "pyproject.toml", tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    (broken,) = [each for each in result.stdout.splitlines() if each.endswith("BROKEN")]
    assert broken.startswith(contract)


def test_one_import_of_the_command_line_loads_nothing_heavy() -> None:
    """`lawnwatch --help`, and every short step, must not pay for TensorFlow, MLflow, Airflow or the database."""
    script = (
        "import sys, lawnwatch.cli\n"
        "heavy = {'tensorflow', 'keras', 'mlflow', 'airflow', 'sklearn', 'pyarrow', 'sqlalchemy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
