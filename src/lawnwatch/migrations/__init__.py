"""The schema's history. MySQL commits each DDL statement, so a migration that was killed finds some of its work done.

Every migration can therefore be run again from its beginning, up and down: it makes what is missing with
`if_not_exists` and the two functions below, and drops what is there with `if_exists`.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

TABLE: dict[str, Any] = {"mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_unicode_ci", "mysql_engine": "InnoDB"}
"""The options of every table; without them it takes the database's own character set, which may be a small one."""


def create_index(name: str, table: str, *columns: str) -> None:
    """Create an index unless it is there; MySQL has no CREATE INDEX IF NOT EXISTS."""
    if name not in _indexes(table):
        op.create_index(name, table, list(columns))


def drop_index(name: str, table: str) -> None:
    """Drop an index if it is there."""
    if name in _indexes(table):
        op.drop_index(name, table)


def add_columns(table: str, *columns: sa.Column[Any]) -> None:
    """Add those of the columns that are missing."""
    there = _columns(table)
    for column in columns:
        if column.name not in there:
            op.add_column(table, column)


def drop_columns(table: str, *names: str) -> None:
    """Drop those of the columns that are there."""
    for name in sorted(_columns(table) & set(names)):
        op.drop_column(table, name)


def _indexes(table: str) -> set[str | None]:
    return {index["name"] for index in sa.inspect(op.get_bind()).get_indexes(table)}


def _columns(table: str) -> set[str]:
    return {column["name"] for column in sa.inspect(op.get_bind()).get_columns(table)}
