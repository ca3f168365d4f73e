"""The workflow of GitHub as it is written; only GitHub runs it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
JOBS: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]


def commands(job: str) -> list[str]:
    """What its steps run, in order."""
    return [step["run"] for step in JOBS[job]["steps"]]


def test_the_smoke_test_sees_the_cluster_before_any_image_does() -> None:
    """It counts on pods whose images are not there, and leaves its namespace while that is being deleted."""
    steps = commands("cluster")
    (made,) = [at for at, run in enumerate(steps) if "kind create" in run]
    (smoke,) = [at for at, run in enumerate(steps) if "make test-cluster-smoke" in run]
    (loaded,) = [at for at, run in enumerate(steps) if "kind load" in run]
    (whole,) = [at for at, run in enumerate(steps) if re.search(r"make test-cluster\b(?!-)", run)]
    assert made < smoke < loaded < whole
    assert "make test-cluster-smoke && kubectl wait --for=delete namespace/lawnwatch" in steps[smoke]


def test_51_all_pins_but_opencvs_own_build_are_audited_and_one_of_which_nothing_is_known_is_an_error() -> None:
    assert "make audit" in commands("audit")
    would_run = subprocess.run(["make", "-n", "audit"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    audited = set(re.findall(r"requirements/\w+\.txt", would_run.partition("for pins in")[2]))
    pins = {f"requirements/{file.name}" for file in (ROOT / "requirements").glob("*.txt")}
    assert audited == pins - {"requirements/opencv.txt"}
    assert "pip-audit --strict --require-hashes --disable-pip " in would_run


def test_nothing_of_somebody_elses_runs_in_it() -> None:
    """An action is code with this repository's token; those there are would have to be pinned by hash."""
    assert not [step for job in JOBS.values() for step in job["steps"] if "uses" in step]
