"""Claims that died, sources asked again, and quality reports."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


def upgrade() -> None:
    # MySQL commits each statement, so a migration that was killed finds some of its work done.
    inspector = sa.inspect(op.get_bind())
    there = {column["name"] for column in inspector.get_columns("images")}
    for column in (
        sa.Column("lost_claims", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("source_status", sa.String(16)),
        sa.Column("checked_at", MOMENT),
    ):
        if column.name not in there:
            op.add_column("images", column)
    _index("ix_images_state_label_id", "images", "state", "label_id", "id")
    op.create_table(
        "quality_reports",
        sa.Column("id", sa.CHAR(32), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("passed", sa.Boolean(), nullable=False),
        sa.Column("forced", sa.String(500)),
        sa.Column("checks", sa.JSON(), nullable=False),
        sa.Column("object_key", sa.String(255), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_quality_reports"),
        if_not_exists=True,
    )
    _index("ix_quality_reports_created_at", "quality_reports", "created_at")


def _index(name: str, table: str, *columns: str) -> None:
    if name not in {index["name"] for index in sa.inspect(op.get_bind()).get_indexes(table)}:
        op.create_index(name, table, list(columns))


def downgrade() -> None:
    op.drop_table("quality_reports")
    op.drop_index("ix_images_state_label_id", "images")
    for name in ("checked_at", "source_status", "lost_claims"):
        op.drop_column("images", name)
