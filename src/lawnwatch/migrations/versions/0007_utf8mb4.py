"""Any letter in any table: those of 0002 to 0006 were made in the database's own character set, such as latin1."""

import sqlalchemy as sa
from alembic import op

from lawnwatch.migrations import TABLE

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

TABLES = ("predictions", "verdicts", "champion", "promotions", "rollouts", "quality_reports", "api_keys")


def upgrade() -> None:
    connection = op.get_bind()
    if connection.dialect.name == "sqlite":
        return
    # Column by column, in one statement a table: CONVERT TO would also make TEXT a MEDIUMTEXT, and change the binary
    # collation of MariaDB's JSON. None of these columns has a default.
    narrow = sa.text(
        "SELECT column_name, column_type, is_nullable FROM information_schema.columns"
        " WHERE table_schema = DATABASE() AND table_name = :name AND character_set_name <> 'utf8mb4'"
    )
    wide = f"CHARACTER SET {TABLE['mysql_charset']} COLLATE {TABLE['mysql_collate']}"
    for table in TABLES:
        columns = [
            f"MODIFY `{name}` {kind} {wide} {'NULL' if nullable == 'YES' else 'NOT NULL'}"
            for name, kind, nullable in connection.execute(narrow, {"name": table})
        ]
        if columns:
            op.execute(f"ALTER TABLE `{table}` {', '.join([f'DEFAULT {wide}', *columns])}")


def downgrade() -> None:
    """The tables stay as they are: a smaller character set would lose letters, and 0006 needs none."""
