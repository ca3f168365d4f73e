"""One rollout: take its place, write the target, watch it come up, and put the old one back when it does not.

Every rollout is a row in `rollouts`. One is under way at a time: the column `active` is 1 on that row, NULL on all
others, and unique. The one who drives it holds a lease, renewed while it watches. A driver that was killed loses its
lease, and the next `start` resumes the rollout (same target) or supersedes it (another target); going back then means
back to the last target that was proven, never to one that nobody saw serving.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Protocol

from sqlalchemy import or_, select, update
from sqlalchemy.exc import IntegrityError as DuplicateRow
from sqlalchemy.orm import Session

from lawnwatch import bundle, log
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings
from lawnwatch.errors import Conflict, InputError, IntegrityError, NotFound, RolloutFailed
from lawnwatch.release_target import ReleaseTarget, TargetEntry, parsed
from lawnwatch.rollout.api import Serving, ask_api
from lawnwatch.rollout.record import RolloutRecord, RolloutRow, RolloutStatus, State
from lawnwatch.store import ObjectStore

logger = log.get(__name__)

LEASE_SECONDS = 15.0

Progress = Callable[[str], None]


class RolloutTarget(Protocol):
    """Where a model is put into service: a pointer that the API follows, or a cluster."""

    def start(
        self,
        target: ReleaseTarget,
        *,
        timeout: float | None = None,
        wait: bool = True,
        progress: Progress | None = None,
    ) -> RolloutRecord:
        """Serve `target`; on failure the old target serves and RolloutFailed is raised.

        Without a `timeout` the place's own limit holds.
        """

    def status(self) -> RolloutStatus:
        """What should serve, what does, and the latest rollout."""

    def undo(
        self, *, timeout: float | None = None, wait: bool = True, progress: Progress | None = None
    ) -> RolloutRecord:
        """Serve what served before the last completed rollout."""

    def history(self, limit: int = 50) -> list[RolloutRecord]:
        """Rollouts, newest first."""


class Driver(ABC):
    """The rows, the lease and the order of a rollout; a subclass knows one place where the target is written."""

    def __init__(self, settings: Settings, catalog: Catalog, store: ObjectStore) -> None:
        self._settings = settings
        self._catalog = catalog
        self._store = store
        self._me = uuid.uuid4().hex

    @abstractmethod
    def _read(self) -> ReleaseTarget | None:
        """The target as it is written down; None when there is none."""

    @abstractmethod
    def _write(self, target: ReleaseTarget | None) -> None:
        """Write the target down; writing the same one again changes nothing."""

    @abstractmethod
    def _fault(
        self, release: bundle.Bundle, timeout: float | None, tick: Callable[[], None], progress: Progress
    ) -> str:
        """Watch what was written come up: empty once the API proves it, else why it does not. Calls `tick` often."""

    def _confirms(self, sha256: str, serving: Serving) -> bool:
        """A rollout that nobody watches has come up."""
        return serving.proves(sha256)

    def start(
        self,
        target: ReleaseTarget,
        *,
        timeout: float | None = None,
        wait: bool = True,
        progress: Progress | None = None,
    ) -> RolloutRecord:
        """Serve `target`, and go back to the old one when it does not come up.

        The bundles are verified in the store first. `wait=False` writes the target and leaves the rollout
        "progressing"; `status` or the next `start` of the same target completes it.

        Raises:
            NotFound, IntegrityError: a bundle is not in the store, or not whole; nothing was changed.
            Conflict: another rollout is under way.
            RolloutFailed: the API did not confirm in time, or refused it; the old target is back, unless somebody else
                wrote another one meanwhile: theirs stays.
        """
        return self._roll("start", target, timeout, wait, progress or _silent)

    def undo(
        self, *, timeout: float | None = None, wait: bool = True, progress: Progress | None = None
    ) -> RolloutRecord:
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
        record = self._roll("undo", parsed(back_to), timeout, wait, progress or _silent)
        with self._catalog.session() as session:
            session.execute(update(RolloutRow).where(RolloutRow.id == undone).values(state="undone"))
        return record

    def status(self) -> RolloutStatus:
        """What should serve, what does. Completes an unwatched rollout once the API confirms it."""
        wanted, serving = self._read(), self._ask()
        with self._catalog.session() as session:
            row = session.scalar(select(RolloutRow).order_by(RolloutRow.id.desc()).limit(1))
            if row is not None and row.active and _expired(row) and self._confirms(row.sha256, serving):
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

    def _roll(
        self, kind: str, target: ReleaseTarget, timeout: float | None, wait: bool, progress: Progress
    ) -> RolloutRecord:
        released = [self._check_bundle(entry) for entry in target.entries]
        stable = target.stable
        if (done := self._done_before(target)) is not None:
            reason = self._fault(released[0], timeout, _silent_tick, progress) if wait else ""
            if reason:
                raise RolloutFailed(
                    f"v{stable.model_version} is the target already, but {reason}.",
                    hint="The target was not changed; is the API running?",
                )
            return RolloutRecord.of(done, f"v{stable.model_version} was serving already.")
        rollout_id, old = self._open(kind, target)
        progress(f"rollout {rollout_id}: serving v{stable.model_version} ({stable.sha256[:12]})")
        try:
            self._write(target)
            if not wait:
                self._release_lease(rollout_id)
                return self._record(rollout_id, f"The target is v{stable.model_version}; not waited for.")
            reason = self._fault(released[0], timeout, self._renewal(rollout_id), progress)
        except BaseException:
            # Killed by a signal or a dead server: let the next start take it over at once.
            self._release_lease_quietly(rollout_id)
            raise
        if not reason:
            with self._catalog.session() as session:
                self._finish(session, rollout_id, "complete", "confirmed by the API")
            return self._record(rollout_id, f"v{stable.model_version} is serving.")
        back = self._restore(rollout_id, target, old, reason)
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
            if under_way is not None or last is None or parsed(last.target) != target:
                return None
            session.expunge(last)
            return last

    def _check_bundle(self, entry: TargetEntry) -> bundle.Bundle:
        found = bundle.read(self._store, entry.sha256, None)
        if found.manifest.model_version != entry.model_version:
            raise InputError(
                f"bundle {entry.sha256[:12]} is v{found.manifest.model_version}; "
                f"the target says v{entry.model_version}."
            )
        return found

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
                        return under_way.id, parsed(proven) if proven else None
                    self._finish(session, under_way.id, "failed", f"superseded by v{stable.model_version}")
                old = parsed(proven) if proven else None
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

    def _ask(self) -> Serving:
        return ask_api(self._settings.api_url, "/model/info")

    # --- the row --------------------------------------------------------------------------------------------

    def _readable_target(self) -> ReleaseTarget | None:
        """The target as it is; one that cannot be read is as good as none, and this rollout replaces it."""
        try:
            return self._read()
        except IntegrityError as error:
            logger.warning("the release target cannot be read", error=str(error))
            return None

    def _restore(self, rollout_id: int, target: ReleaseTarget, old: ReleaseTarget | None, reason: str) -> str:
        """Put the old target back first, then say that the rollout failed. Returns what holds now, in words."""
        if ours := self._still_says(target):
            self._write(old)
        with self._catalog.session() as session:
            self._finish(session, rollout_id, "failed", reason)
        if not ours:
            return "what somebody else wrote meanwhile stays"
        return f"v{old.stable.model_version} goes on serving" if old else "there was no model before it"

    def _still_says(self, target: ReleaseTarget) -> bool:
        """Whether the target is what this rollout wrote; what cannot be read is nobody's."""
        try:
            now = self._read()
        except IntegrityError:
            return True
        return now is not None and now.stable.sha256 == target.stable.sha256

    def _finish(self, session: Session, rollout_id: int, state: State, reason: str) -> None:
        session.execute(
            update(RolloutRow)
            .where(RolloutRow.id == rollout_id, RolloutRow.active == 1)
            .values(state=state, reason=reason, active=None, finished_at=datetime.now(UTC))
            .execution_options(synchronize_session=False)
        )

    def _renewal(self, rollout_id: int) -> Callable[[], None]:
        """What a watcher calls at every look: renews the lease now and then. Raises Conflict when it was lost."""
        renewed = time.monotonic()

        def tick() -> None:
            nonlocal renewed
            if time.monotonic() - renewed >= LEASE_SECONDS / 3:
                self._renew(rollout_id)
                renewed = time.monotonic()

        return tick

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


def _silent_tick() -> None:
    """No lease is held."""
