"""The table of API keys: made, listed, revoked."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from lawnwatch.database import Database, UtcDateTime, metadata, utc_now
from lawnwatch.errors import InputError, NotFound
from lawnwatch.keys import SCOPES, Key, hashed

MAX_NAME = 100


KEYS = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.CHAR(16), primary_key=True),
    sa.Column("name", sa.String(MAX_NAME), nullable=False),
    sa.Column("sha256", sa.CHAR(64), nullable=False),  # of the secret, which is kept nowhere
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("revoked_at", UtcDateTime),
)


@dataclass(frozen=True)
class NewKey:
    """A key that was just made; `key` is shown this once and kept nowhere."""

    key: str
    id: str
    name: str
    scopes: tuple[str, ...]
    message: str


def create(database: Database, name: str, scopes: list[str]) -> NewKey:
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
    row = {
        "id": identity,
        "name": name.strip(),
        "sha256": hashed(secret),
        "scopes": list(wanted),
        "created_at": utc_now(),
    }
    with database.transaction() as connection:
        connection.execute(sa.insert(KEYS), row)
    message = f"Key {identity} for {name.strip()}. It is shown this once: keep it where you keep passwords."
    return NewKey(f"lw_{identity}_{secret}", identity, name.strip(), wanted, message)


def revoke(database: Database, identity: str) -> Key:
    """Refuse a key from now on; revoking it again changes nothing.

    Raises:
        NotFound: there is no such key.
        Unavailable: the database does not answer.
    """
    mine = KEYS.c.id == identity
    with database.transaction() as connection:
        connection.execute(sa.update(KEYS).where(mine, KEYS.c.revoked_at.is_(None)).values(revoked_at=utc_now()))
        row = connection.execute(sa.select(KEYS).where(mine)).one_or_none()
    if row is None:
        raise NotFound(f"There is no key {identity[:40]!r}.", hint="`lawnwatch key list` shows them.")
    return _key(row)


def list_keys(database: Database) -> list[Key]:
    """All keys, oldest first, revoked ones included. Raises Unavailable."""
    query = sa.select(KEYS).order_by(KEYS.c.created_at, KEYS.c.id)
    with database.reading() as connection:
        return [_key(row) for row in connection.execute(query)]


def _key(row: sa.Row[Any]) -> Key:
    return Key(row.id, row.name, tuple(row.scopes), row.created_at, row.revoked_at, row.sha256)
