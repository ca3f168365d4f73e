"""The Kubernetes place: two annotations of the pod template of the API's Deployment.

Changing them makes a new ReplicaSet whose pods read version and SHA-256 through the downward API, so Kubernetes' own
readiness, progress deadline, history and `kubectl rollout undo` apply to the model. A chart that never renders the
annotations leaves them as they are at every upgrade.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import kubernetes.config
from kubernetes import client
from urllib3.exceptions import HTTPError

from lawnwatch import bundle
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings
from lawnwatch.errors import NotFound, SettingsError, Unavailable
from lawnwatch.release_target import ReleaseTarget
from lawnwatch.rollout.api import Serving, ask_api, golden_fault
from lawnwatch.rollout.driver import Driver, Progress
from lawnwatch.store import ObjectStore

VERSION = "lawnwatch.io/model-version"
SHA256 = "lawnwatch.io/model-sha256"

POLL_SECONDS = 1.0
REQUEST_SECONDS = 10.0
GOLDEN_SECONDS = 20.0  # a pod that is ending may still be known to a node as an endpoint
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class Observed:
    """What the Deployment says of itself.

    Attributes:
        target: what its pod template names; None when it names no model.
        generation: of the specification.
        complete: the controller has seen that generation, and all pods are new and available.
        stalled_at: when Progressing became False; None while it is not.
        deadline: seconds without progress after which Kubernetes says so.
        selector: of its pods.
        pods: in words, how many are new and available.
    """

    target: ReleaseTarget | None
    generation: int
    complete: bool
    stalled_at: datetime | None
    deadline: float
    selector: str
    pods: str


class PodTemplate:
    """The API's Deployment, as far as a rollout reads and changes it.

    Raises:
        SettingsError: no cluster is configured, or it refuses us. NotFound: no such Deployment. Unavailable.
    """

    def __init__(self, settings: Settings) -> None:
        self.name = settings.rollout.deployment
        configuration = client.Configuration()
        # Not load_config, which asks both in turn: it prints to stdout, where a command's result belongs.
        inside = "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ
        load = kubernetes.config.load_incluster_config if inside else kubernetes.config.load_kube_config
        try:
            load(client_configuration=configuration)
        except kubernetes.config.ConfigException as error:
            raise SettingsError(
                f"No Kubernetes cluster is configured: {error}.",
                hint="Run in a pod with a service account, set KUBECONFIG, or set LAWNWATCH_ROLLOUT__TARGET=local.",
            ) from error
        api = client.ApiClient(configuration)
        self._apps, self._core = client.AppsV1Api(api), client.CoreV1Api(api)
        self.namespace = settings.rollout.namespace or (
            NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.exists() else "default"
        )

    def read(self) -> Observed:
        """The Deployment as it is now."""
        with self._explained():
            found = self._apps.read_namespaced_deployment(self.name, self.namespace, _request_timeout=REQUEST_SECONDS)
        return _observed(found)

    def write(self, target: ReleaseTarget | None) -> Observed:
        """Name `target` in the pod template, or no model; naming the same one again changes nothing."""
        stable = target.stable if target is not None else None
        annotations = {
            VERSION: str(stable.model_version) if stable else None,
            SHA256: stable.sha256 if stable else None,
        }
        cause = f"lawnwatch model v{stable.model_version} ({stable.sha256[:12]})" if stable else "lawnwatch: no model"
        body = {
            "metadata": {"annotations": {"kubernetes.io/change-cause": cause}},
            "spec": {"template": {"metadata": {"annotations": annotations}}},
        }
        with self._explained():
            patched = self._apps.patch_namespaced_deployment(
                self.name, self.namespace, body, _request_timeout=REQUEST_SECONDS
            )
        return _observed(patched)

    def unready(self, selector: str, sha256: str) -> list[tuple[str, str, str]]:
        """Name, address and, in words, state of every pod that is to serve a bundle and is not ready."""
        with self._explained():
            pods = self._core.list_namespaced_pod(
                self.namespace, label_selector=selector, _request_timeout=REQUEST_SECONDS
            ).items
        return [
            (pod.metadata.name, pod.status.pod_ip or "", _state(pod))
            for pod in pods
            if (pod.metadata.annotations or {}).get(SHA256) == sha256
            and pod.metadata.deletion_timestamp is None
            and not any(one.type == "Ready" and one.status == "True" for one in pod.status.conditions or [])
        ]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        what = f"Deployment {self.namespace}/{self.name}"
        try:
            yield
        except client.ApiException as error:
            if error.status == 404:
                raise NotFound(f"There is no {what}.", hint="LAWNWATCH_ROLLOUT__DEPLOYMENT names it.") from error
            if error.status in (401, 403):
                raise SettingsError(
                    f"Kubernetes refuses to let us read or change {what} ({error.reason}).",
                    hint="The step needs a service account whose role allows it.",
                ) from error
            raise Unavailable(f"Kubernetes answers {error.status} ({error.reason}) for {what}.") from error
        except HTTPError as error:
            raise Unavailable(f"Kubernetes does not answer ({type(error).__name__}).") from error


class KubernetesRollout(Driver):
    """Patches the pod template and watches the Deployment, then asks the golden pictures through the Service."""

    def __init__(self, settings: Settings, catalog: Catalog, store: ObjectStore) -> None:
        super().__init__(settings, catalog, store)
        self._template = PodTemplate(settings)
        self._stalled_before: datetime | None = None

    def _read(self) -> ReleaseTarget | None:
        return self._template.read().target

    def _write(self, target: ReleaseTarget | None) -> None:
        # A Deployment that stalled long ago says so until its next progress: that is no news about this target.
        self._stalled_before = self._template.write(target).stalled_at

    def _confirms(self, sha256: str, serving: Serving) -> bool:
        now = self._template.read()
        return now.complete and now.target is not None and now.target.stable.sha256 == sha256

    def _fault(
        self, release: bundle.Bundle, timeout: float | None, tick: Callable[[], None], progress: Progress
    ) -> str:
        begun = time.monotonic()
        said = ""
        while True:
            now = self._template.read()
            if now.target is None or now.target.stable.sha256 != release.sha256:
                return "somebody else changed the pod template meanwhile"
            if now.complete:
                break
            waiting = self._template.unready(now.selector, release.sha256)
            for pod, address, _ in waiting:
                if address and (refusal := ask_api(pod_url(address), "/model/info").rejects(release.sha256)):
                    return f"pod {pod} refused it: {refusal}"
            states = "; ".join(f"pod {pod} {state}" for pod, _, state in waiting)
            why = f"{now.pods}{'; ' + states if states else ''}"
            if why != said:
                progress(f"waiting for the Deployment: {why}")
                said = why
            waited = time.monotonic() - begun
            if now.stalled_at is not None and (now.stalled_at != self._stalled_before or waited >= now.deadline):
                return f"no progress within {now.deadline:.0f} s, the Deployment's progress deadline ({why})"
            if timeout is not None and waited >= timeout:
                return f"not complete within {timeout:.0f} s ({why})"
            tick()
            time.sleep(POLL_SECONDS)
        tick()
        return golden_fault(self._settings, release, timeout=GOLDEN_SECONDS)


def pod_url(address: str) -> str:
    """Where a pod's API listens, by the pod's IPv4 or IPv6 address."""
    return f"http://[{address}]:8000" if ":" in address else f"http://{address}:8000"


def _observed(deployment: Any) -> Observed:
    spec, status = deployment.spec, deployment.status
    named = spec.template.metadata.annotations or {}
    version, sha256 = named.get(VERSION), named.get(SHA256)
    wanted, generation = spec.replicas or 0, deployment.metadata.generation
    updated, available = status.updated_replicas or 0, status.available_replicas or 0
    current = (status.observed_generation or 0) >= generation
    progressing = next((one for one in status.conditions or [] if one.type == "Progressing"), None)
    stalled = current and progressing is not None and progressing.status == "False"
    return Observed(
        target=ReleaseTarget.single(int(version), sha256) if version and sha256 else None,
        generation=generation,
        complete=current and updated == wanted == (status.replicas or 0) and available == wanted,
        stalled_at=progressing.last_update_time if stalled and progressing is not None else None,
        deadline=float(spec.progress_deadline_seconds or 600),
        selector=",".join(f"{key}={value}" for key, value in (spec.selector.match_labels or {}).items()),
        pods=f"{updated} of {wanted} pods are new, {available} available" if current else "the change is not seen yet",
    )


def _state(pod: Any) -> str:
    """Why a pod is not ready, in a few words: what its container waits for, or how it ended last."""
    for one in pod.status.container_statuses or []:
        waiting, ended = one.state.waiting, one.last_state.terminated if one.last_state else None
        if waiting is not None and waiting.reason:
            last = f", last ended by {ended.reason}" if ended is not None else ""
            return f"waits: {waiting.reason}{last}"
        if one.state.running is not None:
            return "runs and is not ready"
    for one in pod.status.conditions or []:
        if one.status == "False" and one.message and one.type == "PodScheduled":
            return f"is not scheduled: {one.message}"
    return f"is {str(pod.status.phase).lower()}"
