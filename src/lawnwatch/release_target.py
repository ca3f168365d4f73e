"""The release target: which bundles serve, with weights, and where it is written down.

Locally it is one small object in the store, `rollout/target.json`, that the API follows without a restart. On
Kubernetes it is two annotations of the API's pod template, so that every pod of a ReplicaSet serves the same model and
`kubectl rollout undo` brings the one before back; a pod reads its own from its environment.
"""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lawnwatch.config import Settings
from lawnwatch.errors import IntegrityError, NotFound
from lawnwatch.store import ObjectStore

TARGET_KEY = "rollout/target.json"


class TargetEntry(BaseModel):
    """One bundle that serves, with its share of the requests in percent."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_version: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    weight: int = Field(100, ge=0, le=100)


class ReleaseTarget(BaseModel):
    """What should serve. The first entry is the stable one; weights add up to 100."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    entries: list[TargetEntry] = Field(min_length=1)

    @model_validator(mode="after")
    def _whole(self) -> ReleaseTarget:
        total = sum(entry.weight for entry in self.entries)
        if total != 100:
            raise ValueError(f"weights must add up to 100; received {total}")
        return self

    @classmethod
    def single(cls, model_version: int, sha256: str) -> ReleaseTarget:
        """Everything to one bundle."""
        return cls(entries=[TargetEntry(model_version=model_version, sha256=sha256, weight=100)])

    @property
    def stable(self) -> TargetEntry:
        """The entry that serves unless a canary is picked."""
        return self.entries[0]

    def to_bytes(self) -> bytes:
        """Canonical JSON: the same target is always the same bytes."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()


def read_target(store: ObjectStore) -> ReleaseTarget | None:
    """The release target, or None when nothing was ever rolled out.

    Raises:
        IntegrityError: the pointer is not what `ReleaseTarget` reads.
        Unavailable: the store does not answer.
    """
    try:
        raw = store.get(TARGET_KEY)
    except NotFound:
        return None
    return parsed(raw)


def parsed(raw: bytes | str) -> ReleaseTarget:
    try:
        return ReleaseTarget.model_validate_json(raw)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise IntegrityError(
            f"{TARGET_KEY} cannot be read: {'.'.join(map(str, fault['loc']))}: {fault['msg']}.",
            hint="Run `lawnwatch rollout start` to write it anew.",
        ) from error


def target_of_process(settings: Settings, store: ObjectStore) -> ReleaseTarget | None:
    """What an API process is to serve: the store's pointer, or on Kubernetes what its pod template says.

    Raises:
        IntegrityError, Unavailable: as for `read_target`; never on Kubernetes.
    """
    if settings.rollout.target == "local":
        return read_target(store)
    serving = settings.serving
    if serving.model_version is None or not serving.model_sha256:
        return None
    return ReleaseTarget.single(serving.model_version, serving.model_sha256)
