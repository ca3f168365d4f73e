"""Rollouts as rows: from which target to which, and how it went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import CHAR, Integer, SmallInteger, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from lawnwatch.catalog import Base
from lawnwatch.database import UtcDateTime
from lawnwatch.release_target import ReleaseTarget

State = Literal["progressing", "complete", "failed", "undone"]


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
