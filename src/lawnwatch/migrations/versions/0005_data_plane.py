"""Claims that died, sources asked again, and quality reports."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

from lawnwatch.migrations import add_columns, create_index, drop_columns, drop_index

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


def upgrade() -> None:
    add_columns(
        "images",
        sa.Column("lost_claims", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("source_status", sa.String(16)),
        sa.Column("checked_at", MOMENT),
    )
    create_index("ix_images_state_label_id", "images", "state", "label_id", "id")
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
    create_index("ix_quality_reports_created_at", "quality_reports", "created_at")


def downgrade() -> None:
    op.drop_table("quality_reports", if_exists=True)
    drop_index("ix_images_state_label_id", "images")
    drop_columns("images", "lost_claims", "source_status", "checked_at")
