"""Put a released bundle into service, watch it come up, and put the old one back when it does not.

`target` gives the place of this installation: locally a pointer in the store that the running API follows, on
Kubernetes the pod template of the API's Deployment. Both know `start`, `status`, `undo` and `history`, one rollout at a
time, resumed when its driver was killed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from lawnwatch import bundle
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings
from lawnwatch.errors import NotFound, RolloutFailed
from lawnwatch.release_target import TARGET_KEY, ReleaseTarget, TargetEntry, read_target, target_of_process
from lawnwatch.rollout.api import ask_api, golden_fault
from lawnwatch.rollout.driver import RolloutTarget
from lawnwatch.rollout.local import POLL_SECONDS, LocalRollout
from lawnwatch.rollout.record import RolloutRecord, RolloutRow, RolloutStatus
from lawnwatch.store import ObjectStore

__all__ = [
    "TARGET_KEY",
    "LocalRollout",
    "ReleaseTarget",
    "RolloutRecord",
    "RolloutRow",
    "RolloutStatus",
    "RolloutTarget",
    "TargetEntry",
    "Verification",
    "read_target",
    "target",
    "target_of_process",
    "verify",
]


def target(settings: Settings, catalog: Catalog, store: ObjectStore) -> RolloutTarget:
    """The rollout target of this installation."""
    if settings.rollout.target == "kubernetes":
        from lawnwatch.rollout.kubernetes import KubernetesRollout  # the API's image has no such client

        return KubernetesRollout(settings, catalog, store)
    return LocalRollout(settings, catalog, store)


@dataclass(frozen=True)
class Verification:
    """What a client would find: the API is alive, ready, and serves the target, proven by its golden answers."""

    model_version: int
    sha256: str
    golden_max_error: float
    message: str


def verify(settings: Settings, store: ObjectStore, *, timeout: float = 30.0) -> Verification:
    """Ask the API what a client would ask, until the answers are right or `timeout` seconds are over.

    Raises:
        NotFound: nothing was rolled out yet.
        RolloutFailed: the API is not alive, not ready, does not serve the target, or answers its golden pictures
            otherwise.
    """
    wanted = _written(settings, store)
    if wanted is None:
        raise NotFound("There is no release target yet.", hint="`lawnwatch rollout start` makes one.")
    stable, deadline = wanted.stable, time.monotonic() + timeout
    while True:
        serving = ask_api(settings.api_url, "/model/info")
        faults = [
            answer.reason for path in ("/health", "/ready") if (answer := ask_api(settings.api_url, path)).info is None
        ]
        if not faults and serving.proves(stable.sha256):
            left = max(0.0, deadline - time.monotonic())
            if fault := golden_fault(settings, bundle.read(store, stable.sha256), timeout=left):
                raise RolloutFailed(f"The target is v{stable.model_version}, but {fault}.")
            error = float((serving.info or {})["golden"]["max_error"])
            return Verification(
                stable.model_version,
                stable.sha256,
                error,
                f"The API is alive and ready, and serves v{stable.model_version}; its golden answers differ by at most "
                f"{error:.1g}.",
            )
        if time.monotonic() >= deadline:
            why = "; ".join(faults) or serving.reason or "it serves another model, or its golden answers are not proven"
            raise RolloutFailed(
                f"The target is v{stable.model_version} ({stable.sha256[:12]}), but {why}.",
                hint="`lawnwatch rollout status` says what is served.",
            )
        time.sleep(POLL_SECONDS)


def _written(settings: Settings, store: ObjectStore) -> ReleaseTarget | None:
    if settings.rollout.target == "kubernetes":
        from lawnwatch.rollout.kubernetes import PodTemplate

        return PodTemplate(settings).read().target
    return read_target(store)
