"""What a real Kubernetes says of the plain manifests, without any image: `make test-cluster-smoke`, two minutes.

KUBECONFIG names the cluster. The tests are one story and run in order, in the namespace `lawnwatch`, which they make
and delete; one that is there already is left alone, and the tests fail.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import NAMESPACE, RELEASE, ROOT, until
from lawnwatch import rollout
from lawnwatch.catalog import Catalog
from lawnwatch.config import RolloutSettings, Settings
from lawnwatch.errors import RolloutFailed
from lawnwatch.rollout import kubernetes as place
from lawnwatch.store import open_store
from processes import program
from rollout_bundles import publish

pytestmark = [pytest.mark.cluster_smoke, pytest.mark.timeout(300)]

API = f"deployment/{RELEASE}-api"


def kubectl(*argv: str, stdin: bytes | None = None, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run([program("kubectl"), "-n", NAMESPACE, *argv], input=stdin, capture_output=True, timeout=200)
    assert not check or done.returncode == 0, done.stderr.decode()[-3000:]
    return done


def get(*argv: str) -> Any:
    return json.loads(kubectl("get", *argv, "-o", "json").stdout)


@pytest.fixture(scope="module", autouse=True)
def namespace() -> Iterator[None]:
    there = kubectl("get", "namespace", NAMESPACE, check=False).returncode == 0
    assert not there, f"the cluster has a namespace {NAMESPACE} already"
    yield
    kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait=false")


def test_the_manifests_apply_as_they_are_and_a_second_time_change_nothing() -> None:
    first = kubectl("apply", "-f", str(ROOT / "k8s"))
    assert first.stderr == b"", "such as a warning that a pod breaks the restricted standard"
    assert kubectl("diff", "-f", str(ROOT / "k8s")).stdout == b""  # kubectl's own word would be "configured" for some
    kubectl("apply", "-f", str(ROOT / "k8s"))


def test_every_part_may_have_its_pods() -> None:
    """The namespace enforces the restricted standard: a pod that breaks it is not made, and its owner says so."""

    def without() -> list[str]:
        parts = get("deployments,statefulsets")["items"]
        owners = {owner["name"] for pod in get("pods")["items"] for owner in pod["metadata"].get("ownerReferences", [])}
        return [
            part["metadata"]["name"]
            for part in parts
            if not any(owner.startswith(part["metadata"]["name"]) for owner in owners)
        ]

    until("every part has a pod", 60, lambda: not without() or None)
    refused = [
        event["message"] for event in get("events")["items"] if "violates PodSecurity" in event.get("message", "")
    ]
    assert refused == []


@pytest.mark.parametrize(
    ("account", "may", "verb", "what"),
    [
        ("rollout", True, "patch", API),
        ("rollout", True, "list", "pods"),
        ("rollout", False, "patch", f"deployment/{RELEASE}-webapp"),
        ("rollout", False, "delete", API),
        ("rollout", False, "get", "secrets"),
        ("airflow", True, "create", "pods"),
        ("airflow", False, "get", "secrets"),
        ("api", False, "list", "pods"),
        ("step", False, "list", "pods"),
        ("webapp", False, "get", "secrets"),
    ],
)
def test_50_each_account_may_do_what_it_needs_and_no_more(account: str, may: bool, verb: str, what: str) -> None:
    asked = kubectl(
        "auth", "can-i", verb, what, f"--as=system:serviceaccount:{NAMESPACE}:{RELEASE}-{account}", check=False
    )
    assert asked.stdout.decode().strip() == ("yes" if may else "no")


@pytest.fixture
def installation(tmp_path: Path) -> Settings:
    return Settings(
        home=tmp_path, rollout=RolloutSettings(target="kubernetes", namespace=NAMESPACE, deployment=f"{RELEASE}-api")
    )


def annotations() -> dict[str, str]:
    found = get(API)["spec"]["template"]["metadata"].get("annotations", {})
    return {key: value for key, value in found.items() if key in (place.VERSION, place.SHA256)}


def test_45_a_model_whose_pods_never_become_ready_is_undone_at_the_progress_deadline(installation: Settings) -> None:
    kubectl("patch", API, "--type=merge", "-p", '{"spec": {"progressDeadlineSeconds": 15}}')
    catalog, store = Catalog(installation), open_store(installation)
    catalog.migrate()
    with pytest.raises(RolloutFailed, match="progress deadline") as failed:
        rollout.target(installation, catalog, store).start(publish(store, 1))
    assert "ImagePull" in failed.value.message, "what its pods do"
    assert annotations() == {}
    assert [each.state for each in rollout.target(installation, catalog, store).history()] == ["failed"]


def test_6_applying_the_manifests_leaves_the_model_that_a_rollout_wrote() -> None:
    model = {place.VERSION: "7", place.SHA256: "a" * 64}
    kubectl("patch", API, "--type=merge", "-p",
            json.dumps({"spec": {"template": {"metadata": {"annotations": model}}}}))  # fmt: skip
    kubectl("apply", "-f", str(ROOT / "k8s"))
    assert annotations() == model
