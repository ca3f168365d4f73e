"""Which bundle was put into service, when, and how it went."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


def upgrade() -> None:
    op.create_table(
        "rollouts",
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("model_version", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.CHAR(64), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("previous_version", sa.Integer()),
        sa.Column("previous_sha256", sa.CHAR(64)),
        sa.Column("previous_target", sa.Text()),
        sa.Column("active", sa.SmallInteger()),
        sa.Column("controller", sa.CHAR(32), nullable=False),
        sa.Column("lease_until", MOMENT, nullable=False),
        sa.Column("started_at", MOMENT, nullable=False),
        sa.Column("finished_at", MOMENT),
        sa.UniqueConstraint("active", name="uq_rollouts_active"),
        if_not_exists=True,
    )


def downgrade() -> None:
    op.drop_table("rollouts", if_exists=True)
