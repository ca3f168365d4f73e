"""The five container images as they were built: `make images`, then `make test-images`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cluster import ROOT, until

pytestmark = pytest.mark.images

REGISTRY = os.environ.get("LAWNWATCH_TEST_REGISTRY", "lawnwatch")
TAG = os.environ.get("LAWNWATCH_TEST_TAG", "0.1.0")
MEGABYTE = 1_000_000
TOOLS = "gcc cc g++ c++ make cmake ninja ld as go git pip pip3 uv"
# Something of each that must be in its list of parts.
PARTS = {
    "api": "pkg:pypi/ai-edge-litert@",
    "webapp": "pkg:pypi/streamlit@",
    "pipeline": "pkg:pypi/apache-airflow@",
    "mlflow": "pkg:pypi/mlflow@",
    "minio": "pkg:golang/github.com/minio/minio@",
}
# What training and serving see of each picture, as one hash.
SEEN = """
import hashlib, pathlib
from lawnwatch import images
seen = hashlib.sha256()
for path in sorted(pathlib.Path("/photos").glob("*/*.jpg")):
    for size in (images.SIZE, None):
        rgb = images.decode(path.read_bytes(), size=size, max_pixels=50_000_000)
        seen.update(rgb.tobytes() + repr(images.light_and_blur(rgb)).encode())
print(seen.hexdigest())
"""
every_image = pytest.mark.parametrize("name", PARTS)


def docker(*words: str) -> str:
    return subprocess.run(["docker", *words], check=True, capture_output=True, text=True, timeout=300).stdout


def facts(name: str) -> Any:
    return json.loads(docker("image", "inspect", f"{REGISTRY}/{name}:{TAG}"))[0]


def run(name: str, *words: str, options: tuple[str, ...] = ()) -> str:
    """What a program says in the image, as it is deployed: read-only, without capabilities, here without a network."""
    program, *arguments = words
    return docker("run", "--rm", "--network=none", "--read-only", "--cap-drop=ALL", "--tmpfs=/tmp", *options,
                  f"--entrypoint={program}", f"{REGISTRY}/{name}:{TAG}", *arguments)  # fmt: skip


@every_image
def test_it_runs_as_nobody_in_particular_and_says_how_it_is(name: str) -> None:
    config = facts(name)["Config"]
    assert config["User"] == "10001:10001"
    assert run(name, "id", "-u").strip() == "10001"
    assert config["Healthcheck"]["Test"]
    labels = {key.rpartition(".")[2]: value for key, value in config["Labels"].items() if "opencontainers" in key}
    assert labels["title"] == f"lawnwatch-{name}"
    assert labels["version"] == TAG
    assert len(labels["revision"]) == 40


@pytest.mark.parametrize("name", ["api", "webapp", "mlflow", "minio"])
def test_what_it_serves_is_found_healthy(name: str) -> None:
    """By the image's own check, which compose waits for; the pipeline image serves nothing by itself."""
    passwords = ("--env=MINIO_ROOT_USER=somebody", "--env=MINIO_ROOT_PASSWORD=some-long-password")
    container = docker("run", "--detach", "--network=none", "--read-only", "--cap-drop=ALL", "--tmpfs=/tmp",
                       *(passwords if name == "minio" else ()), f"{REGISTRY}/{name}:{TAG}").strip()  # fmt: skip
    try:
        until(
            f"{name} is healthy",
            120,
            lambda: docker("inspect", "--format={{.State.Health.Status}}", container).strip() == "healthy",
        )
    finally:
        docker("rm", "--force", "--volumes", container)


@every_image
def test_no_build_tool_is_left(name: str) -> None:
    assert run(name, "sh", "-c", f"for tool in {TOOLS}; do command -v $tool; done; true") == ""


@every_image
def test_its_user_can_write_to_its_own_folders_only(name: str) -> None:
    """Even where the root is not read-only, a process that is taken over cannot change what runs."""
    search = "find / -xdev -writable -not -type l -not -path '/proc/*' 2>/dev/null; true"
    found = docker("run", "--rm", "--network=none", "--entrypoint=sh", f"{REGISTRY}/{name}:{TAG}", "-c", search)
    own = {"/data", "/opt/airflow", "/var/lib/lawnwatch"} | {"/tmp", "/var/tmp", "/run/lock"}
    assert set(found.split()) <= own


@every_image
def test_its_list_of_parts_is_of_this_image(name: str) -> None:
    parts = json.loads((ROOT / f"dist/{name}-{TAG}.cdx.json").read_text())
    said = {each["name"]: each["value"] for each in parts["metadata"]["component"]["properties"]}
    assert said["image"] == facts(name)["Id"]
    found = [each["purl"] for each in parts["components"]]
    assert any(each.startswith(PARTS[name]) for each in found)
    assert any(each.startswith("pkg:deb/debian/libc6@") for each in found)


@every_image
def test_an_index_of_ones_own_is_in_no_layer(name: str) -> None:
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", f"{REGISTRY}/{name}:{TAG}")
    assert "PIP_INDEX_URL=http" not in history
    assert "UV_DEFAULT_INDEX=http" not in history


def test_the_api_is_small() -> None:
    assert facts("api")["Size"] <= 350 * MEGABYTE


def test_the_api_holds_what_serving_needs_and_no_more() -> None:
    absent = ("tensorflow", "airflow", "mlflow", "pandas", "sklearn", "matplotlib")
    code = f"import importlib.util as u; print([name for name in {absent} if u.find_spec(name)])"
    assert run("api", "python", "-c", code).strip() == "[]"
    assert "--host" in run("api", "lawnwatch", "serve", "--help")


def test_training_and_serving_see_the_same_pixels(photos: Path) -> None:
    """The API's OpenCV is built from source, without what it does not need; training has the published wheel."""
    mount = (f"--volume={photos}:/photos:ro",)
    seen = {name: run(name, "python", "-c", SEEN, options=mount) for name in ("api", "pipeline")}
    assert seen["api"] == seen["pipeline"]
