"""Rollouts through the pod template, against a server that speaks as much of Kubernetes' API as they need.

What a Deployment's controller does is played: a good template comes up after some looks, a bad one never does. A real
controller is asked in tests/e2e/test_cluster.py.
"""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr

from lawnwatch import rollout
from lawnwatch.catalog import Catalog
from lawnwatch.config import RolloutSettings, Settings
from lawnwatch.errors import NotFound, RolloutFailed, SettingsError, Unavailable
from lawnwatch.rollout import kubernetes as place
from lawnwatch.store import open_store
from rollout_bundles import publish

pytestmark = pytest.mark.unit

DEPLOYMENT = "/apis/apps/v1/namespaces/farm/deployments/lawnwatch-api"
NOW = "2026-11-21T12:00:00Z"


class Farm:
    """A namespace with one Deployment, and the API behind its Service."""

    def __init__(self) -> None:
        self.annotations: dict[str, str] = {"team": "lawn"}
        self.generation = 1
        self.looks = 0
        self.never_ready: set[str] = set()
        self.wrong: set[str] = set()  # comes up and answers its golden pictures otherwise
        self.stalls = True  # Kubernetes says so at once, and not after the deadline
        self.refusal = 0
        self.key = ""  # the API key without which no picture is answered
        self.sent_key: str | None = None
        self.serving: dict[str, Any] | None = None
        self.patches: list[dict[str, Any]] = []
        self.kubernetes, self.api = self._server(self._kubernetes), self._server(self._api)

    # --- Kubernetes ---------------------------------------------------------------------------------------

    def _kubernetes(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if self.refusal:
            return self.refusal, {"kind": "Status", "code": self.refusal}
        if path.startswith("/api/v1/namespaces/farm/pods"):
            return 200, {"kind": "PodList", "items": [] if self.comes_up else [self._pod()]}
        if path != DEPLOYMENT:
            return 404, {"kind": "Status", "code": 404}
        if method == "PATCH":
            self.patches.append(body)
            before = dict(self.annotations)
            for key, value in body["spec"]["template"]["metadata"]["annotations"].items():
                self.annotations.pop(key, None)
                if value is not None:
                    self.annotations[key] = value
            if self.annotations != before:
                self.generation += 1
                self.looks = 0
        else:
            self.looks += 1
        return 200, self._deployment()

    @property
    def sha256(self) -> str:
        return self.annotations.get(place.SHA256, "")

    @property
    def comes_up(self) -> bool:
        return self.sha256 not in self.never_ready

    def _deployment(self) -> dict[str, Any]:
        seen = self.looks >= 2
        done = self.comes_up and self.looks >= 3
        if done and self.sha256:
            version = int(self.annotations[place.VERSION])
            self.serving = {"name": "lawnwatch", "version": version, "sha256": self.sha256}
        progressing = {
            "type": "Progressing",
            "status": "False" if self.stalls and not self.comes_up and self.looks >= 3 else "True",
            "lastUpdateTime": NOW,
        }
        return {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "lawnwatch-api", "namespace": "farm", "generation": self.generation},
            "spec": {
                "replicas": 2,
                "progressDeadlineSeconds": 1,
                "selector": {"matchLabels": {"app": "api"}},
                "template": {
                    "metadata": {"annotations": self.annotations},
                    "spec": {"containers": [{"name": "api"}]},
                },
            },
            "status": {
                # Right after a change the numbers are those of the generation before.
                "observedGeneration": self.generation if seen else self.generation - 1,
                "replicas": 2 if done or not seen else 3,
                "updatedReplicas": 2 if done or not seen else 1,
                "availableReplicas": 2,
                "conditions": [progressing],
            },
        }

    def _pod(self) -> dict[str, Any]:
        waiting = {"reason": "CrashLoopBackOff"}
        ended = {"exitCode": 137, "reason": "OOMKilled"}
        return {
            "metadata": {"name": "api-x", "annotations": self.annotations},
            "spec": {"containers": [{"name": "api"}]},
            "status": {
                "phase": "Running",
                "conditions": [{"type": "Ready", "status": "False"}],
                "containerStatuses": [{
                    "name": "api", "image": "", "imageID": "", "ready": False, "restartCount": 3,
                    "state": {"waiting": waiting}, "lastState": {"terminated": ended},
                }],
            },
        }  # fmt: skip

    # --- the API ------------------------------------------------------------------------------------------

    def _api(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if self.serving is None:
            return 503, {"code": "no_model"}
        if method == "POST":
            if self.key and self.sent_key != self.key:
                return 401, {"code": "unauthorized"}
            right = self.serving["sha256"] not in self.wrong
            return 200, {
                "model": self.serving,
                "probabilities": {"a": 1.0, "b": 0.0} if right else {"a": 0.0, "b": 1.0},
            }
        return 200, {"state": "ready", "model": self.serving, "golden": {"ok": True, "max_error": 0.0}}

    def _server(self, answer: Any) -> http.server.ThreadingHTTPServer:
        farm = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def reply(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                farm.sent_key = self.headers["X-API-Key"]
                body = json.loads(raw) if raw and self.command == "PATCH" else None
                status, found = answer(self.command, self.path.partition("?")[0], body)
                data = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PATCH = reply  # noqa: N815 - the names that http.server looks for

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server


def url(server: http.server.ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


class Installation:
    """A catalog and a store beside the farm, with three released versions."""

    def __init__(self, home: Path, farm: Farm) -> None:
        settings = Settings(home=home)
        on_cluster = RolloutSettings(target="kubernetes", namespace="farm")
        self.settings = settings.model_copy(update={"api_url": url(farm.api), "rollout": on_cluster})
        self.catalog, self.store = Catalog(settings), open_store(settings)
        self.catalog.migrate()
        self.v1, self.v2, self.v3 = (publish(self.store, version) for version in (1, 2, 3))

    def rollout(self) -> rollout.RolloutTarget:
        return rollout.target(self.settings, self.catalog, self.store)


def point_at(kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client reads KUBECONFIG once, when it is imported."""
    for module in ("kubernetes.config", "kubernetes.config.kube_config"):
        monkeypatch.setattr(f"{module}.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))


@pytest.fixture
def farm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Farm]:
    farm = Farm()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "farm",
        "contexts": [{"name": "farm", "context": {"cluster": "farm", "user": "farm"}}],
        "clusters": [{"name": "farm", "cluster": {"server": url(farm.kubernetes)}}],
        "users": [{"name": "farm", "user": {}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    point_at(tmp_path / "kubeconfig", monkeypatch)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(place, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(place, "GOLDEN_SECONDS", 0.2)
    yield farm
    farm.kubernetes.shutdown()
    farm.api.shutdown()


@pytest.fixture
def here(tmp_path: Path, farm: Farm) -> Installation:
    return Installation(tmp_path / "home", farm)


def test_a_rollout_names_the_model_in_the_pod_template_and_touches_nothing_else(farm: Farm, here: Installation) -> None:
    said: list[str] = []
    record = here.rollout().start(here.v1, progress=said.append)
    assert record.state == "complete"
    assert farm.annotations == {"team": "lawn", place.VERSION: "1", place.SHA256: here.v1.stable.sha256}
    assert {key: set(value) for key, value in farm.patches[0].items()} == {
        "metadata": {"annotations"},
        "spec": {"template"},
    }
    assert set(farm.patches[0]["spec"]["template"]) == {"metadata"}
    assert "the change is not seen yet" in " ".join(said), "numbers of the generation before were believed"
    assert here.rollout().status().target == here.v1


def test_the_same_model_again_makes_no_new_generation(farm: Farm, here: Installation) -> None:
    here.rollout().start(here.v1)
    generation = farm.generation
    here.rollout().start(here.v1)
    assert farm.generation == generation


def test_45_a_template_that_makes_no_progress_is_undone_and_the_reason_says_what_its_pods_do(
    farm: Farm, here: Installation
) -> None:
    here.rollout().start(here.v1)
    farm.never_ready.add(here.v2.stable.sha256)
    with pytest.raises(RolloutFailed, match="v1 goes on serving") as failed:
        here.rollout().start(here.v2)
    assert "progress deadline" in failed.value.message
    assert "CrashLoopBackOff, last ended by OOMKilled" in failed.value.message
    assert farm.annotations[place.VERSION] == "1"
    assert [one.state for one in here.rollout().history()] == ["failed", "complete"]


def test_45_a_deployment_that_never_says_it_stalled_is_given_up_by_the_callers_own_limit(
    farm: Farm, here: Installation
) -> None:
    here.rollout().start(here.v1)
    farm.never_ready.add(here.v2.stable.sha256)
    farm.stalls = False
    with pytest.raises(RolloutFailed, match="not complete within 0 s"):
        here.rollout().start(here.v2, timeout=0.3)
    assert farm.annotations[place.VERSION] == "1"


def test_pods_that_are_ready_and_answer_otherwise_are_undone(farm: Farm, here: Installation) -> None:
    here.rollout().start(here.v1)
    farm.wrong.add(here.v2.stable.sha256)
    with pytest.raises(RolloutFailed, match="golden answers through"):
        here.rollout().start(here.v2)
    assert farm.annotations[place.VERSION] == "1"


def test_an_api_that_requires_keys_is_shown_one(farm: Farm, here: Installation) -> None:
    farm.key = f"lw_{'0' * 16}_{'A' * 43}"
    with pytest.raises(RolloutFailed, match="LAWNWATCH_API_KEY"):
        here.rollout().start(here.v1)
    here.settings = here.settings.model_copy(update={"api_key": SecretStr(farm.key)})
    assert here.rollout().start(here.v1).state == "complete"


def test_the_first_model_that_fails_leaves_a_template_without_a_model(farm: Farm, here: Installation) -> None:
    farm.never_ready.add(here.v1.stable.sha256)
    with pytest.raises(RolloutFailed, match="no model before"):
        here.rollout().start(here.v1)
    assert farm.annotations == {"team": "lawn"}


def test_undo_after_somebody_else_undid_with_kubectl_goes_on_from_what_serves(farm: Farm, here: Installation) -> None:
    here.rollout().start(here.v1)
    here.rollout().start(here.v2)
    farm.annotations |= {place.VERSION: "1", place.SHA256: here.v1.stable.sha256}  # kubectl rollout undo
    farm.generation += 1
    assert here.rollout().status().target == here.v1
    assert here.rollout().start(here.v3).previous_version == 1


def test_a_template_that_somebody_changes_meanwhile_is_said(farm: Farm, here: Installation) -> None:
    here.rollout().start(here.v1)
    farm.never_ready.add(here.v2.stable.sha256)
    farm.stalls = False

    def meddle(line: str) -> None:
        if "waiting" in line:
            farm.annotations[place.SHA256] = here.v3.stable.sha256

    with pytest.raises(RolloutFailed, match="somebody else changed the pod template") as failed:
        here.rollout().start(here.v2, progress=meddle)
    assert farm.sha256 == here.v3.stable.sha256, "their change was overwritten"
    assert "goes on serving" not in failed.value.message
    assert here.rollout().history()[0].state == "failed"


@pytest.mark.parametrize(
    ("address", "url"), [("10.0.0.7", "http://10.0.0.7:8000"), ("fd00::7", "http://[fd00::7]:8000")]
)
def test_a_pod_is_asked_at_its_address_of_either_family(address: str, url: str) -> None:
    assert place.pod_url(address) == url


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [(403, SettingsError, "refuses"), (404, NotFound, "no Deployment"), (500, Unavailable, "500")],
)
def test_50_what_kubernetes_refuses_is_said_in_a_sentence(
    farm: Farm, here: Installation, status: int, error: type[Exception], says: str
) -> None:
    farm.refusal = status
    with pytest.raises(error, match=says):
        here.rollout().start(here.v1)
    assert not farm.patches


def test_a_machine_without_a_cluster_is_told_so(here: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(Path("/nowhere/kubeconfig"), monkeypatch)
    with pytest.raises(SettingsError, match="No Kubernetes cluster is configured"):
        here.rollout()


def test_in_a_pod_its_account_is_used_and_stdout_stays_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("SERVICE_TOKEN_FILENAME", "SERVICE_CERT_FILENAME"):
        (tmp_path / name).write_text("of the pod's account")
        monkeypatch.setattr(f"kubernetes.config.incluster_config.{name}", str(tmp_path / name))
    point_at(tmp_path / "nothing", monkeypatch)
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "9")
    place.PodTemplate(Settings(home=tmp_path))
    assert capfd.readouterr().out == ""
