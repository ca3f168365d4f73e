"""Put a released bundle into service, watch it come up, and put the old one back when it does not.

The release target is one small object, `rollout/target.json`: which bundles serve, with weights (a canary is
one more entry). `LocalRollout` moves that pointer; the API follows it without a restart. Every rollout is a
row in `rollouts`.

One rollout is under way at a time: the column `active` is 1 on that row, NULL on all others, and unique. The
    one who drives it holds a lease, renewed while it watches. A driver that was killed loses its lease, and
    the next `start` resumes the rollout (same target) or supersedes it (another target); going back then
    means back to the last target that was proven, never to one that nobody saw serving.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from sqlalchemy import CHAR, Integer, SmallInteger, String, Text, UniqueConstraint, or_, select, update
from sqlalchemy.exc import IntegrityError as DuplicateRow
from sqlalchemy.orm import Mapped, Session, mapped_column

from lawnwatch import bundle, log
from lawnwatch.catalog import Base, Catalog, UtcDateTime
from lawnwatch.config import Settings
from lawnwatch.errors import Conflict, InputError, IntegrityError, NotFound, RolloutFailed
from lawnwatch.store import ObjectStore

logger = log.get(__name__)

TARGET_KEY = "rollout/target.json"
LEASE_SECONDS = 15.0
POLL_SECONDS = 0.25

Progress = Callable[[str], None]
State = Literal["progressing", "complete", "failed", "undone"]


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
    return _parsed(raw)


def _parsed(raw: bytes | str) -> ReleaseTarget:
    try:
        return ReleaseTarget.model_validate_json(raw)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise IntegrityError(
            f"{TARGET_KEY} cannot be read: {'.'.join(map(str, fault['loc']))}: {fault['msg']}.",
            hint="Run `lawnwatch rollout start` to write it anew.",
        ) from error


class RolloutRow(Base):
    """One rollout: from which target to which, and how it went."""

    __tablename__ = "rollouts"
    __table_args__ = (UniqueConstraint("active", name="uq_rollouts_active"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    kind: Mapped[str] = mapped_column(String(8))
    model_version: Mapped[int] = mapped_column(Integer)
    sha256: Mapped[str] = mapped_column(CHAR(64))
    target: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str] = mapped_column(Text)
    previous_version: Mapped[int | None] = mapped_column(Integer)
    previous_sha256: Mapped[str | None] = mapped_column(CHAR(64))
    previous_target: Mapped[str | None] = mapped_column(Text)
    active: Mapped[int | None] = mapped_column(SmallInteger)
    controller: Mapped[str] = mapped_column(CHAR(32))
    lease_until: Mapped[datetime] = mapped_column(UtcDateTime)
    started_at: Mapped[datetime] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


@dataclass(frozen=True)
class RolloutRecord:
    """One rollout, as people and programs see it."""

    id: int
    kind: Literal["start", "undo"]
    model_version: int
    sha256: str
    state: State
    reason: str
    previous_version: int | None
    previous_sha256: str | None
    started_at: datetime
    finished_at: datetime | None
    message: str

    @classmethod
    def of(cls, row: RolloutRow, message: str = "") -> RolloutRecord:
        """The public part of a row."""
        return cls(
            id=row.id,
            kind="undo" if row.kind == "undo" else "start",
            model_version=row.model_version,
            sha256=row.sha256,
            state=row.state,  # type: ignore[arg-type]  # only this module writes it
            reason=row.reason,
            previous_version=row.previous_version,
            previous_sha256=row.previous_sha256,
            started_at=row.started_at,
            finished_at=row.finished_at,
            message=message,
        )


@dataclass(frozen=True)
class RolloutStatus:
    """What should serve, what does, and the latest rollout."""

    target: ReleaseTarget | None
    serving: Mapping[str, Any] | None
    api: str
    latest: RolloutRecord | None
    message: str


class RolloutTarget(Protocol):
    """Where a model is put into service: a pointer that the API follows, or a cluster."""

    def start(
        self,
        target: ReleaseTarget,
        *,
        timeout: float = 60.0,
        wait: bool = True,
        progress: Progress | None = None,
    ) -> RolloutRecord:
        """Serve `target`; on failure the old target serves and RolloutFailed is raised."""

    def status(self) -> RolloutStatus:
        """What should serve, what does, and the latest rollout."""

    def undo(self, *, timeout: float = 60.0, wait: bool = True, progress: Progress | None = None) -> RolloutRecord:
        """Serve what served before the last completed rollout."""

    def history(self, limit: int = 50) -> list[RolloutRecord]:
        """Rollouts, newest first."""


def target(settings: Settings, catalog: Catalog, store: ObjectStore) -> RolloutTarget:
    """The rollout target of this installation."""
    return LocalRollout(settings, catalog, store)


@dataclass(frozen=True)
class Serving:
    """What the API says of itself; `reason` is why it is not known when the API does not answer."""

    info: Mapping[str, Any] | None
    reason: str

    def proves(self, sha256: str) -> bool:
        """The API serves this bundle and recomputed its golden answers."""
        model, golden = (self.info or {}).get("model") or {}, (self.info or {}).get("golden") or {}
        return model.get("sha256") == sha256 and golden.get("ok") is True

    def rejects(self, sha256: str) -> str:
        """Why the API refused this bundle; empty when it did not."""
        rejected = (self.info or {}).get("rejected") or {}
        return str(rejected.get("reason") or "refused") if rejected.get("sha256") == sha256 else ""


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
        RolloutFailed: the API is not alive, not ready, or does not serve the target.
    """
    wanted = read_target(store)
    if wanted is None:
        raise NotFound("There is no release target yet.", hint="`lawnwatch rollout start` makes one.")
    stable, deadline = wanted.stable, time.monotonic() + timeout
    while True:
        serving = ask_api(settings.api_url, "/model/info")
        faults = [
            answer.reason for path in ("/health", "/ready") if (answer := ask_api(settings.api_url, path)).info is None
        ]
        if not faults and serving.proves(stable.sha256):
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


def ask_api(api_url: str, path: str) -> Serving:
    """GET a JSON object from the API; a refusal or silence is a reason, not an exception."""
    url = f"{api_url.rstrip('/')}{path}"
    if not url.startswith(("http://", "https://")):
        raise InputError(f"LAWNWATCH_API_URL must begin with http:// or https://; received {api_url!r}.")
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - the scheme was checked
            info = json.loads(answer.read(4_000_000))
    except (OSError, ValueError) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        return Serving(None, f"the API at {url} does not answer ({cause})")
    if not isinstance(info, dict):
        return Serving(None, f"{url} is not lawnwatch's API")
    return Serving(info, "" if info.get("state", "ready") == "ready" else str(info.get("reason") or ""))


class LocalRollout:
    """Moves the pointer in the store and watches `GET {api_url}/model/info` until the API confirms it."""

    def __init__(self, settings: Settings, catalog: Catalog, store: ObjectStore) -> None:
        self._settings = settings
        self._catalog = catalog
        self._store = store
        self._me = uuid.uuid4().hex

    def start(
        self,
        target: ReleaseTarget,
        *,
        timeout: float = 60.0,
        wait: bool = True,
        progress: Progress | None = None,
    ) -> RolloutRecord:
        """Serve `target`.

        The bundles are verified in the store first. `wait=False` moves the pointer and leaves the rollout
        "progressing"; `status` or the next `start` of the same target completes it.

        Raises:
            NotFound, IntegrityError: a bundle is not in the store, or not whole; nothing was changed.
            Conflict: another rollout is under way.
            RolloutFailed: the API did not confirm within `timeout` seconds, or refused it; the old target is
                back.
        """
        return self._roll("start", target, timeout, wait, progress or _silent)

    def undo(self, *, timeout: float = 60.0, wait: bool = True, progress: Progress | None = None) -> RolloutRecord:
        """Serve what served before the last completed rollout. Undoing twice comes back.

        Raises:
            NotFound: there is nothing to go back to.
            Conflict, RolloutFailed: as for `start`.
        """
        with self._catalog.session() as session:
            last = session.scalar(
                select(RolloutRow).where(RolloutRow.state == "complete").order_by(RolloutRow.id.desc()).limit(1)
            )
            back_to, undone = (last.previous_target, last.id) if last is not None else (None, None)
        if back_to is None:
            raise NotFound("There is no earlier model to go back to.", hint="`lawnwatch rollout history` lists them.")
        record = self._roll("undo", _parsed(back_to), timeout, wait, progress or _silent)
        with self._catalog.session() as session:
            session.execute(update(RolloutRow).where(RolloutRow.id == undone).values(state="undone"))
        return record

    def status(self) -> RolloutStatus:
        """What should serve, what does. Completes an unwatched rollout once the API confirms it."""
        wanted, serving = read_target(self._store), self._ask()
        with self._catalog.session() as session:
            row = session.scalar(select(RolloutRow).order_by(RolloutRow.id.desc()).limit(1))
            if row is not None and row.active and _expired(row) and serving.proves(row.sha256):
                self._finish(session, row.id, "complete", "confirmed by the API")
                session.refresh(row)
            latest = RolloutRecord.of(row) if row is not None else None
        model = (serving.info or {}).get("model")
        parts = [
            f"The target is v{wanted.stable.model_version} ({wanted.stable.sha256[:12]})."
            if wanted
            else "There is no target yet.",
            f"The API serves v{model['version']} ({str(model['sha256'])[:12]})."
            if model
            else f"The API serves nothing: {serving.reason}.",
        ]
        if latest is not None:
            parts.append(f"The last rollout (v{latest.model_version}) is {latest.state}.")
        return RolloutStatus(wanted, model, self._settings.api_url, latest, " ".join(parts))

    def history(self, limit: int = 50) -> list[RolloutRecord]:
        """Rollouts, newest first."""
        with self._catalog.session() as session:
            rows = session.scalars(select(RolloutRow).order_by(RolloutRow.id.desc()).limit(limit))
            return [RolloutRecord.of(row) for row in rows]

    # --- one rollout ----------------------------------------------------------------------------------------

    def _roll(self, kind: str, target: ReleaseTarget, timeout: float, wait: bool, progress: Progress) -> RolloutRecord:
        for entry in target.entries:
            self._check_bundle(entry)
        stable = target.stable
        if (done := self._done_before(target)) is not None:
            reason = self._watch(None, stable.sha256, timeout, progress) if wait else ""
            if reason:
                raise RolloutFailed(
                    f"v{stable.model_version} is the target already, but {reason}.",
                    hint="The target was not changed; is the API running?",
                )
            return RolloutRecord.of(done, f"v{stable.model_version} was serving already.")
        rollout_id, old = self._open(kind, target)
        progress(f"rollout {rollout_id}: serving v{stable.model_version} ({stable.sha256[:12]})")
        try:
            self._store.put(TARGET_KEY, target.to_bytes(), content_type="application/json")
            if not wait:
                self._release_lease(rollout_id)
                return self._record(rollout_id, f"The target is v{stable.model_version}; not waited for.")
            reason = self._watch(rollout_id, stable.sha256, timeout, progress)
        except BaseException:
            # Killed by a signal or a dead server: let the next start take it over at once.
            self._release_lease_quietly(rollout_id)
            raise
        if not reason:
            with self._catalog.session() as session:
                self._finish(session, rollout_id, "complete", "confirmed by the API")
            return self._record(rollout_id, f"v{stable.model_version} is serving.")
        self._restore(rollout_id, old, reason)
        back = f"v{old.stable.model_version} goes on serving" if old else "there was no model before it"
        raise RolloutFailed(
            f"v{stable.model_version} did not come up: {reason}; {back}.",
            hint="The API's /model/info and log say more.",
        )

    def _done_before(self, target: ReleaseTarget) -> RolloutRow | None:
        """The rollout that completed last, when it is this one and the pointer still says so."""
        if self._readable_target() != target:
            return None
        with self._catalog.session() as session:
            under_way = session.scalar(select(RolloutRow.id).where(RolloutRow.active == 1))
            last: RolloutRow | None = session.scalar(
                select(RolloutRow).where(RolloutRow.state == "complete").order_by(RolloutRow.id.desc()).limit(1)
            )
            if under_way is not None or last is None or _parsed(last.target) != target:
                return None
            session.expunge(last)
            return last

    def _check_bundle(self, entry: TargetEntry) -> None:
        found = bundle.read(self._store, entry.sha256, None)
        if found.manifest.model_version != entry.model_version:
            raise InputError(
                f"bundle {entry.sha256[:12]} is v{found.manifest.model_version}; "
                f"the target says v{entry.model_version}."
            )

    def _open(self, kind: str, target: ReleaseTarget) -> tuple[int, ReleaseTarget | None]:
        """Take the one place of the rollout under way. Returns its id and the target to go back to."""
        now, stable = datetime.now(UTC), target.stable
        raw = target.to_bytes().decode()
        pointer = self._readable_target()
        try:
            with self._catalog.session() as session:
                under_way = session.scalar(select(RolloutRow).where(RolloutRow.active == 1).with_for_update())
                proven = pointer.to_bytes().decode() if pointer is not None else None
                if under_way is not None:
                    self._take_over(session, under_way, now)
                    proven = under_way.previous_target
                    if under_way.target == raw:
                        return under_way.id, _parsed(proven) if proven else None
                    self._finish(session, under_way.id, "failed", f"superseded by v{stable.model_version}")
                old = _parsed(proven) if proven else None
                row = RolloutRow(
                    kind=kind,
                    model_version=stable.model_version,
                    sha256=stable.sha256,
                    target=raw,
                    state="progressing",
                    reason="",
                    previous_version=old.stable.model_version if old else None,
                    previous_sha256=old.stable.sha256 if old else None,
                    previous_target=proven,
                    active=1,
                    controller=self._me,
                    lease_until=now + timedelta(seconds=LEASE_SECONDS),
                    started_at=now,
                )
                session.add(row)
                session.flush()
                return row.id, old
        except DuplicateRow:
            raise _under_way() from None

    def _take_over(self, session: Session, row: RolloutRow, now: datetime) -> None:
        """Become the driver of a rollout whose own driver is gone; Conflict while that one lives."""
        taken = session.execute(
            update(RolloutRow)
            .where(
                RolloutRow.id == row.id,
                RolloutRow.active == 1,
                or_(RolloutRow.lease_until < now, RolloutRow.controller == self._me),
            )
            .values(controller=self._me, lease_until=now + timedelta(seconds=LEASE_SECONDS))
            .execution_options(synchronize_session=False)
        )
        if taken.rowcount != 1:  # type: ignore[attr-defined]
            raise _under_way(row)

    def _watch(self, rollout_id: int | None, sha256: str, timeout: float, progress: Progress) -> str:
        """Poll the API until it proves the bundle (returns ""), refuses it or time is up (returns why)."""
        deadline = time.monotonic() + timeout
        renew_at = time.monotonic() + LEASE_SECONDS / 3
        said = ""
        while True:
            serving = self._ask()
            if serving.proves(sha256):
                return ""
            if refusal := serving.rejects(sha256):
                return f"the API refused it: {refusal}"
            why = serving.reason or "the API has not loaded it yet"
            if why != said:
                progress(f"waiting for the API: {why}")
                said = why
            if time.monotonic() >= deadline:
                return f"no confirmation within {timeout:.0f} s ({why})"
            if rollout_id is not None and time.monotonic() >= renew_at:
                self._renew(rollout_id)
                renew_at = time.monotonic() + LEASE_SECONDS / 3
            time.sleep(POLL_SECONDS)

    def _ask(self) -> Serving:
        return ask_api(self._settings.api_url, "/model/info")

    # --- the row --------------------------------------------------------------------------------------------

    def _readable_target(self) -> ReleaseTarget | None:
        """The pointer as it is; one that cannot be read is as good as none, and this rollout replaces it."""
        try:
            return read_target(self._store)
        except IntegrityError as error:
            logger.warning("the release target cannot be read", error=str(error))
            return None

    def _restore(self, rollout_id: int, old: ReleaseTarget | None, reason: str) -> None:
        """Put the old pointer back first, then say that the rollout failed."""
        if old is None:
            self._store.delete(TARGET_KEY)
        else:
            self._store.put(TARGET_KEY, old.to_bytes(), content_type="application/json")
        with self._catalog.session() as session:
            self._finish(session, rollout_id, "failed", reason)

    def _finish(self, session: Session, rollout_id: int, state: State, reason: str) -> None:
        session.execute(
            update(RolloutRow)
            .where(RolloutRow.id == rollout_id, RolloutRow.active == 1)
            .values(state=state, reason=reason, active=None, finished_at=datetime.now(UTC))
            .execution_options(synchronize_session=False)
        )

    def _renew(self, rollout_id: int) -> None:
        until = datetime.now(UTC) + timedelta(seconds=LEASE_SECONDS)
        with self._catalog.session() as session:
            renewed = session.execute(
                update(RolloutRow)
                .where(
                    RolloutRow.id == rollout_id,
                    RolloutRow.active == 1,
                    RolloutRow.controller == self._me,
                )
                .values(lease_until=until)
            )
            if renewed.rowcount != 1:  # type: ignore[attr-defined]
                raise Conflict("This rollout was taken over by another.", hint="`lawnwatch rollout status` says more.")

    def _release_lease(self, rollout_id: int) -> None:
        with self._catalog.session() as session:
            session.execute(
                update(RolloutRow)
                .where(RolloutRow.id == rollout_id, RolloutRow.controller == self._me)
                .values(lease_until=datetime.now(UTC) - timedelta(seconds=1))
            )

    def _release_lease_quietly(self, rollout_id: int) -> None:
        try:
            self._release_lease(rollout_id)
        except Exception as error:  # noqa: BLE001 - the first error is the one to report; the lease runs out by itself
            logger.warning("the lease could not be given back", error=str(error))

    def _record(self, rollout_id: int, message: str) -> RolloutRecord:
        with self._catalog.session() as session:
            row = session.get_one(RolloutRow, rollout_id)
            return RolloutRecord.of(row, message)


def _expired(row: RolloutRow) -> bool:
    until = row.lease_until if row.lease_until.tzinfo else row.lease_until.replace(tzinfo=UTC)
    return until < datetime.now(UTC)


def _under_way(row: RolloutRow | None = None) -> Conflict:
    which = f" of v{row.model_version}" if row is not None else ""
    return Conflict(
        f"A rollout{which} is under way.",
        hint="Wait for it; one whose driver died can be taken over after 15 s.",
    )


def _silent(_: str) -> None:
    """Progress that nobody wants."""
