"""The table of API keys: made, listed, revoked."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import CHAR, JSON, String, select
from sqlalchemy.orm import Mapped, mapped_column

from lawnwatch.catalog import Base, Catalog, UtcDateTime
from lawnwatch.errors import InputError, NotFound
from lawnwatch.keys import SCOPES, Key, hashed

MAX_NAME = 100


class KeyRow(Base):
    """One API key, without its secret."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(CHAR(16), primary_key=True)
    name: Mapped[str] = mapped_column(String(MAX_NAME))
    sha256: Mapped[str] = mapped_column(CHAR(64))
    scopes: Mapped[list[str]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


@dataclass(frozen=True)
class NewKey:
    """A key that was just made; `key` is shown this once and kept nowhere."""

    key: str
    id: str
    name: str
    scopes: tuple[str, ...]
    message: str


def create(catalog: Catalog, name: str, scopes: list[str]) -> NewKey:
    """Make a key.

    Raises:
        InputError: an empty or too long name, or a scope that does not exist.
        Unavailable: the database does not answer.
    """
    if not 1 <= len(name.strip()) <= MAX_NAME:
        raise InputError(f"A key's name has 1 to {MAX_NAME} characters; received {len(name.strip())}.")
    wanted = tuple(scope for scope in SCOPES if scope in scopes)
    if not wanted or set(scopes) - set(SCOPES):
        raise InputError(f"The scopes are {' and '.join(SCOPES)}; received {', '.join(scopes) or 'none'}.")
    identity, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    with catalog.session() as session:
        session.add(
            KeyRow(
                id=identity,
                name=name.strip(),
                sha256=hashed(secret),
                scopes=list(wanted),
                created_at=datetime.now(UTC),
            )
        )
    message = f"Key {identity} for {name.strip()}. It is shown this once: keep it where you keep passwords."
    return NewKey(f"lw_{identity}_{secret}", identity, name.strip(), wanted, message)


def revoke(catalog: Catalog, identity: str) -> Key:
    """Refuse a key from now on; revoking it again changes nothing.

    Raises:
        NotFound: there is no such key.
        Unavailable: the database does not answer.
    """
    with catalog.session() as session:
        row = session.get(KeyRow, identity)
        if row is None:
            raise NotFound(f"There is no key {identity[:40]!r}.", hint="`lawnwatch key list` shows them.")
        row.revoked_at = row.revoked_at or datetime.now(UTC)
        return _key(row)


def list_keys(catalog: Catalog) -> list[Key]:
    """All keys, oldest first, revoked ones included. Raises Unavailable."""
    with catalog.session() as session:
        return [_key(row) for row in session.scalars(select(KeyRow).order_by(KeyRow.created_at, KeyRow.id))]


def _key(row: KeyRow) -> Key:
    return Key(row.id, row.name, tuple(row.scopes), row.created_at, row.revoked_at, row.sha256)
